/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Interpreters: who is one (decided by content at execve), what code its
 * arguments and standard input hand it, and which files it opens.
 */
#ifndef RINGWALL_INTERPRETER_H
#define RINGWALL_INTERPRETER_H

#define MAX_ARGUMENTS 24
#define MAX_LETTERS 12 /* of a cluster of short options */
#define MAX_STRINGS 2048 /* arguments and variables that are looked through for variables that carry code */

#define AGENT_WORD 0x746e656761 /* "agent", little-endian */

static __always_inline bool in_set(const __u64 *set, char ch)
{
	__u8 u = ch;
	return u < 128 && (set[u >> 6 & 1] >> (u & 63) & 1);
}

/* Bytes of a long option before its '=' or end, at most 16. */
static __always_inline __u64 option_length(const char *arg)
{
	__u64 n = 0;
#pragma unroll
	for (int i = 0; i < 16; i++) {
		if (!arg[i] || arg[i] == '=')
			break;
		n++;
	}
	return n;
}

/* arg is the option, or, as getopt_long(3) has it, the beginning of it. */
static __always_inline bool begins(const struct option16 *o, const char *arg, __u64 n)
{
	const __u64 *w = (const void *)arg;
	if (n < 3 || n > o->len)
		return false;
	__u64 low = n >= 8 ? ~0ULL : (1ULL << n * 8) - 1, high = n > 8 ? (1ULL << (n - 8) * 8) - 1 : 0;
	return !((w[0] ^ o->word[0]) & low) && !((w[1] ^ o->word[1]) & high);
}

/*
 * Names are hashed by words, from a zeroed buffer, without a branch: a loop
 * over bytes would cost the verifier one path for each length. They are
 * compared, not defended: a false match only checks one file more.
 */
static __always_inline __u64 hash_name(const char *name)
{
	const __u64 *w = (const void *)name;
	__u64 h = 0xcbf29ce484222325; /* FNV-1a */
#pragma nounroll
	for (int i = 0; i < PATH_LEN / 8; i++)
		h = (h ^ w[i]) * 0x100000001b3;
	return h;
}

#define EACH_BYTE 0x0101010101010101ULL

/* Offset of what follows the last slash in a zeroed buffer; 0 without a slash. */
static __always_inline __u32 tail_of(const char *name)
{
	const __u64 *w = (const void *)name;
	__u64 found = 0, at = 0;
#pragma nounroll
	for (int i = 0; i < PATH_LEN / 8; i++) {
		__u64 v = w[i] ^ ('/' * EACH_BYTE);
		/* 0x80 in each byte that was a slash */
		__u64 here = ~(((v & 0x7f * EACH_BYTE) + 0x7f * EACH_BYTE) | v | 0x7f * EACH_BYTE);
		__u64 any = -((here | -here) >> 63);
		barrier_var(any); /* arithmetic, not a branch */
		found = (here & any) | (found & ~any);
		at = (i * 8 & any) | (at & ~any);
	}
	if (!found)
		return 0;
	if (found >> 32) {
		found >>= 32;
		at += 4;
	}
	if (found >> 16) {
		found >>= 16;
		at += 2;
	}
	if (found >> 8)
		at += 1;
	return at + 1;
}

/*
 * The functions that are not static are verified once and by themselves, and
 * not again for each path that leads to them: hence their tests for NULL.
 */

/*
 * The argument at address, from its byte `from` on, is the script's name, or
 * stands in its place. Returns 1 to stop.
 */
__attribute__((noinline)) long names_script(struct scratch *x, __u64 address, __u32 source, __u32 from)
{
	if (!x)
		return 1;
	struct scan *s = &x->scan;
	__u32 at = tail_of(x->name);
	if (at < from)
		at = from;
	__builtin_memset(x->path, 0, sizeof(x->path));
	long n = bpf_probe_read_user_str(x->path, sizeof(x->path), (void *)(address + at));
	s->hash = hash_name(x->path);
	s->len = n > 0 ? n - 1 : 0;
	s->source = n > 0 ? source : UNREADABLE;
	return 1;
}

/* A script was named by an option. With a second one, which of them is opened as what is not followed any more. */
static __always_inline long named_by_option(struct scratch *x, struct interpreter *rule, __u64 address, __u32 from)
{
	if (x->scan.len) {
		x->scan.source = FROM_INLINE;
		return 1;
	}
	bool input = x->name[from & 15] == '-' && !x->name[(from + 1) & 15];
	names_script(x, address, input ? FROM_STDIN : FROM_SCRIPT, from);
	return rule->word == WORD_SCRIPT;
}

