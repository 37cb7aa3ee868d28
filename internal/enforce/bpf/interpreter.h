/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Interpreters: who is one (decided by content at execve), what code its
 * arguments and standard input hand it, and which files it opens.
 */
#ifndef RINGWALL_INTERPRETER_H
#define RINGWALL_INTERPRETER_H

#define MAX_ARGUMENTS 24
#define SIGKILL 9

enum code_source { FROM_STDIN, FROM_SCRIPT, FROM_INLINE, UNREADABLE };

struct scan {
	__u64 next;      /* user address of the next argument */
	__u64 hash;      /* of the script's name */
	__u32 len;       /* of the script's name with its NUL */
	__u32 left;      /* arguments to go */
	__u32 slot;      /* of the interpreter rule */
	__u32 source;    /* enum code_source */
	bool skip, done, stdin_forced;
};

static __always_inline bool in_set(const __u64 *set, char ch)
{
	__u8 u = ch;
	return u < 128 && (set[u >> 6 & 1] >> (u & 63) & 1);
}

static __always_inline bool long_match(const struct option16 *o, const char *arg)
{
	const __u64 *w = (const void *)arg;
	if (!o->len || o->len > 15 || (w[0] & o->mask[0]) != o->word[0] || (w[1] & o->mask[1]) != o->word[1])
		return false;
	__u64 at = o->len;
	barrier_var(at); /* or the compiler drops the mask that the verifier needs */
	char end = arg[at & 15];
	return end == 0 || end == '=';
}

/* FNV-1a over words: names are compared, not defended; a false match only checks one file more. */
static __always_inline __u64 hash_name(const char *name)
{
	const __u64 *w = (const void *)name;
	__u64 h = 0xcbf29ce484222325;
	for (int i = 0; i < PATH_LEN / 8; i++) {
		h ^= w[i];
		h *= 0x100000001b3;
	}
	return h;
}

/* The rule in force. A slot keeps its interpreter across policies, so that running processes keep theirs. */
static __always_inline __u32 slot_of(const struct steering *c, const struct task *info)
{
	return (c->active & 1) * INTERPRETERS + (info->interpreter & (INTERPRETERS - 1));
}

static __always_inline struct interpreter *rule_of(__u32 slot)
{
	return bpf_map_lookup_elem(&interpreters, &slot);
}

/* One argument; bpf_loop's callback. Returns 1 to stop. */
static long scan_argument(__u64 i, struct scan *s)
{
	struct interpreter *rule = rule_of(s->slot);
	struct scratch *x = bpf_task_storage_get(&scratches, bpf_get_current_task_btf(), 0, 0);
	if (!rule || !x) {
		s->source = UNREADABLE;
		return 1;
	}
	if (!s->left)
		return 1;
	__builtin_memset(x->name, 0, sizeof(x->name));
	long n = bpf_probe_read_user_str(x->name, sizeof(x->name), (void *)s->next);
	if (n <= 0) {
		s->source = UNREADABLE;
		return 1;
	}
	s->next += n;
	if (n == sizeof(x->name)) {
		/* cut: its end is not known here. Only a script's name may be this long, and it ends the scan. */
		s->next -= 1;
		if (i && !s->skip && x->name[0] != '-') {
			s->hash = hash_name(x->name);
			s->len = n;
			s->source = FROM_SCRIPT;
			return 1;
		}
		s->source = UNREADABLE;
		return 1;
	}
	s->left--;
	if (!i) /* argv[0] */
		return 0;
	if (s->skip) {
		s->skip = false;
		return 0;
	}
	const char *a = x->name;
	if (!s->done && (a[0] == '-' || a[0] == '+') && a[1] && !(a[0] == '-' && a[1] == '-')) {
#pragma unroll
		for (int j = 1; j < 12; j++) {
			char ch = a[j];
			if (!ch)
				break;
			if (in_set(rule->inline_flags, ch)) {
				s->source = FROM_INLINE;
				return 1;
			}
			if (in_set(rule->stdin_flags, ch))
				s->stdin_forced = true;
			if (in_set(rule->arg_flags, ch)) {
				s->skip = !a[j + 1];
				break;
			}
		}
		return 0;
	}
	if (!s->done && a[0] == '-' && a[1] == '-') {
		if (!a[2]) {
			s->done = true;
			return 0;
		}
#pragma unroll
		for (int j = 0; j < LONG_OPTIONS; j++) {
			if (long_match(&rule->inline_long[j], a)) {
				s->source = FROM_INLINE;
				return 1;
			}
			if (long_match(&rule->arg_long[j], a)) {
				__u64 at = rule->arg_long[j].len;
				barrier_var(at);
				s->skip = a[at & 15] == 0;
			}
		}
		return 0;
	}
	if (s->stdin_forced || (a[0] == '-' && !a[1]))
		return 1; /* code from stdin; the rest are its arguments */
	s->hash = hash_name(x->name);
	s->len = n;
	s->source = FROM_SCRIPT;
	return 1;
}

