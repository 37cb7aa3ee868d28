/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Opening files; other processes; and Ringwall itself against everybody, root included. */
#ifndef RINGWALL_GUARD_H
#define RINGWALL_GUARD_H

static __always_inline bool name_is(const struct dentry *d, const char *want, __u32 len)
{
	char name[16] = {};
	if (d->d_name.len != len || len > 15)
		return false;
	bpf_probe_read_kernel(name, len & 15, d->d_name.name);
	for (__u32 i = 0; i < len; i++)
		if (name[i] != want[i])
			return false;
	return true;
}

static __always_inline bool is_guarded(const struct inode *in)
{
	struct guarded k = { .inode = in->i_ino, .device = in->i_sb->s_dev };
	return bpf_map_lookup_elem(&guarded_inodes, &k);
}

/* The guards hold for everyone but the agent, in scope or not. */
static __always_inline bool guarding(const struct steering *c)
{
	return c->protect && !may(R_AGENT);
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

static __always_inline long judge_write(struct steering *c, struct generation *s, struct file *f)
{
	struct inode *in = f->f_inode;
	struct report r = { .file = f };
	__u16 type = in->i_mode & S_IFMT;
	if (type == S_IFREG && in->i_sb->s_magic == PROC_MAGIC) {
		if (c->protect && name_is(f->f_path.dentry, "ftrace_enabled", 14))
			return refuse_guard(c, WHY_GUARD_SYSCTL, NULL);
		if (s->ptrace == M_OFF || !name_is(f->f_path.dentry, "mem", 3) || may(R_DEBUG))
			return 0;
		r.mode = s->ptrace;
		r.reason = WHY_PROC_MEM;
	} else if (type == S_IFBLK || type == S_IFCHR) {
		if (s->block_writes == M_OFF || (type == S_IFCHR ? !is_raw_memory(in) : !is_claimed_disk(f)) || may(R_BLOCK))
			return 0;
		r.mode = s->block_writes;
		r.reason = WHY_BLOCK_WRITE;
	} else {
		struct writes *w = bpf_inode_storage_get(&inode_writes, in, 0, 0);
		if (!w || !w->mapped || s->code_writes == M_OFF)
			return 0;
		struct found o = {};
		struct version v = {};
		version_of(in, &v);
		/* only what is still authorised is worth keeping as it is */
		struct key k = {};
		if (!cached(in, &v, k.digest) || !look_up(c, &k))
			return 0;
		r.mode = s->code_writes;
		r.reason = WHY_CODE_WRITE;
		r.kind = K_LIBRARY;
		__builtin_memcpy(o.digest, k.digest, 32);
		r.digest = o.digest;
		return refuse(c, s, &r, true) ? -ETXTBSY : 0;
	}
	return refuse(c, s, &r, true);
}

/* Every open. Most files are not code and most tasks no interpreters: two failed look-ups. */
SEC("lsm.s/file_open")
long BPF_PROG(rw_open, struct file *file)
{
	bool writes = file->f_mode & FMODE_WRITE;
	struct task_struct *t = bpf_get_current_task_btf();
	struct task *info = task_info(t);
	bool reads = info && info->interpreter && (file->f_mode & FMODE_READ) && !(file->f_flags & FMODE_EXEC_FLAG) &&
		     (file->f_inode->i_mode & S_IFMT) == S_IFREG;
	if (!writes && !reads)
		return 0;
	struct steering *c = steering();
	if (!c)
		return 0;
	if (writes && c->protect && is_guarded(file->f_inode) && !may(R_AGENT))
		return refuse_guard(c, WHY_GUARD_FILE, NULL);
	long rc = 0;
	struct generation *s = settings_of(c);
	if (s && in_scope(c)) {
		if (writes)
			rc = judge_write(c, s, file);
		if (!rc && reads && s->modes[K_SCRIPT] != M_OFF)
			rc = judge_read(c, s, t, info, file);
	}
	if (writes && !rc) {
		struct writes *w = bpf_inode_storage_get(&inode_writes, file->f_inode, 0, 0);
		if (w)
			__sync_fetch_and_add(&w->count, 1);
	}
	return rc;
}

SEC("lsm/path_truncate")
long BPF_PROG(rw_truncate, struct path *path)
{
	struct inode *in = path->dentry->d_inode;
	struct steering *c = steering();
	if (c && c->protect && is_guarded(in) && !may(R_AGENT))
		return refuse_guard(c, WHY_GUARD_FILE, NULL);
	struct writes *w = bpf_inode_storage_get(&inode_writes, in, 0, 0);
	if (!w)
		return 0;
	struct generation *s = c ? settings_of(c) : NULL;
	if (s && w->mapped && s->code_writes != M_OFF && in_scope(c)) {
		struct version v = {};
		struct key k = {};
		version_of(in, &v);
		if (cached(in, &v, k.digest) && look_up(c, &k)) {
			struct report r = { .kind = K_LIBRARY, .mode = s->code_writes, .reason = WHY_CODE_WRITE, .digest = k.digest };
			if (refuse(c, s, &r, false))
				return -ETXTBSY;
		}
	}
	__sync_fetch_and_add(&w->count, 1);
	return 0;
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
	if (guarding(c) && is_agent(child))
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
	if (!c || !(mode & FMODE_WRITE) || !guarding(c) || !bpf_map_lookup_elem(&own_maps, &id))
		return 0;
	return refuse_guard(c, WHY_GUARD_BPF, NULL);
}

static __always_inline long guard_place(const struct inode *dir)
{
	struct steering *c = steering();
	if (!c || !c->protect)
		return 0;
	if (dir->i_sb->s_dev != c->pin_device && !is_guarded(dir))
		return 0;
	return may(R_AGENT) ? 0 : refuse_guard(c, WHY_GUARD_FILE, NULL);
}

SEC("lsm/inode_unlink")
long BPF_PROG(rw_unlink, struct inode *dir, struct dentry *dentry) { return guard_place(dir); }

SEC("lsm/inode_rmdir")
long BPF_PROG(rw_rmdir, struct inode *dir, struct dentry *dentry)
{
	long rc = guard_place(dir);
	return rc ? rc : guard_place(dentry->d_inode);
}

SEC("lsm/inode_create")
long BPF_PROG(rw_create, struct inode *dir, struct dentry *dentry, unsigned int mode) { return guard_place(dir); }

SEC("lsm/inode_link")
long BPF_PROG(rw_link, struct dentry *old, struct inode *dir, struct dentry *fresh) { return guard_place(dir); }

SEC("lsm/inode_rename")
long BPF_PROG(rw_rename, struct inode *old_dir, struct dentry *old, struct inode *new_dir, struct dentry *fresh)
{
	long rc = guard_place(old_dir);
	if (!rc)
		rc = guard_place(new_dir);
	return rc ? rc : guard_place(old->d_inode);
}

SEC("lsm/sb_mount")
long BPF_PROG(rw_mount, const char *device, struct path *path, const char *type, unsigned long flags, void *data)
{
	return guard_place(path->dentry->d_inode);
}

SEC("lsm/move_mount")
long BPF_PROG(rw_move_mount, struct path *from, struct path *to)
{
	long rc = guard_place(from->dentry->d_inode);
	return rc ? rc : guard_place(to->dentry->d_inode);
}

SEC("lsm/sb_umount")
long BPF_PROG(rw_umount, struct vfsmount *mount, int flags)
{
	struct steering *c = steering();
	if (!c || !c->protect || mount->mnt_sb->s_dev != c->pin_device || may(R_AGENT))
		return 0;
	return refuse_guard(c, WHY_GUARD_FILE, NULL);
}

#endif