/* A cluster of short options, like -xc. Returns 1 to stop. */
__attribute__((noinline)) long scan_letters(struct scratch *x, struct interpreter *rule, __u64 address)
{
	if (!rule || !x)
		return 1;
	struct scan *s = &x->scan;
	const char *a = x->name;
#pragma unroll
	for (int j = 1; j <= MAX_LETTERS; j++) {
		char ch = a[j];
		if (!ch)
			return 0;
		if (in_set(rule->inline_flags, ch)) {
			s->source = FROM_INLINE;
			return 1;
		}
		if (ch == '-' && rule->shell)
			s->doubt = true; /* bash -init-file FILE */
		if (in_set(rule->stdin_flags, ch))
			s->stdin_forced = true;
		if (in_set(rule->script_flags, ch)) {
			s->script = !a[j + 1];
			return s->script ? 0 : named_by_option(x, rule, address, j + 1);
		}
		if (in_set(rule->arg_flags, ch)) {
			/* getopt: the rest is the argument. A shell: the next argument is, and the letters go on. */
			s->skip = rule->shell || !a[j + 1];
			if (!rule->shell)
				return 0;
		}
	}
	if (!(rule->inline_flags[0] | rule->inline_flags[1]))
		return 0;
	s->source = FROM_INLINE; /* what the rest says is not known: fail closed */
	return 1;
}

/* A long option. Returns 1 to stop. */
__attribute__((noinline)) long scan_long(struct scratch *x, struct interpreter *rule)
{
	if (!rule || !x)
		return 1;
	struct scan *s = &x->scan;
	const char *a = x->name;
	__u64 n = option_length(a);
	s->doubt = n > 15 || !a[n & 15];
#pragma unroll
	for (int j = 0; j < LONG_OPTIONS; j++) {
		if (begins(&rule->inline_long[j], a, n)) {
			s->source = FROM_INLINE;
			return 1;
		}
		/* in full only: to take a script for an option's argument would leave it unchecked */
		if (n == rule->arg_long[j].len && begins(&rule->arg_long[j], a, n)) {
			/* of one that is cut: it has a value of its own if there is a '=' further on; take it that there is none */
			__u64 at = n;
			barrier_var(at);
			s->skip = n > 15 || a[at & 15] == 0;
			s->doubt = n > 15;
		}
	}
	return 0;
}

/*
 * An argument that is no option. After an option that is not known to take an
 * argument or not, it may be that option's, and inline code may follow it.
 */
static __always_inline long scan_word(struct scratch *x, struct interpreter *rule, __u64 address)
{
	struct scan *s = &x->scan;
	if (rule->word == WORD_OTHER)
		return 0;
	if (rule->word == WORD_CODE) {
		if (!s->len)
			s->source = FROM_INLINE;
		return 1;
	}
	const char *a = x->name;
	names_script(x, address, a[0] == '-' && !a[1] && !rule->shell ? FROM_STDIN : FROM_SCRIPT, 0);
	s->candidate = s->doubt && !s->done;
	return !s->candidate;
}

/*
 * One argument; bpf_loop's callback. Returns 1 to stop. What it keeps from one
 * to the next is in a map: of the caller's stack, kernels before 6.7 believe
 * that it is as it was before the first, and drop code that it would reach later.
 */
