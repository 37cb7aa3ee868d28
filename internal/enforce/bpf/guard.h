/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Opening files; other processes; and Ringwall itself against everybody, root included. */
#ifndef RINGWALL_GUARD_H
#define RINGWALL_GUARD_H

static __always_inline __u8 guard_of(const struct inode *in)
{
	struct guarded k = { .inode = in->i_ino, .device = in->i_sb->s_dev };
	__u8 *g = bpf_map_lookup_elem(&guarded_inodes, &k);
	return g ? *g : 0;
}

/* A guarded file, an entry of a guarded directory, or anything on the private bpffs. */
static __always_inline bool is_guarded(const struct steering *c, const struct dentry *d)
{
	const struct inode *in = d->d_inode;
	return (in && (in->i_sb->s_dev == c->pin_device || guard_of(in) == GUARD_ALL)) || guard_of(d->d_parent->d_inode) == GUARD_ALL;
}

/* The guards hold for everyone but the agent, in scope or not. */
static __always_inline bool guarding(const struct steering *c)
{
	return c && c->protect && !may(R_AGENT);
}

/* Guards do not follow the policy's mode: a policy in audit must still be Ringwall's own. */
static __always_inline long refuse_guard(struct steering *c, __u16 reason, const char *detail)
{
	struct generation *s = settings_of(c);
	struct report r = { .mode = M_ENFORCE, .reason = reason, .detail = detail };
	if (s)
		refuse(c, s, &r, false);
	return -EPERM; /* a break-glass permit does not open the guard either */
}

/* The process that a file below /proc/PID is about, in the first pid namespace; 0 if none. */
static __always_inline __u32 process_of(struct inode *in)
{
	struct proc_inode *p = (void *)in - bpf_core_field_offset(struct proc_inode, vfs_inode);
	struct hlist_node *n = BPF_CORE_READ(p, pid, tasks[0].first);
	if (!n)
		return 0;
	struct task_struct *t = (void *)n - bpf_core_field_offset(struct task_struct, pid_links[0]);
	return BPF_CORE_READ(t, tgid);
}

/*
 * Files that are switches: the one that turns the programs off, the agent's
 * cgroup and those above it (kill, freeze, limits), its /proc files. The service
 * manager starts the agent in its cgroup, thaws the slices above whatever it
 * starts, and writes the limits of a slice and all that is in it whenever one of
 * them gets a controller: only killing is not its. Which controllers the cgroups
 * below have limits nothing: container engines say so too.
 */
static __always_inline __u16 is_switch(const struct steering *c, struct file *f)
{
	struct inode *in = f->f_inode;
	unsigned long magic = in->i_sb->s_magic;
	struct dentry *d = f->f_path.dentry;
	if (magic == PROC_MAGIC) {
		if (name_is(d, "ftrace_enabled", 14))
			return WHY_GUARD_SYSCTL;
		return c->agent && process_of(in) == c->agent ? WHY_GUARD_AGENT : 0;
	}
	if (magic != CGROUP2_MAGIC)
		return 0;
	__u64 dir = d->d_parent->d_inode->i_ino;
	bool its = false;
#pragma unroll
	for (int i = 0; i < CGROUPS; i++)
		its |= dir == c->agent_cgroups[i];
	if (!its || name_is(d, "cgroup.subtree_control", 22))
		return 0;
	if (bpf_get_current_pid_tgid() >> 32 == 1 && !name_is(d, "cgroup.kill", 11))
		return 0;
	return WHY_GUARD_AGENT;
}

/* Physical memory and I/O ports: mem, kmem, port. */
static __always_inline bool is_raw_memory(const struct inode *in)
{
	__u32 minor = MINOR(in->i_rdev);
	return MAJOR(in->i_rdev) == 1 && (minor == 1 || minor == 2 || minor == 4);
}

static __always_inline bool is_claimed_disk(struct file *f)
{
	struct inode *host = BPF_CORE_READ(f, f_mapping, host);
	struct bdev_inode *b = (void *)host - bpf_core_field_offset(struct bdev_inode, vfs_inode);
	return host && BPF_CORE_READ(b, bdev.bd_holder);
}

/*
 * Somebody still reads or runs it. The kernel counts readers; a reader that
 * is just being admitted is not counted yet, so code stays in use for some
 * seconds. On overlayfs the count is the layer's: in use for good.
 */
static __always_inline bool in_use(const struct inode *in, __u32 since)
{
	if (!since)
		return false;
	if (in->i_sb->s_magic == OVERLAY_MAGIC || !bpf_core_field_exists(in->i_readcount) || in->i_readcount.counter > 0)
		return true;
	return bpf_ktime_get_boot_ns() / SECOND_NS + 1 - since < 3;
}

