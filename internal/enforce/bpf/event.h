/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef RINGWALL_EVENT_H
#define RINGWALL_EVENT_H

static __always_inline struct steering *steering(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline struct counts *counted(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&counters, &zero);
}

static __always_inline struct generation *settings_of(const struct steering *c)
{
	__u32 g = c->active & 1;
	return bpf_map_lookup_elem(&settings, &g);
}

/* A policy governs the current task: there is one, and the task is in scope. */
static __always_inline bool in_scope(const struct steering *c)
{
	return !c->scope_cgroup || bpf_get_current_ancestor_cgroup_id(c->scope_level) == c->scope_cgroup;
}

/* A break-glass permit turns refusals into audit events until it runs out. */
static __always_inline bool is_relaxed(const struct steering *c)
{
	return c->relaxed && bpf_ktime_get_boot_ns() < c->relaxed_until_ns;
}

struct report {
	__u16 kind, reason;
	__u8 mode, interpreter;
	__s32 error;
	__u32 space;
	const __u8 *digest; /* 32 bytes or NULL */
	struct file *file;  /* for the path; NULL where the hook may not ask for one */
	const char *detail; /* DETAIL_LEN kernel bytes or NULL */
};

/*
 * Raises an event and returns what the hook must return. The verdict is in
 * hand before space for the event is asked for: a full buffer loses an event,
 * counted, never a refusal.
 */
static __always_inline long refuse(struct steering *c, struct generation *s, struct report *r, bool can_path)
{
	struct counts *n = counted();
	bool deny = r->mode == M_ENFORCE && !is_relaxed(c);
	long rc = 0; /* 64 bits: the verifier follows no narrower spill */
	if (deny) {
		rc = -EPERM;
		barrier_var(rc); /* the verifier wants to see the constant, not arithmetic on deny */
	}
	if (!n)
		return rc;
	__sync_fetch_and_add(deny ? &n->denied : &n->audited, 1);
	__u64 seq = __sync_fetch_and_add(&n->seq, 1);
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&n->drops, 1);
		return rc;
	}
	__u64 ids = bpf_get_current_pid_tgid(), owner = bpf_get_current_uid_gid();
	e->seq = seq + 1;
	e->time_ns = bpf_ktime_get_boot_ns();
	e->cgroup = bpf_get_current_cgroup_id();
	e->epoch = s->epoch;
	e->pid = (__u32)ids;
	e->tgid = ids >> 32;
	e->uid = (__u32)owner;
	e->gid = owner >> 32;
	e->error = r->error;
	e->space = r->space;
	e->kind = r->kind;
	e->reason = r->reason;
	e->mode = deny ? M_ENFORCE : M_AUDIT;
	e->interpreter = r->interpreter;
	e->pad[0] = e->pad[1] = 0;
	e->inode = 0;
	e->device = 0;
	e->path[0] = 0;
	e->detail[0] = 0;
	if (r->digest)
		__builtin_memcpy(e->digest, r->digest, 32);
	else
		__builtin_memset(e->digest, 0, 32);
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	struct task_struct *t = bpf_get_current_task_btf();
#pragma unroll
	for (int i = 0; i < ANCESTORS; i++) {
		t = t->real_parent;
		e->ancestors[i].tgid = t->tgid;
		bpf_probe_read_kernel_str(e->ancestors[i].comm, 16, t->comm);
	}
	if (r->file) {
		e->inode = r->file->f_inode->i_ino;
		e->device = r->file->f_inode->i_sb->s_dev;
		if (can_path)
			bpf_d_path(&r->file->f_path, e->path, sizeof(e->path));
		else {
			struct dentry *d = r->file->f_path.dentry;
			bpf_probe_read_kernel_str(e->path, sizeof(e->path), d->d_name.name);
		}
	}
	if (r->detail)
		bpf_probe_read_kernel_str(e->detail, sizeof(e->detail), r->detail);
	bpf_ringbuf_submit(e, 0);
	return rc;
}

/* A refusal that is not about a file's content. */
static __always_inline long refuse_act(struct steering *c, struct generation *s, __u8 mode, __u16 reason, const char *detail)
{
	struct report r = { .mode = mode, .reason = reason, .detail = detail };
	return refuse(c, s, &r, false);
}

#endif