static long scan_argument(__u64 i, void *none)
{
	struct scratch *x = bpf_task_storage_get(&scratches, bpf_get_current_task_btf(), 0, 0);
	if (!x)
		return 1; /* UNREADABLE, see check_source */
	struct scan *s = &x->scan;
	struct interpreter *rule = rule_of(s->slot);
	if (!rule) {
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
	__u64 address = s->next;
	s->next += n;
	bool cut = n == sizeof(x->name), skip = s->skip || s->more;
	if (cut) {
		/* its end is not known here: only what does not matter may be this long */
		s->next -= 1;
		if (i && !skip) {
			s->source = UNREADABLE;
			return 1;
		}
		s->more = true;
		return 0;
	}
	s->left--;
	s->more = false;
	if (!i) /* argv[0] */
		return 0;
	if (skip) {
		s->skip = false;
		return 0;
	}
	const char *a = x->name;
	long stop = 0;
	if (s->script) {
		s->script = false;
		stop = named_by_option(x, rule, address, 0);
	} else if (s->done || (a[0] != '-' && (a[0] != '+' || !rule->shell || !a[1]))) {
		stop = s->stdin_forced || s->candidate || scan_word(x, rule, address);
	} else if (a[0] == '-' && !a[1]) {
		if (!rule->shell || s->stdin_forced)
			stop = s->len || names_script(x, address, FROM_STDIN, 0);
		s->done = true; /* a shell takes it for "--" */
	} else if (a[0] == '-' && a[1] == '-' && !a[2]) {
		s->done = true;
	} else if (a[0] == '-' && a[1] == '-') {
		stop = scan_long(x, rule);
	} else {
		stop = scan_letters(x, rule, address);
	}
	barrier_var(stop);
	return stop ? 1 : 0; /* in so many words, for the verifier */
}

/*
 * One string of arguments or environment, from where scan_argument stopped;
 * bpf_loop's callback. Stops at a variable that carries code.
 */
static long scan_variable(__u64 i, void *none)
{
	struct scratch *x = bpf_task_storage_get(&scratches, bpf_get_current_task_btf(), 0, 0);
	if (!x)
		return 1;
	struct scan *s = &x->scan;
	struct interpreter *rule = rule_of(s->slot);
	if (!rule || !(s->left + s->variables))
		return 1;
	__u64 *w = (void *)x->name;
	w[0] = w[1] = 0;
	long n = bpf_probe_read_user_str(x->name, sizeof(x->name), (void *)s->next);
	if (n <= 0) {
		s->source = UNREADABLE;
		return 1;
	}
	bool begin = !s->more;
	s->more = n == sizeof(x->name);
	s->next += s->more ? n - 1 : n;
	if (s->left) {
		s->left -= !s->more;
		return 0;
	}
	s->variables -= !s->more;
	if (!begin)
		return 0;
	for (int j = 0; j < LONG_OPTIONS; j++) {
		const struct option16 *o = &rule->environment[j];
		if (o->len && !((w[0] ^ o->word[0]) & o->mask[0]) && !((w[1] ^ o->word[1]) & o->mask[1])) {
			s->source = FROM_INLINE;
			return 1;
		}
	}
	return 0;
}

static __always_inline __u8 form_of(__u32 mode, __u32 device)
{
	switch (mode & S_IFMT) {
	case S_IFIFO:
		return IN_PIPE;
	case S_IFSOCK:
		return IN_SOCKET;
	case S_IFCHR:
		return device == (1 << 20 | 3) ? IN_NULL : IN_TTY;
	case S_IFBLK:
		return 0; /* never acceptable */
	}
	return IN_FILE;
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
	return form_of(mode, dev);
}

/* How refused standard input is dealt with. */
static __always_inline __u8 stdin_mode(const struct generation *s, const struct interpreter *rule)
{
	__u8 mode = rule->inline_mode ? rule->inline_mode : M_ENFORCE;
	return s->modes[K_SCRIPT] < mode ? s->modes[K_SCRIPT] : mode;
}

static __always_inline void check_source(struct steering *c, struct generation *s, struct task_struct *t, struct task *info,
					 struct linux_binprm *bprm)
{
	__u32 slot = slot_of(s, info);
	struct interpreter *rule = rule_of(slot);
	struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!rule)
		return;
	__u32 source = UNREADABLE;
	if (x) {
		struct scan *n = &x->scan;
		__builtin_memset(n, 0, sizeof(*n));
		n->next = bprm->p;
		n->left = bprm->argc;
		n->slot = slot;
		bpf_loop(MAX_ARGUMENTS, scan_argument, NULL, 0);
		source = n->source;
		if (source == FROM_STDIN && n->left && !n->stdin_forced && !n->len)
			source = UNREADABLE; /* more arguments than are looked at */
		info->script_hash = n->hash;
		info->script_len = n->len;
		if (rule->n_environment && rule->inline_mode && (source == FROM_SCRIPT || source == FROM_STDIN)) {
			n->variables = bprm->envc;
			n->more = false;
			bpf_loop(MAX_STRINGS, scan_variable, NULL, 0);
			if (n->source == FROM_INLINE || n->source == UNREADABLE)
				source = n->source;
			else if (n->left + n->variables)
				source = UNREADABLE;
		}
		if (source == FROM_STDIN && rule->word == WORD_OTHER && !n->len)
			source = FROM_SCRIPT;
	}
	struct report r = { .kind = K_SCRIPT, .interpreter = info->interpreter, .file = bprm->file };
	__u8 form;
	switch (source) {
	case FROM_SCRIPT:
		return; /* judged when it is opened */
	case FROM_INLINE:
		r.reason = WHY_INLINE;
		r.mode = rule->inline_mode;
		break;
	case FROM_STDIN:
		form = stdin_form(t);
		r.reason = WHY_STDIN;
		r.mode = stdin_mode(s, rule);
		if (rule->stdin_forms & form) {
			/* what is typed cannot be judged: where inline code is refused, it is told who types */
			if (form == IN_NULL || rule->inline_mode != M_ENFORCE)
				return;
			r.mode = M_AUDIT;
		}
		break;
	default:
		r.reason = WHY_ARGUMENTS;
		r.mode = rule->inline_mode;
	}
	if (s->modes[K_SCRIPT] < r.mode)
		r.mode = s->modes[K_SCRIPT];
	if (info->roles & R_PACKAGES) {
		/* maintainer scripts use every trick in the book; they are authorised themselves */
		if (rule->inline_mode != M_ENFORCE || r.mode == M_OFF)
			return;
		r.mode = M_AUDIT;
	}
	if (r.mode == M_OFF)
		return;
	if (x) {
		/* the scan left what decided in name; after -c the code says more than the option */
		if (source == FROM_INLINE && x->scan.left && x->name[0] == '-' && x->name[1] != '-')
			bpf_probe_read_user_str(x->name, sizeof(x->name), (void *)x->scan.next);
		r.detail = x->name;
	}
	/* past the point of no return: an error cannot be given back, a kill before the first instruction can */
	if (refuse(c, s, &r, true))
		bpf_send_signal(SIGKILL);
}