/*
 * A writer to authorised code that is in use, itself or through an overlay.
 * Only what is still authorised is worth keeping as it is.
 */
static __always_inline long judge_code_write(struct steering *c, struct generation *s, struct inode *in, const struct identity *id,
					    struct file *f, bool can_path)
{
	struct key k = {};
	struct guarded at = { .inode = in->i_ino, .device = in->i_sb->s_dev };
	if (s->code_writes == M_OFF)
		return 0;
	if (!id || !in_use(in, id->in_use) || !last_digest(id, k.digest)) {
		struct layer *l = bpf_map_lookup_elem(&layers, &at);
		if (!l || !in_use(in, l->in_use))
			return 0;
		__builtin_memcpy(k.digest, l->digest, 32);
	}
	if (!look_up(s, &k))
		return 0;
	struct report r = { .kind = K_LIBRARY, .mode = s->code_writes, .reason = WHY_CODE_WRITE, .digest = k.digest, .file = f };
	return refuse(c, s, &r, can_path) ? -ETXTBSY : 0;
}

static __always_inline long judge_write(struct steering *c, struct generation *s, struct file *f, const struct identity *id)
{
	struct inode *in = f->f_inode;
	struct report r = { .file = f };
	__u16 type = in->i_mode & S_IFMT;
	if (type == S_IFREG && in->i_sb->s_magic == PROC_MAGIC) {
		if (s->ptrace == M_OFF || !name_is(f->f_path.dentry, "mem", 3) || may(R_DEBUG))
			return 0;
		r.mode = s->ptrace;
		r.reason = WHY_PROC_MEM;
	} else if (type == S_IFBLK || type == S_IFCHR) {
		bool hit = type == S_IFCHR ? is_raw_memory(in) : is_claimed_disk(f);
		/* a loop device may become swap or a disk whose file somebody writes: not refused, but told */
		bool loop = type == S_IFBLK && MAJOR(in->i_rdev) == LOOP_MAJOR && s->block_writes == M_ENFORCE;
		if (s->block_writes == M_OFF || (!hit && !loop) || may(R_BLOCK))
			return 0;
		r.mode = hit ? s->block_writes : M_AUDIT;
		r.reason = WHY_BLOCK_WRITE;
	} else {
		return judge_code_write(c, s, in, id, f, true);
	}
	return refuse(c, s, &r, true);
}

static __always_inline long opened_for_writing(struct file *file)
{
	if (!(file->f_mode & FMODE_WRITE))
		return 0;
	struct steering *c = steering();
	if (!c)
		return 0;
	if (c->protect) {
		__u16 why = is_guarded(c, file->f_path.dentry) ? WHY_GUARD_FILE : is_switch(c, file);
		if (why && !may(R_AGENT))
			return refuse_guard(c, why, (const char *)file->f_path.dentry->d_name.name);
	}
	struct generation *s = settings_of(c);
	struct identity *id = bpf_inode_storage_get(&identities, file->f_inode, 0, 0);
	long rc = s && in_scope(c) ? judge_write(c, s, file, id) : 0;
	if (!rc && id)
		__sync_fetch_and_add(&id->writes, 1);
	return rc;
}

/* Each open. Most are not for writing: one test. */
SEC("lsm/file_open")
long BPF_PROG(rw_open, struct file *file) { return opened_for_writing(file); }

/*
 * The same where file_post_open is missing, with what rw_read does elsewhere.
 * The file is not yet open enough to be hashed, so only content that was
 * measured before has an identity: by execve, by mmap, or by the agent
 * (rw_measure).
 */
SEC("lsm/file_open")
long BPF_PROG(rw_open_early, struct file *file)
{
	long rc = opened_for_writing(file);
	return rc ? rc : opened_for_reading(file, false);
}

SEC("lsm/path_truncate")
long BPF_PROG(rw_truncate, struct path *path)
{
	struct inode *in = path->dentry->d_inode;
	struct steering *c = steering();
	if (c && c->protect && is_guarded(c, path->dentry) && !may(R_AGENT))
		return refuse_guard(c, WHY_GUARD_FILE, NULL);
	struct identity *id = bpf_inode_storage_get(&identities, in, 0, 0);
	struct generation *s = c ? settings_of(c) : NULL;
	long rc = s && in_scope(c) ? judge_code_write(c, s, in, id, NULL, false) : 0;
	if (!rc && id)
		__sync_fetch_and_add(&id->writes, 1);
	return rc;
}

