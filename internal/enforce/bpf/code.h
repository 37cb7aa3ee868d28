/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs, libraries, memory and kernel code. */
#ifndef RINGWALL_CODE_H
#define RINGWALL_CODE_H

#define BIT(k) (1 << (k))
#define SECOND_NS 1000000000
#define SIGKILL 9
#define USERFAULTFD_0 0x756166726573755b /* "[userfaultfd]", little-endian */
#define USERFAULTFD_1 0x5d6466746c
#define SHA256_NAME 0x363532616873 /* "sha256", little-endian */

/* A file handed to execve. Called for a script first, then for its interpreter. */
SEC("lsm.s/bprm_check_security")
long BPF_PROG(rw_exec, struct linux_binprm *bprm)
{
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s)
		return 0;
	struct found o = {};
	bool elf = bprm->buf[0] == 0x7f && bprm->buf[1] == 'E' && bprm->buf[2] == 'L' && bprm->buf[3] == 'F';
	__u16 kind = elf ? K_EXEC : K_SCRIPT;
	return judge(c, s, bprm->file, kind, BIT(kind), &o, true, true, NULL);
}

/* AT_EXECVE_CHECK (6.14): an interpreter asks whether a script may run. */
SEC("lsm.s/bprm_creds_for_exec")
long BPF_PROG(rw_exec_check, struct linux_binprm *bprm)
{
	struct linux_binprm___check *b = (void *)bprm;
	if (!bpf_core_field_exists(b->is_check) || !BPF_CORE_READ_BITFIELD(b, is_check))
		return 0;
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	struct found o = {};
	return s ? judge(c, s, bprm->file, K_SCRIPT, BIT(K_SCRIPT) | BIT(K_EXEC), &o, true, true, NULL) : 0;
}

/*
 * Marks authorised code as in use so that writers are refused from now on, and
 * then looks for writers that came before: whichever of the two is second sees
 * the other (the kernel counts a writer before it asks rw_open). False: there
 * is a writer.
 */
static __always_inline bool mark_in_use(const struct steering *c, struct file *f, const __u8 *digest)
{
	struct identity *id = bpf_inode_storage_get(&identities, f->f_inode, 0, 0);
	struct version v = {};
	if (!id)
		return true; /* identity from fs-verity or dm-verity: there can be no writer */
	__u32 now = bpf_ktime_get_boot_ns() / SECOND_NS + 1;
	*(volatile __u32 *)&id->in_use = now;
	struct inode *real = f->f_inode->i_sb->s_magic == OVERLAY_MAGIC ? real_inode(c, f) : NULL;
	if (real) {
		struct guarded at = { .inode = BPF_CORE_READ(real, i_ino), .device = BPF_CORE_READ(real, i_sb, s_dev) };
		struct layer l = { .in_use = now };
		__builtin_memcpy(l.digest, digest, 32);
		bpf_map_update_elem(&layers, &at, &l, BPF_ANY);
	}
	__sync_fetch_and_add(&id->writes, 0); /* a full barrier */
	return version_of_file(c, f, &v) && v.writers <= 0;
}

static long note_vm_flags(struct task_struct *t, struct vm_area_struct *vma, __u64 *flags)
{
	*flags = vma->vm_flags;
	return 0;
}

/*
 * execve maps the new program after it made the stack: the first moment at
 * which a hook can see that the ELF header asked for an executable one, or that
 * READ_IMPLIES_EXEC was inherited (32-bit programs). If the memory map is busy
 * the stack goes unjudged; nobody else uses the map of a new program.
 */
static __always_inline bool asks_for_loose_memory(struct file *file)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct mm_struct *mm = t->mm;
	__u64 flags = 0;
	if (!mm || (void *)mm->exe_file != (void *)file)
		return false;
	if (t->personality & READ_IMPLIES_EXEC)
		return true;
	bpf_find_vma(t, mm->arg_start, note_vm_flags, &flags, 0);
	return flags & VM_EXEC;
}

/*
 * A program or library that is an interpreter comes into a process that was
 * none: libpython in an editor, or `ld.so /usr/bin/python3`. From here on the
 * rule holds for what it opens. A program that is mapped instead of executed
 * hides its arguments from the scan: they count as unreadable.
 */
static __always_inline long maps_interpreter(struct steering *c, struct generation *s, struct file *file, const struct found *o)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct task *info = task_info(t);
	if (s->modes[K_SCRIPT] == M_OFF || (info && info->interpreter))
		return 0;
	struct task *fresh = bpf_task_storage_get(&tasks, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!fresh)
		return s->modes[K_SCRIPT] == M_ENFORCE ? -EPERM : 0;
	if (info && info != fresh)
		*fresh = *info;
	fresh->interpreter = o->entry.interpreter;
	fresh->script_len = 0;
	struct interpreter *rule = rule_of(slot_of(s, fresh));
	if (!rule || !(o->entry.kinds & BIT(K_EXEC)) || fresh->roles & R_PACKAGES || !rule->inline_mode)
		return 0;
	struct report r = {
		.kind = K_SCRIPT, .reason = WHY_ARGUMENTS, .file = file, .interpreter = o->entry.interpreter, .digest = o->digest, .space = o->space,
		.mode = s->modes[K_SCRIPT] < rule->inline_mode ? s->modes[K_SCRIPT] : rule->inline_mode,
	};
	return refuse(c, s, &r, true);
}