/*
 * argv[1] is exactly "agent": the other uses of the same program get no
 * privilege. argv[0] is read in parts, into the stack: this runs at nearly
 * every execve, and storage of a task's own costs thousands of instructions.
 */
static __always_inline bool runs_agent(struct linux_binprm *bprm)
{
	char part[64];
	__u64 next = bprm->p, word = 0;
	if (bprm->argc < 2)
		return false;
#pragma unroll
	for (int i = 0; i < 4; i++) {
		long n = bpf_probe_read_user_str(part, sizeof(part), (void *)next);
		if (n <= 0)
			return false;
		next += n;
		if (n < (long)sizeof(part))
			return bpf_probe_read_user_str(&word, sizeof(word), (void *)next) == 6 && word == AGENT_WORD;
		next--; /* cut, or its end is the next part */
	}
	return false;
}

/*
 * The agent sees the same files as process 1 and nobody traces it. Otherwise a
 * root user could show it other state and trust: in a chroot, a container, or
 * a debugger.
 */
static __always_inline bool sees_true_system(struct task_struct *t)
{
	struct task_struct *init = BPF_CORE_READ(t, nsproxy, pid_ns_for_children, child_reaper);
	return !t->ptrace && !BPF_CORE_READ(t, nsproxy, pid_ns_for_children, level) &&
	       BPF_CORE_READ(t, nsproxy, mnt_ns) == BPF_CORE_READ(init, nsproxy, mnt_ns) &&
	       BPF_CORE_READ(t, fs, root.dentry) == BPF_CORE_READ(init, fs, root.dentry) &&
	       BPF_CORE_READ(t, fs, root.mnt) == BPF_CORE_READ(init, fs, root.mnt);
}

/* Neither inlined nor asked of every program: most have no such role. */
static __attribute__((noinline)) bool starts_agent(struct linux_binprm *bprm, struct task_struct *t)
{
	return runs_agent(bprm) && sees_true_system(t);
}