static __always_inline bool is_agent(struct task_struct *t)
{
	struct task *i = task_info(t);
	return i && (i->roles & R_AGENT);
}

SEC("lsm/ptrace_access_check")
long BPF_PROG(rw_ptrace, struct task_struct *child, unsigned int mode)
{
	if (!(mode & PTRACE_MODE_ATTACH))
		return 0;
	struct steering *c = steering();
	if (!c)
		return 0;
	if (is_agent(child) && guarding(c))
		return refuse_guard(c, WHY_PTRACE, NULL);
	struct generation *s = settings_of(c);
	if (!s || s->ptrace == M_OFF || !in_scope(c) || may(R_DEBUG | R_AGENT))
		return 0;
	return refuse_act(c, s, s->ptrace, WHY_PTRACE, child->comm);
}

/* PTRACE_TRACEME: the parent becomes the tracer. */
SEC("lsm/ptrace_traceme")
long BPF_PROG(rw_traceme, struct task_struct *parent)
{
	struct steering *c = steering();
	struct generation *s = c ? settings_of(c) : NULL;
	if (!s || s->ptrace == M_OFF || !in_scope(c))
		return 0;
	struct task *tracer = task_info(parent);
	if (tracer && (tracer->roles & R_DEBUG))
		return 0;
	return refuse_act(c, s, s->ptrace, WHY_PTRACE, parent->comm);
}

SEC("lsm/task_kill")
long BPF_PROG(rw_kill, struct task_struct *target, struct kernel_siginfo *info, int sig, const struct cred *cred)
{
	struct steering *c = steering();
	if (!sig || !c || !c->protect || !is_agent(target) || may(R_AGENT))
		return 0;
	/* the service manager may ask it to end, as at shutdown; nobody may force or freeze it */
	if (bpf_get_current_pid_tgid() >> 32 == 1 && (sig == 15 || sig == 18))
		return 0;
	return refuse_guard(c, WHY_GUARD_SIGNAL, NULL);
}

/* A signal chosen with F_SETSIG for a descriptor that F_SETOWN gave to the agent. It expects none. */
SEC("lsm/file_send_sigiotask")
long BPF_PROG(rw_sigio, struct task_struct *target, struct fown_struct *owner, int sig)
{
	struct steering *c = steering();
	return c && c->protect && is_agent(target) ? refuse_guard(c, WHY_GUARD_SIGNAL, NULL) : 0;
}

static __always_inline long guard_agent(struct task_struct *target)
{
	struct steering *c = steering();
	return c && c->protect && is_agent(target) && !may(R_AGENT) ? refuse_guard(c, WHY_GUARD_AGENT, NULL) : 0;
}

SEC("lsm/task_setrlimit")
long BPF_PROG(rw_setrlimit, struct task_struct *target, unsigned int resource, struct rlimit *limit) { return guard_agent(target); }

SEC("lsm/task_setnice")
long BPF_PROG(rw_setnice, struct task_struct *target, int nice) { return guard_agent(target); }

SEC("lsm/task_setioprio")
long BPF_PROG(rw_setioprio, struct task_struct *target, int priority) { return guard_agent(target); }

/*
 * The current task is in write(2), by the number with which it came into the
 * kernel; a 32-bit task's numbers are others, and this one is none that sets a
 * priority.
 */
static __always_inline bool is_writing(void)
{
	void *regs = (void *)bpf_task_pt_regs(bpf_get_current_task_btf());
#ifdef __TARGET_ARCH_x86
	return BPF_CORE_READ((const struct pt_regs___call_x86 *)regs, orig_ax) == 1;
#else
	return BPF_CORE_READ((const struct pt_regs___call *)regs, syscallno) == 64;
#endif
}

/* Before 6.6, cpuset asks this of all below a cgroup that gets the controller, though nothing is set. */
SEC("lsm/task_setscheduler")
long BPF_PROG(rw_setscheduler, struct task_struct *target) { return is_writing() ? 0 : guard_agent(target); }

SEC("lsm/task_movememory")
long BPF_PROG(rw_movememory, struct task_struct *target) { return guard_agent(target); }

#define BPF_CMD_PROG_LOAD 5
#define BPF_CMD_LINK_UPDATE 29
#define BPF_CMD_LINK_DETACH 34

