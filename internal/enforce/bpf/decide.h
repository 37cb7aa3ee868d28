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

static __always_inline struct entry *look_up(const struct generation *s, struct key *k)
{
	__u32 g = s->index & 1;
	void *table = bpf_map_lookup_elem(&tables, &g);
	return table ? bpf_map_lookup_elem(table, k) : NULL;
}

static __always_inline void take(struct found *o, const struct entry *e, const struct key *k)
{
	o->entry = *e;
	o->space = k->space;
	__builtin_memcpy(o->digest, k->digest, 32);
}

/*
 * Identities in order of strength: the dm-verity volume it lies on, its
 * fs-verity digest, its content's SHA-256. Each is a look-up of its own: an
 * unknown volume does not spoil a known digest. The content is hashed on a
 * trusted volume, too: its entry tells who is an interpreter and which roles
 * it has, and content that is banned is banned there. Where it cannot be
 * hashed a policy with bans fails closed.
 */
static __always_inline void find(const struct steering *c, const struct generation *s, struct file *f, struct found *o,
				 bool may_hash)
{
	struct key k = {}, content = { .space = S_SHA256 };
	struct entry *strong = NULL, *e = NULL;
	__u32 device = f->f_inode->i_sb->s_dev;
	struct key *root = bpf_map_lookup_elem(&verity_devices, &device);
	if (root) {
		__builtin_memcpy(&k, root, sizeof(k));
		strong = look_up(s, &k);
	}
	if (!strong && may_hash && fsverity_digest(f, k.digest)) {
		k.space = S_FSVERITY;
		strong = look_up(s, &k);
	}
	o->error = identify(c, f, content.digest, may_hash, strong);
	if (o->error) {
		if (!strong || s->bans)
			return;
		o->error = 0;
	} else {
		e = look_up(s, &content);
	}
	if (strong && (!e || e->kinds)) {
		take(o, strong, &k);
		if (e) {
			o->entry.kinds |= e->kinds;
			o->entry.roles |= e->roles;
			if (e->interpreter)
				o->entry.interpreter = e->interpreter;
		}
	} else if (e) {
		take(o, e, &content);
	} else {
		__builtin_memcpy(o->digest, content.digest, 32);
	}
}

/* Judges a file for one kind. kinds: the set of kinds that will do. */
static __always_inline long judge(struct steering *c, struct generation *s, struct file *f, __u16 kind, __u16 kinds,
				 struct found *o, bool may_hash, bool can_path, const char *detail)
{
	__u8 mode = s->modes[kind & 7];
	if (mode == M_OFF)
		return 0;
	find(c, s, f, o, may_hash);
	if (o->entry.kinds & kinds)
		return 0;
	struct report r = {
		.kind = kind, .mode = mode, .error = o->error, .space = o->space, .file = f, .digest = o->digest,
		.reason = o->error ? WHY_NO_IDENTITY : WHY_UNLISTED, .detail = detail,
	};
	return refuse(c, s, &r, can_path);
}

static __always_inline bool name_is(const struct dentry *d, const char *want, __u32 len)
{
	char name[32] = {};
	if (d->d_name.len != len || len > 31)
		return false;
	bpf_probe_read_kernel(name, len & 31, d->d_name.name);
	for (__u32 i = 0; i < len; i++)
		if (name[i] != want[i])
			return false;
	return true;
}

/* The rule in force. A slot keeps its interpreter across policies, so that running processes keep theirs. */
static __always_inline __u32 slot_of(const struct generation *s, const struct task *info)
{
	return (s->index & 1) * INTERPRETERS + (info->interpreter & (INTERPRETERS - 1));
}

static __always_inline struct interpreter *rule_of(__u32 slot)
{
	return bpf_map_lookup_elem(&interpreters, &slot);
}

/* ---- who asks ---- */

static __always_inline struct task *task_info(struct task_struct *t)
{
	if (!bpf_core_field_exists(t->bpf_storage) || t->bpf_storage) { /* spares nearly every open the look-up */
		struct task *i = bpf_task_storage_get(&tasks, t, 0, 0);
		if (i)
			return i;
	}
	struct steering *c = steering();
	__u64 start = t->group_leader->start_boottime;
	if (!c || start >= c->adopted_until_ns) /* and the second one */
		return NULL;
	__u32 tgid = t->tgid;
	struct adoption *a = bpf_map_lookup_elem(&adopted, &tgid);
	return a && a->start == start / TICK_NS ? &a->task : NULL;
}

static __always_inline bool may(__u16 role)
{
	struct task *i = task_info(bpf_get_current_task_btf());
	return i && (i->roles & role);
}

#endif