SEC("lsm.s/mmap_file")
long BPF_PROG(rw_mmap, struct file *file, unsigned long reqprot, unsigned long prot, unsigned long flags)
{
	if (!(prot & PROT_EXEC))
		return 0;
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s)
		return 0;
	/* since 6.5 the verifier takes file for non-NULL and deletes a plain test: ask for the raw argument */
	__u64 raw = 0;
	bpf_get_func_arg(ctx, 0, &raw);
	if (!raw || !file) {
		if (s->memory == M_OFF || may(R_JIT | R_JIT_SHARED))
			return 0;
		return refuse_act(c, s, s->memory, prot & PROT_WRITE ? WHY_MEMORY_WX : WHY_MEMORY_ANON, NULL);
	}
	if (is_loose_memory(file) && may(R_JIT_SHARED))
		return 0;
	struct found o = {};
	long rc = judge(c, s, file, K_LIBRARY, BIT(K_LIBRARY) | BIT(K_EXEC), &o, true, true, NULL);
	if (rc)
		return rc;
	struct report r = { .kind = K_LIBRARY, .file = file, .digest = o.digest, .space = o.space };
	if (s->memory != M_OFF && ((prot & PROT_WRITE) || (asks_for_loose_memory(file) && !may(R_JIT | R_JIT_SHARED)))) {
		r.mode = s->memory;
		r.reason = WHY_MEMORY_WX;
		return refuse(c, s, &r, true);
	}
	if ((o.entry.kinds & (BIT(K_LIBRARY) | BIT(K_EXEC))) && s->code_writes == M_ENFORCE && !mark_in_use(c, file, o.digest)) {
		r.mode = s->modes[K_LIBRARY];
		r.reason = WHY_NO_IDENTITY;
		r.error = -ETXTBSY;
		return refuse(c, s, &r, true);
	}
	return o.entry.interpreter ? maps_interpreter(c, s, file, &o) : 0;
}

/*
 * userfaultfd(2) fills pages of any private mapping that were not touched yet,
 * code among them, and asks no other hook. Who needs it moves memory of virtual
 * machines and has a role for code in memory.
 */
SEC("lsm/inode_init_security_anon")
long BPF_PROG(rw_anon_inode, struct inode *inode, const struct qstr *name)
{
	__u64 word[2] = {};
	if (BPF_CORE_READ(name, len) != 13)
		return 0;
	bpf_probe_read_kernel(word, 13, BPF_CORE_READ(name, name));
	if (word[0] != USERFAULTFD_0 || word[1] != USERFAULTFD_1)
		return 0;
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s || s->memory == M_OFF || may(R_JIT | R_JIT_SHARED))
		return 0;
	return refuse_act(c, s, s->memory, WHY_USERFAULT, NULL);
}

SEC("lsm/file_mprotect")
long BPF_PROG(rw_mprotect, struct vm_area_struct *vma, unsigned long reqprot, unsigned long prot)
{
	if (!(prot & PROT_EXEC))
		return 0;
	bool was = vma->vm_flags & VM_EXEC;
	if (was && !(prot & PROT_WRITE))
		return 0;
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s || s->memory == M_OFF)
		return 0;
	struct file *f = vma->vm_file;
	__u16 why = prot & PROT_WRITE ? WHY_MEMORY_WX : WHY_MEMORY_ANON;
	__u16 roles = R_JIT | R_JIT_SHARED;
	if (f) {
		/* the pages may have been changed since they were mapped; only shared memory of a JIT may do this */
		why = was ? WHY_MEMORY_WX : WHY_MEMORY_FILE;
		roles = f->f_inode->i_sb->s_magic == TMPFS_MAGIC && !f->f_inode->i_nlink ? R_JIT_SHARED : 0;
	}
	if (roles && may(roles))
		return 0;
	return refuse_act(c, s, s->memory, why, NULL);
}