/* What file descriptor 0 is, as enum stdin_form; 0 if closed. */
static __always_inline __u8 stdin_form(struct task_struct *t)
{
	struct file **fds = BPF_CORE_READ(t, files, fdt, fd);
	struct file *f = NULL;
	bpf_probe_read_kernel(&f, sizeof(f), fds);
	if (!f)
		return IN_NULL;
	__u32 mode = BPF_CORE_READ(f, f_inode, i_mode), dev = BPF_CORE_READ(f, f_inode, i_rdev);
	switch (mode & S_IFMT) {
	case S_IFIFO:
		return IN_PIPE;
	case S_IFSOCK:
		return IN_SOCKET;
	case S_IFCHR:
		return dev == (1 << 20 | 3) ? IN_NULL : IN_TTY;
	}
	return IN_FILE;
}

static __always_inline void check_source(struct steering *c, struct generation *s, struct task_struct *t, struct task *info,
					 struct linux_binprm *bprm)
{
	__u32 slot = slot_of(c, info);
	struct interpreter *rule = rule_of(slot);
	struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!rule)
		return;
	struct scan scan = { .next = bprm->p, .left = bprm->argc, .slot = slot, .source = FROM_STDIN };
	if (x)
		bpf_loop(MAX_ARGUMENTS, scan_argument, &scan, 0);
	else
		scan.source = UNREADABLE;
	if (scan.left && scan.source == FROM_STDIN && !scan.stdin_forced && bprm->argc > MAX_ARGUMENTS)
		scan.source = UNREADABLE;
	info->script_hash = scan.hash;
	info->script_len = scan.source == FROM_SCRIPT ? scan.len : 0;
	if (info->roles & R_PACKAGES)
		return; /* maintainer scripts use every trick in the book; they are authorised themselves */
	struct report r = { .kind = K_SCRIPT, .interpreter = info->interpreter, .file = bprm->file };
	switch (scan.source) {
	case FROM_SCRIPT:
		return; /* judged when it is opened */
	case FROM_INLINE:
		r.reason = WHY_INLINE;
		r.mode = rule->inline_mode;
		break;
	case FROM_STDIN:
		if (rule->stdin_forms & stdin_form(t))
			return;
		r.reason = WHY_STDIN;
		r.mode = rule->inline_mode ? rule->inline_mode : M_ENFORCE;
		break;
	default:
		r.reason = WHY_ARGUMENTS;
		r.mode = rule->inline_mode;
	}
	if (s->modes[K_SCRIPT] < r.mode)
		r.mode = s->modes[K_SCRIPT];
	if (r.mode == M_OFF)
		return;
	if (x) {
		/* the scan left the argument that decided in name */
		r.detail = x->name;
	}
	/* past the point of no return: an error cannot be given back, a kill before the first instruction can */
	if (refuse(c, s, &r, true))
		bpf_send_signal(SIGKILL);
}

/* The new program is in place and has not run yet: note what it is and may do. */
SEC("lsm.s/bprm_committed_creds")
long BPF_PROG(rw_committed, struct linux_binprm *bprm)
{
	struct steering *c = steering();
	if (!c || !in_scope(c))
		return 0;
	struct generation *s = settings_of(c);
	if (!s)
		return 0;
	struct task_struct *t = bpf_get_current_task_btf();
	struct task *old = task_info(t);
	__u16 kept = old ? old->roles & R_PACKAGES : 0;
	struct found o = {};
	find(c, bprm->file, &o, true);
	if (!old && !o.entry.roles && !o.entry.interpreter)
		return 0;
	struct task *info = bpf_task_storage_get(&tasks, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!info) {
		/* an interpreter that cannot be watched must not run */
		if (o.entry.interpreter && s->modes[K_SCRIPT] == M_ENFORCE)
			bpf_send_signal(SIGKILL);
		return 0;
	}
	info->roles = o.entry.roles | kept;
	info->interpreter = o.entry.interpreter;
	info->script_hash = 0;
	info->script_len = 0;
	if (info->interpreter)
		check_source(c, s, t, info, bprm);
	return 0;
}