/* The new program is in place and has not run yet: note what it is and may do. */
SEC("lsm.s/bprm_committed_creds")
long BPF_PROG(rw_committed, struct linux_binprm *bprm)
{
	struct steering *c = steering();
	struct generation *s = c ? settings_of(c) : NULL;
	if (!s)
		return 0;
	struct task_struct *t = bpf_get_current_task_btf();
	struct task *old = task_info(t);
	bool scoped = in_scope(c);
	/* out of scope there is one role: the guards hold there too, and so must the agent's way past them */
	if (!scoped && !old && !(c->protect && starts_agent(bprm, t)))
		return 0;
	__u16 kept = old ? old->roles & R_PACKAGES : 0;
	struct found o = {};
	find(c, s, bprm->file, &o, true);
	__u16 roles = o.entry.roles;
	__u8 interpreter = o.entry.interpreter;
	if (roles & R_AGENT && !((!scoped || c->protect) && starts_agent(bprm, t)))
		roles &= ~R_AGENT;
	if ((__u32)bpf_get_current_uid_gid())
		roles &= ~R_PACKAGES; /* what it starts for a user is the user's */
	if (!scoped) {
		roles &= R_AGENT;
		interpreter = 0;
	}
	if (!old && !roles && !interpreter)
		return 0;
	struct task *info = bpf_task_storage_get(&tasks, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!info) {
		/* an interpreter that cannot be watched must not run */
		if (interpreter && s->modes[K_SCRIPT] == M_ENFORCE)
			bpf_send_signal(SIGKILL);
		return 0;
	}
	info->roles = roles | kept;
	info->interpreter = interpreter;
	info->script_hash = 0;
	info->script_len = 0;
	if (interpreter)
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

enum suffix { NO_SUFFIX, CODE_SUFFIX, BYTECODE_SUFFIX };

static __always_inline enum suffix suffix_of(const struct interpreter *rule, const struct dentry *d)
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
			return x->bytecode ? BYTECODE_SUFFIX : CODE_SUFFIX;
	}
	return NO_SUFFIX;
}

/* The name that the caller gave to open(2), also into scratch. n is its length with the NUL, 0 if unknown. */
static __always_inline const char *asked_name(struct task_struct *t, struct scratch *x, long *n)
{
	struct nameidata *nd = t->nameidata;
	const char *name = nd ? BPF_CORE_READ(nd, name, name) : NULL;
	x->name[0] = 0;
	*n = name ? bpf_probe_read_kernel_str(x->name, sizeof(x->name), name) : 0;
	return name;
}

struct prefix { struct scratch *x; bool found; };

/* One more byte of the path into the key; bpf_loop's callback. Returns 1 to stop. */
static long look_up_prefix(__u64 i, struct prefix *p)
{
	struct scratch *x = p->x;
	if (i >= DATA_PATH_LEN - 1)
		return 1;
	char ch = x->path[i];
	if (ch)
		x->key.path[i] = ch;
	if ((ch == '/' || !ch) && bpf_map_lookup_elem(&data_paths, &x->key))
		p->found = true;
	return !ch || p->found;
}

/* Looks up every directory that the file lies below, and its own path. */
static __always_inline bool is_data(struct scratch *x, struct file *f, __u32 slot)
{
	struct prefix p = { .x = x };
	__builtin_memset(&x->key, 0, sizeof(x->key));
	x->key.generation = slot >= INTERPRETERS;
	x->key.interpreter = slot & (INTERPRETERS - 1);
	if (bpf_d_path(&f->f_path, x->path, sizeof(x->path)) <= 1)
		return false;
	bpf_loop(DATA_PATH_LEN, look_up_prefix, &p, 0);
	return p.found;
}

/* The last component of the name of total bytes at address has this length and hash. */
__attribute__((noinline)) long ends_with(struct scratch *x, __u64 address, __u32 total, __u32 len, __u64 hash)
{
	char before = '/';
	if (!x || !len || total < len)
		return 0;
	address += total - len;
	if (total > len)
		bpf_probe_read_kernel(&before, 1, (void *)(address - 1));
	if (before != '/')
		return 0;
	__builtin_memset(x->path, 0, sizeof(x->path));
	bpf_probe_read_kernel_str(x->path, sizeof(x->path), (void *)address);
	return hash_name(x->path) == hash;
}

/*
 * The script of the command line: by the last component of the name asked for
 * or of the file's own, because interpreters make relative names absolute.
 */
static __always_inline bool is_named(struct scratch *x, const struct task *info, struct file *f, const char *asked, long n)
{
	struct dentry *d = f->f_path.dentry;
	__u32 len = info->script_len;
	if (!len)
		return false;
	if (n > 1 && ends_with(x, (__u64)asked, n - 1, len, info->script_hash))
		return true;
	/* read as a number: newer verifiers know such a pointer's type and do not pass it on */
	return d->d_name.len == len && ends_with(x, (__u64)BPF_CORE_READ(d, d_name.name), len, len, info->script_hash);
}

/* A pipe, terminal or socket in the place of the script is standard input by another name. */
static __always_inline long judge_stream(struct steering *c, struct generation *s, struct task *info, const struct interpreter *rule,
					struct scratch *x, struct file *f)
{
	__u8 form = form_of(f->f_inode->i_mode, f->f_inode->i_rdev);
	if (rule->stdin_forms & form)
		return 0;
	struct report r = {
		.kind = K_SCRIPT, .reason = WHY_STDIN, .mode = stdin_mode(s, rule), .file = f, .interpreter = info->interpreter, .detail = x->name,
	};
	return r.mode == M_OFF ? 0 : refuse(c, s, &r, true);
}