/* Files that the kernel reads for itself. */
SEC("lsm.s/kernel_read_file")
long BPF_PROG(rw_kernel_read, struct file *file, unsigned long id, bool contents)
{
	__u16 kind = 0;
	if (id == bpf_core_enum_value(enum kernel_read_file_id, READING_MODULE))
		kind = K_MODULE;
	else if (bpf_core_enum_value_exists(enum kernel_read_file_id, READING_MODULE_COMPRESSED) &&
		 id == bpf_core_enum_value(enum kernel_read_file_id, READING_MODULE_COMPRESSED))
		kind = K_MODULE;
	else if (id == bpf_core_enum_value(enum kernel_read_file_id, READING_FIRMWARE))
		kind = K_FIRMWARE;
	else if (id == bpf_core_enum_value(enum kernel_read_file_id, READING_KEXEC_IMAGE) ||
		 id == bpf_core_enum_value(enum kernel_read_file_id, READING_KEXEC_INITRAMFS))
		kind = K_KEXEC;
	else
		return 0;
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s)
		return 0;
	__u64 raw = 0;
	bpf_get_func_arg(ctx, 0, &raw);
	if (!raw || !file)
		return s->modes[kind & 7] ? refuse_act(c, s, s->modes[kind & 7], WHY_FROM_MEMORY, NULL) : 0;
	struct found o = {};
	return judge(c, s, file, kind, BIT(kind), &o, true, true, NULL);
}

/*
 * Kernel code from memory: init_module(2), the old kexec_load(2). There is no
 * file to judge. R_MODULES is for those that decompress modules themselves, and
 * only where the kernel then insists on a signature: what they read, and where,
 * root can tell them.
 */
SEC("lsm/kernel_load_data")
long BPF_PROG(rw_kernel_load, unsigned long id, bool contents)
{
	__u16 kind = 0;
	if (id == bpf_core_enum_value(enum kernel_load_data_id, LOADING_MODULE))
		kind = K_MODULE;
	else if (id == bpf_core_enum_value(enum kernel_load_data_id, LOADING_FIRMWARE))
		kind = K_FIRMWARE;
	else if (id == bpf_core_enum_value(enum kernel_load_data_id, LOADING_KEXEC_IMAGE) ||
		 id == bpf_core_enum_value(enum kernel_load_data_id, LOADING_KEXEC_INITRAMFS))
		kind = K_KEXEC;
	else
		return 0;
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s || !s->modes[kind & 7] || (kind == K_MODULE && c->signed_modules && may(R_MODULES)))
		return 0;
	struct report r = { .kind = kind, .mode = s->modes[kind & 7], .reason = WHY_FROM_MEMORY };
	return refuse(c, s, &r, false);
}

/*
 * READ_IMPLIES_EXEC makes the next brk(2) executable without asking any hook.
 * A tracing program cannot refuse the call, but the signal is delivered before
 * the caller's next instruction.
 */
static __always_inline long judge_personality(__u32 wanted)
{
	if (wanted == 0xffffffff || !(wanted & READ_IMPLIES_EXEC))
		return 0;
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s || s->memory == M_OFF || may(R_JIT | R_JIT_SHARED))
		return 0;
	if (refuse_act(c, s, s->memory, WHY_PERSONALITY, NULL))
		bpf_send_signal(SIGKILL);
	return 0;
}

#ifdef __TARGET_ARCH_x86
SEC("fentry/__x64_sys_personality")
long BPF_PROG(rw_personality, const struct pt_regs *regs)
{
	return judge_personality(BPF_CORE_READ((const struct pt_regs___call_x86 *)regs, di));
}

SEC("fentry/__ia32_sys_personality")
long BPF_PROG(rw_personality_32, const struct pt_regs *regs)
{
	return judge_personality(BPF_CORE_READ((const struct pt_regs___call_x86 *)regs, bx));
}
#else
SEC("fentry/__arm64_sys_personality")
long BPF_PROG(rw_personality, const struct pt_regs *regs)
{
	__u64 wanted = 0;
	bpf_core_read(&wanted, sizeof(wanted), &((const struct pt_regs___call *)regs)->regs[0]);
	return judge_personality(wanted);
}
#endif

/* ---- dm-verity (6.12): the kernel itself says which root a device has ---- */

SEC("lsm/bdev_setintegrity")
long BPF_PROG(rw_bdev_root, struct block_device *bdev, int type)
{
	if ((__u64)type != bpf_core_enum_value(enum lsm_integrity_type, LSM_INT_DMVERITY_ROOTHASH))
		return 0;
	__u32 device = bdev->bd_dev;
	struct key k = { .space = S_DMVERITY };
	char name[8] = {};
	__u64 raw = 0;
	/* the verifier refuses to load a const void * argument before 6.16 */
	bpf_get_func_arg(ctx, 2, &raw);
	struct dm_verity_digest *d = (void *)raw;
	if (d)
		bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(d, alg));
	/* any other root, or none: the device has no identity */
	if (*(__u64 *)name != SHA256_NAME || BPF_CORE_READ(d, digest_len) != 32 ||
	    bpf_probe_read_kernel(k.digest, 32, BPF_CORE_READ(d, digest))) {
		bpf_map_delete_elem(&verity_devices, &device);
		return 0;
	}
	bpf_map_update_elem(&verity_devices, &device, &k, BPF_ANY);
	return 0;
}

/* The number may be given to another device next. */
SEC("lsm/bdev_free_security")
long BPF_PROG(rw_bdev_gone, struct block_device *bdev)
{
	__u32 device = bdev->bd_dev;
	bpf_map_delete_elem(&verity_devices, &device);
	return 0;
}

#endif