/* Children are what their parent is until they execute something else. */
SEC("lsm/task_alloc")
long BPF_PROG(rw_fork, struct task_struct *child, unsigned long flags)
{
	struct task *mine = task_info(bpf_get_current_task_btf());
	if (!mine || !(mine->roles | mine->interpreter))
		return 0;
	struct task *its = bpf_task_storage_get(&tasks, child, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!its)
		return mine->interpreter ? -EPERM : 0;
	*its = *mine;
	return 0;
}

static __always_inline bool has_suffix(const struct interpreter *rule, const struct dentry *d)
{
	__u32 len = d->d_name.len;
#pragma unroll
	for (int i = 0; i < SUFFIXES; i++) {
		const struct suffix8 *x = &rule->suffixes[i];
		__u64 tail = 0;
		__u32 n = x->len;
		if (i >= rule->n_suffixes || !n || n > 7 || n > len)
			continue;
		bpf_probe_read_kernel(&tail, n & 7, d->d_name.name + (len - n));
		if (tail == x->word)
			return true;
	}
	return false;
}

/* The name that the caller gave to open(2), into scratch. Returns its length with the NUL, 0 if unknown. */
static __always_inline long asked_name(struct task_struct *t, struct scratch *x)
{
	__builtin_memset(x->name, 0, sizeof(x->name));
	struct nameidata *nd = t->nameidata;
	const char *name = nd ? BPF_CORE_READ(nd, name, name) : NULL;
	long n = name ? bpf_probe_read_kernel_str(x->name, sizeof(x->name), name) : 0;
	return n > 0 ? n : 0;
}

/* Looks up every directory that the file lies below, and its own path. */
static __always_inline bool is_data(struct scratch *x, struct file *f, __u32 slot)
{
	struct data_path *k = &x->key;
	__builtin_memset(k, 0, sizeof(*k));
	k->generation = slot >= INTERPRETERS;
	k->interpreter = slot & (INTERPRETERS - 1);
	if (bpf_d_path(&f->f_path, x->path, sizeof(x->path)) <= 1)
		return false;
	for (int i = 0; i < DATA_PATH_LEN - 1; i++) {
		char ch = x->path[i];
		if (!ch)
			return bpf_map_lookup_elem(&data_paths, k);
		k->path[i] = ch;
		if (ch == '/' && bpf_map_lookup_elem(&data_paths, k))
			return true;
	}
	return false;
}

/* An interpreter opens a regular file for reading. */
static __always_inline long judge_read(struct steering *c, struct generation *s, struct task_struct *t, struct task *info,
				      struct file *f)
{
	__u32 slot = slot_of(c, info);
	struct interpreter *rule = rule_of(slot);
	struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	__u8 mode = s->modes[K_SCRIPT];
	if (!rule || !x)
		return mode == M_ENFORCE ? -EPERM : 0;
	long n = asked_name(t, x);
	bool named = info->script_len && n == info->script_len && hash_name(x->name) == info->script_hash;
	bool code = named || (rule->reads != READS_ANY && has_suffix(rule, f->f_path.dentry));
	__u16 kinds = BIT(K_SCRIPT);
	if (!code) {
		if (rule->reads != READS_STRICT || info->roles & R_PACKAGES || is_data(x, f, slot))
			return 0;
		kinds = 0xffff; /* anything authorised may be read */
	}
	struct found o = {};
	find(c, f, &o, true);
	if (o.entry.kinds & kinds)
		return 0;
	struct report r = {
		.kind = K_SCRIPT, .mode = mode, .error = o.error, .space = o.space, .digest = o.digest, .file = f,
		.interpreter = info->interpreter, .reason = o.error ? WHY_NO_IDENTITY : WHY_UNLISTED, .detail = x->name,
	};
	return refuse(c, s, &r, true);
}

#endif