SEC("lsm/bpf")
long BPF_PROG(rw_bpf, int cmd, union bpf_attr *attr, unsigned int size)
{
	if (cmd != BPF_CMD_PROG_LOAD && cmd != BPF_CMD_LINK_UPDATE && cmd != BPF_CMD_LINK_DETACH)
		return 0;
	struct steering *c = steering();
	if (!c || may(R_AGENT))
		return 0;
	if (cmd != BPF_CMD_PROG_LOAD)
		return c->protect ? refuse_guard(c, WHY_GUARD_BPF, NULL) : 0;
	struct generation *s = settings_of(c);
	if (!s || !s->modes[K_BPF] || !in_scope(c) || may(R_BPF))
		return 0;
	struct report r = { .kind = K_BPF, .mode = s->modes[K_BPF], .reason = WHY_BPF_LOAD };
	return refuse(c, s, &r, false);
}

/* A file descriptor for one of our maps, by id or from a pin. */
SEC("lsm/bpf_map")
long BPF_PROG(rw_bpf_map, struct bpf_map *map, unsigned int mode)
{
	struct steering *c = steering();
	__u32 id = map->id;
	if (!(mode & FMODE_WRITE) || !bpf_map_lookup_elem(&own_maps, &id) || !guarding(c))
		return 0;
	return refuse_guard(c, WHY_GUARD_BPF, NULL);
}

/* Making or removing an entry of a directory. */
static __always_inline long guard_entry(const struct inode *dir, const struct dentry *entry)
{
	struct steering *c = steering();
	if (!c || !c->protect)
		return 0;
	const struct inode *in = entry ? entry->d_inode : NULL;
	if (dir->i_sb->s_dev != c->pin_device && guard_of(dir) != GUARD_ALL && !(in && guard_of(in)))
		return 0;
	return may(R_AGENT) ? 0 : refuse_guard(c, WHY_GUARD_FILE, NULL);
}

/* Changing what a file is. */
static __always_inline long guard_file(const struct dentry *d)
{
	struct steering *c = steering();
	if (!c || !c->protect || !is_guarded(c, d) || may(R_AGENT))
		return 0;
	return refuse_guard(c, WHY_GUARD_FILE, NULL);
}

/* Hiding a place by mounting, in the namespace in which the agent looks for it. */
static __always_inline long guard_place(const struct dentry *d)
{
	struct steering *c = steering();
	if (!c || !c->protect)
		return 0;
	__u8 guard = guard_of(d->d_inode);
	if (guard == GUARD_PLACE && BPF_CORE_READ(bpf_get_current_task_btf(), nsproxy, mnt_ns, ns.inum) != c->mount_ns)
		return 0;
	if (!guard && d->d_inode->i_sb->s_dev != c->pin_device)
		return 0;
	return may(R_AGENT) ? 0 : refuse_guard(c, WHY_GUARD_FILE, NULL);
}

SEC("lsm/inode_unlink")
long BPF_PROG(rw_unlink, struct inode *dir, struct dentry *dentry) { return guard_entry(dir, dentry); }

SEC("lsm/inode_rmdir")
long BPF_PROG(rw_rmdir, struct inode *dir, struct dentry *dentry) { return guard_entry(dir, dentry); }

SEC("lsm/inode_create")
long BPF_PROG(rw_create, struct inode *dir, struct dentry *dentry, unsigned int mode) { return guard_entry(dir, NULL); }

SEC("lsm/inode_mkdir")
long BPF_PROG(rw_mkdir, struct inode *dir, struct dentry *dentry, unsigned int mode) { return guard_entry(dir, NULL); }

SEC("lsm/inode_symlink")
long BPF_PROG(rw_symlink, struct inode *dir, struct dentry *dentry, const char *old) { return guard_entry(dir, NULL); }

SEC("lsm/inode_mknod")
long BPF_PROG(rw_mknod, struct inode *dir, struct dentry *dentry, unsigned int mode, unsigned int device) { return guard_entry(dir, NULL); }

SEC("lsm/inode_link")
long BPF_PROG(rw_link, struct dentry *old, struct inode *dir, struct dentry *fresh)
{
	long rc = guard_entry(dir, NULL);
	return rc ? rc : guard_file(old);
}

SEC("lsm/inode_rename")
long BPF_PROG(rw_rename, struct inode *old_dir, struct dentry *old, struct inode *new_dir, struct dentry *fresh)
{
	long rc = guard_entry(old_dir, old);
	return rc ? rc : guard_entry(new_dir, fresh);
}

/* Mode, owner, size, times. Two shapes: the first argument came in 6.9. */
SEC("lsm/inode_setattr")
long BPF_PROG(rw_setattr_old, struct dentry *dentry, struct iattr *attr) { return guard_file(dentry); }

