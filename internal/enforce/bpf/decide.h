/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef RINGWALL_DECIDE_H
#define RINGWALL_DECIDE_H

/* What a file turned out to be. */
struct found {
	struct entry entry; /* zero: not listed */
	__u8 digest[32];
	__u32 space;
	__s32 error; /* 0, or why there is no digest */
};

static __always_inline struct entry *look_up(const struct steering *c, struct key *k)
{
	__u32 g = c->active & 1;
	void *table = bpf_map_lookup_elem(&tables, &g);
	return table ? bpf_map_lookup_elem(table, k) : NULL;
}

/*
 * Identities in order of strength: the dm-verity volume it lies on, its
 * fs-verity digest, its content's SHA-256. Each is a look-up of its own: an
 * unknown volume does not spoil a known digest.
 */
static __always_inline void find(const struct steering *c, struct file *f, struct found *o, bool may_hash)
{
	struct key k = {};
	struct entry *e;
	__u32 device = f->f_inode->i_sb->s_dev;
	struct key *root = bpf_map_lookup_elem(&verity_devices, &device);
	if (root) {
		__builtin_memcpy(&k, root, sizeof(k));
		e = look_up(c, &k);
		if (e)
			goto hit;
	}
	if (may_hash && fsverity_digest(f, k.digest)) {
		k.space = S_FSVERITY;
		e = look_up(c, &k);
		if (e)
			goto hit;
	}
	k.space = S_SHA256;
	__builtin_memset(k.digest, 0, 32);
	o->error = identify(c, f, k.digest, may_hash);
	if (o->error) {
		__builtin_memset(o->digest, 0, 32);
		return;
	}
	e = look_up(c, &k);
	if (!e) {
		__builtin_memcpy(o->digest, k.digest, 32);
		return;
	}
hit:
	o->entry = *e;
	o->space = k.space;
	o->error = 0;
	__builtin_memcpy(o->digest, k.digest, 32);
}

/* Judges a file for one kind. kinds: the set of kinds that will do. */
static __always_inline long judge(struct steering *c, struct generation *s, struct file *f, __u16 kind, __u16 kinds,
				 struct found *o, bool may_hash, bool can_path, const char *detail)
{
	__u8 mode = s->modes[kind & 7];
	if (mode == M_OFF)
		return 0;
	find(c, f, o, may_hash);
	if (o->entry.kinds & kinds)
		return 0;
	struct report r = {
		.kind = kind, .mode = mode, .error = o->error, .space = o->space, .file = f, .digest = o->digest,
		.reason = o->error ? WHY_NO_IDENTITY : WHY_UNLISTED, .detail = detail,
	};
	return refuse(c, s, &r, can_path);
}

/* ---- who asks ---- */

static __always_inline struct task *task_info(struct task_struct *t)
{
	struct task *i = bpf_task_storage_get(&tasks, t, 0, 0);
	if (i)
		return i;
	__u32 tgid = t->tgid;
	struct adoption *a = bpf_map_lookup_elem(&adopted, &tgid);
	return a && a->start == t->group_leader->start_boottime / TICK_NS ? &a->task : NULL;
}

static __always_inline bool may(__u16 role)
{
	struct task *i = task_info(bpf_get_current_task_btf());
	return i && (i->roles & role);
}

#endif