/* An interpreter opens something for reading. */
static __always_inline long judge_read(struct steering *c, struct generation *s, struct task_struct *t, struct task *info,
				      struct file *f, bool may_hash)
{
	__u32 slot = slot_of(s, info);
	struct interpreter *rule = rule_of(slot);
	struct scratch *x = bpf_task_storage_get(&scratches, t, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	__u8 mode = s->modes[K_SCRIPT];
	if (!rule || !x)
		return mode == M_ENFORCE ? -EPERM : 0;
	long n;
	const char *asked = asked_name(t, x, &n);
	bool named = is_named(x, info, f, asked, n);
	__u16 type = f->f_inode->i_mode & S_IFMT;
	enum suffix suffix = NO_SUFFIX;
	if (type == S_IFREG && rule->reads != READS_ANY)
		suffix = suffix_of(rule, f->f_path.dentry);
	else if (type != S_IFREG && type != S_IFIFO && !named)
		return 0;
	bool code = named || suffix;
	__u16 kinds = BIT(K_SCRIPT);
	if (!code) {
		if (rule->reads != READS_STRICT || info->roles & R_PACKAGES || is_data(x, f, slot))
			return 0;
		kinds = 0xffff; /* anything authorised may be read */
	} else if (info->roles & R_MODULES) {
		kinds |= BIT(K_MODULE); /* insmod names a module */
	}
	if (type != S_IFREG) /* `. FIFO` in an authorised script is code as well */
		return info->roles & R_PACKAGES ? 0 : judge_stream(c, s, info, rule, x, f);
	struct found o = {};
	find(c, s, f, &o, may_hash);
	struct report r = {
		.kind = K_SCRIPT, .mode = mode, .error = o.error, .space = o.space, .digest = o.digest, .file = f,
		.interpreter = info->interpreter, .reason = o.error ? WHY_NO_IDENTITY : WHY_UNLISTED, .detail = x->name,
	};
	if (!(o.entry.kinds & kinds)) {
		struct counts *n = counted();
		if (named || suffix != BYTECODE_SUFFIX || !n || !name_is(f->f_path.dentry->d_parent, "__pycache__", 11))
			return refuse(c, s, &r, true);
		/* the interpreter's own copy of what it reads instead: as if it were not there */
		__sync_fetch_and_add(&n->quiet, 1);
		return mode == M_ENFORCE && !is_relaxed(c) ? -ENOENT : 0;
	}
	/* scripts are read piece by piece: no writers from now on */
	if (code && s->code_writes == M_ENFORCE && !mark_in_use(c, f, o.digest)) {
		r.reason = WHY_NO_IDENTITY;
		r.error = -ETXTBSY;
		return refuse(c, s, &r, true);
	}
	return 0;
}

static __always_inline long opened_for_reading(struct file *file, bool may_hash)
{
	struct task_struct *t = bpf_get_current_task_btf();
	struct task *info = task_info(t);
	if (!info || !info->interpreter || !(file->f_mode & FMODE_READ) || file->f_flags & FMODE_EXEC_FLAG)
		return 0;
	__u16 type = file->f_inode->i_mode & S_IFMT;
	if (type == S_IFDIR)
		return 0;
	struct steering *c = steering();
	struct generation *s = c ? settings_of(c) : NULL;
	if (!s || s->modes[K_SCRIPT] == M_OFF || !in_scope(c))
		return 0;
	return judge_read(c, s, t, info, file, may_hash);
}

/* Each open that succeeded (6.9 and newer). Most tasks are no interpreters: one failed look-up. */
SEC("lsm.s/file_post_open")
long BPF_PROG(rw_read, struct file *file, int mask) { return opened_for_reading(file, true); }

/* flock(2) by the agent measures a file: its identity is known from then on. Fails if it has none. */
SEC("lsm.s/file_lock")
long BPF_PROG(rw_measure, struct file *file, unsigned int cmd)
{
	__u8 digest[32] = {};
	struct steering *c = steering();
	if (!c || !may(R_AGENT) || (file->f_inode->i_mode & S_IFMT) != S_IFREG)
		return 0;
	long rc = -EPERM;
	barrier_var(rc); /* the verifier wants to see the constant */
	if (!identify(c, file, digest, true, false))
		rc = 0;
	return rc;
}

#endif