SEC("lsm/inode_setattr")
long BPF_PROG(rw_setattr, struct mnt_idmap *map, struct dentry *dentry, struct iattr *attr) { return guard_file(dentry); }

SEC("lsm/inode_setxattr")
long BPF_PROG(rw_setxattr, struct mnt_idmap *map, struct dentry *dentry) { return guard_file(dentry); }

SEC("lsm/inode_removexattr")
long BPF_PROG(rw_removexattr, struct mnt_idmap *map, struct dentry *dentry) { return guard_file(dentry); }

SEC("lsm/inode_set_acl")
long BPF_PROG(rw_set_acl, struct mnt_idmap *map, struct dentry *dentry) { return guard_file(dentry); }

SEC("lsm/inode_remove_acl")
long BPF_PROG(rw_remove_acl, struct mnt_idmap *map, struct dentry *dentry) { return guard_file(dentry); }

/* chattr: 6.17 and newer have a hook for it */
SEC("lsm/inode_file_setattr")
long BPF_PROG(rw_file_setattr, struct dentry *dentry) { return guard_file(dentry); }

#define FS_IOC_SETFLAGS 0x40086602
#define FS_IOC32_SETFLAGS 0x40046602
#define FS_IOC_FSSETXATTR 0x401c5820
#define FS_IOC_ENABLE_VERITY 0x40806685

static __always_inline long guard_ioctl(struct file *f, unsigned int cmd)
{
	if (cmd != FS_IOC_SETFLAGS && cmd != FS_IOC32_SETFLAGS && cmd != FS_IOC_FSSETXATTR && cmd != FS_IOC_ENABLE_VERITY)
		return 0;
	return guard_file(f->f_path.dentry);
}

SEC("lsm/file_ioctl")
long BPF_PROG(rw_ioctl, struct file *file, unsigned int cmd) { return guard_ioctl(file, cmd); }

SEC("lsm/file_ioctl_compat")
long BPF_PROG(rw_ioctl_compat, struct file *file, unsigned int cmd) { return guard_ioctl(file, cmd); }

#define MS_REMOUNT 32
#define MS_BIND 4096
#define MS_UNBINDABLE (1 << 17)
#define MS_PRIVATE (1 << 18)
#define MS_SLAVE (1 << 19)
#define MS_SHARED (1 << 20)

SEC("lsm/sb_mount")
long BPF_PROG(rw_mount, const char *device, struct path *path, const char *type, unsigned long flags, void *data)
{
	/* remounting and propagation change a mount, they hide nothing; the kernel looks at the flags in this order */
	bool hides = !(flags & MS_REMOUNT) && (flags & MS_BIND || !(flags & (MS_UNBINDABLE | MS_PRIVATE | MS_SLAVE | MS_SHARED)));
	if (!hides && guard_of(path->dentry->d_inode) == GUARD_PLACE)
		return 0;
	return guard_place(path->dentry);
}

SEC("lsm/move_mount")
long BPF_PROG(rw_move_mount, struct path *from, struct path *to)
{
	long rc = guard_place(from->dentry);
	return rc ? rc : guard_place(to->dentry);
}

/*
 * The end of the system: systemd-shutdown, which process 1 becomes when all
 * services have ended, unmounts in children of its own.
 */
static __always_inline bool is_shutting_down(struct task_struct *t)
{
	struct task_struct *parent = t->real_parent;
	struct mm_struct *mm = t->mm, *its = parent->mm;
	if (parent->tgid != 1 || !mm || !its)
		return false;
	struct file *exe = its->exe_file;
	return exe && (void *)mm->exe_file == (void *)exe && name_is(exe->f_path.dentry, "systemd-shutdown", 16);
}

SEC("lsm/sb_umount")
long BPF_PROG(rw_umount, struct vfsmount *mount, int flags)
{
	if (bpf_get_current_pid_tgid() >> 32 == 1 || is_shutting_down(bpf_get_current_task_btf()))
		return 0;
	return guard_place(mount->mnt_root);
}

/* pivot_root(2) would give the agent another root directory. */
SEC("lsm/sb_pivotroot")
long BPF_PROG(rw_pivotroot, struct path *old, struct path *fresh)
{
	struct steering *c = steering();
	if (!c || !c->protect || bpf_get_current_pid_tgid() >> 32 == 1 || may(R_AGENT))
		return 0;
	if (BPF_CORE_READ(bpf_get_current_task_btf(), nsproxy, mnt_ns, ns.inum) != c->mount_ns)
		return 0;
	return refuse_guard(c, WHY_GUARD_FILE, NULL);
}

#endif
