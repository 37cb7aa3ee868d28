/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the programs share with user space. Kinds, modes, roles, read rules
 * and stdin forms have the numbers of internal/integrity (kind.go, table.go).
 */
#ifndef RINGWALL_SHARED_H
#define RINGWALL_SHARED_H

enum kind { K_EXEC = 1, K_LIBRARY, K_SCRIPT, K_MODULE, K_FIRMWARE, K_KEXEC, K_BPF, K_MAX };
enum mode { M_OFF, M_AUDIT, M_ENFORCE };
enum space { S_SHA256, S_FSVERITY, S_DMVERITY };
enum role {
	R_AGENT = 1 << 0, R_JIT = 1 << 1, R_JIT_SHARED = 1 << 2, R_BPF = 1 << 3,
	R_DEBUG = 1 << 4, R_PACKAGES = 1 << 5, R_BLOCK = 1 << 6, R_MODULES = 1 << 7,
};
enum reads { READS_ANY, READS_CODE, READS_STRICT };
enum stdin_form { IN_TTY = 1, IN_PIPE = 2, IN_FILE = 4, IN_SOCKET = 8, IN_NULL = 16 };

/* Why an event was raised; names in reason.go. Numbers are stable: they stand in recorded events. */
enum reason {
	WHY_UNLISTED = 1,      /* content is known and not authorised for this kind */
	WHY_NO_IDENTITY,       /* content cannot be pinned down: being written, unstable file system, memfd */
	WHY_MEMORY_ANON,       /* anonymous memory made executable */
	WHY_MEMORY_WX,         /* memory writable and executable at once */
	WHY_MEMORY_FILE,       /* pages of a file made executable after they were mapped */
	WHY_PTRACE,            /* attach to another process */
	WHY_PROC_MEM,          /* write access to /proc/PID/mem */
	WHY_FROM_MEMORY,       /* kernel code handed over from memory, not from a file */
	WHY_BPF_LOAD,          /* BPF program loaded by a process without that privilege */
	WHY_INLINE,            /* interpreter given code as an argument */
	WHY_STDIN,             /* interpreter reading code from a refused standard input */
	WHY_ARGUMENTS,         /* interpreter whose arguments could not be read */
	WHY_CODE_WRITE,        /* authorised, mapped code opened for writing */
	WHY_BLOCK_WRITE,       /* block device of a mounted file system, or physical memory, opened for writing */
	WHY_GUARD_SIGNAL,      /* signal to the agent */
	WHY_GUARD_BPF,         /* Ringwall's maps, programs or links */
	WHY_GUARD_FILE,        /* Ringwall's pins or state */
	WHY_GUARD_SYSCTL,      /* a setting that would switch the programs off */
	WHY_PERSONALITY,       /* READ_IMPLIES_EXEC asked for */
	WHY_GUARD_AGENT,       /* limits, priority, cgroup or /proc files of the agent */
	WHY_USERFAULT,         /* userfaultfd(2): pages of mapped code would come from user space */
};

#define PATH_LEN 256
#define DETAIL_LEN 128
#define ANCESTORS 5

struct ancestor { __u32 tgid; char comm[16]; };

/* One refusal, or would-be refusal in audit mode. */
struct event {
	__u64 seq;        /* grows by one for each event raised, sent or not: a gap is a loss */
	__u64 time_ns;    /* CLOCK_BOOTTIME */
	__u64 cgroup;
	__u64 inode;
	__u64 epoch;      /* policy epoch that decided */
	__u32 device;     /* kernel dev_t: major << 20 | minor */
	__u32 pid, tgid, uid, gid;
	__s32 error;      /* why there is no digest, negative errno, or 0 */
	__u32 space;
	__u16 kind;       /* enum kind; 0: the event is about memory, a process or the guard */
	__u16 reason;
	__u8 mode;        /* enum mode that applied: M_ENFORCE means refused */
	__u8 interpreter; /* 1 + index of the interpreter rule, or 0 */
	__u8 pad[2];
	__u8 digest[32];
	char comm[16];
	struct ancestor ancestors[ANCESTORS]; /* parent first */
	char path[PATH_LEN];
	char detail[DETAIL_LEN];
};

struct key { __u32 space; __u8 digest[32]; };
struct entry { __u16 kinds; __u16 roles; __u8 interpreter; __u8 pad[3]; };

/* One policy generation's settings; two of them, see struct steering. */
struct generation {
	__u64 epoch;
	__u8 modes[8];
	__u8 memory, ptrace, block_writes, code_writes;
	__u32 index;       /* this one's place, so that a check reads one generation throughout */
	__u64 applied_us;  /* Unix time in microseconds; for people, nothing is decided by it */
	__u64 entries;     /* in its table, without later additions */
	__u32 bans;        /* 1: the table has entries for content that is denied */
	__u32 pad;
	__u8 policy[32];   /* SHA-256 of the policy document */
};

#define LONG_OPTIONS 8
#define SUFFIXES 8
struct option16 { __u64 word[2]; __u64 mask[2]; __u32 len; __u32 pad; }; /* of longer ones the first 16 bytes */
struct suffix8 { __u64 word; __u32 len; __u32 bytecode; /* 1: the interpreter's own, below __pycache__ */ };
enum word { WORD_SCRIPT, WORD_CODE, WORD_OTHER }; /* what the first argument is that is no option */
struct interpreter {
	char name[16];
	__u8 reads, inline_mode, stdin_forms, n_suffixes;
	__u8 n_inline_long, n_arg_long;
	__u8 shell; /* options as a Bourne shell reads them */
	__u8 word;  /* enum word */
	__u8 n_environment, pad[7];
	__u64 inline_flags[2], arg_flags[2], stdin_flags[2], script_flags[2]; /* ASCII sets */
	struct option16 inline_long[LONG_OPTIONS], arg_long[LONG_OPTIONS];
	struct option16 environment[LONG_OPTIONS]; /* beginnings of variables that carry code */
	struct suffix8 suffixes[SUFFIXES];
};
#define INTERPRETERS 64 /* per generation; slot 0 unused */

#define CGROUPS 4
/* What user space steers; one element. */
struct steering {
	__u32 active;       /* generation in force: 0 or 1 */
	__u32 protect;      /* 1: guards on */
	__u64 scope_cgroup; /* 0: whole system */
	__u32 scope_level;
	__u32 overlay;      /* where overlayfs keeps the real file: 0 unknown, 1 private_data, 2 first member of it */
	__u32 pin_device;   /* dev_t of the private bpffs */
	__u32 relaxed;      /* 1: a break-glass permit is in force, refusals become audit events */
	__u64 relaxed_until_ns; /* CLOCK_BOOTTIME; the permit ends by itself */
	__u64 agent_cgroups[CGROUPS]; /* inodes of the agent's cgroup directory and those above it, without the root */
	__u64 adopted_until_ns; /* CLOCK_BOOTTIME; no process started later is in the map of adopted ones */
	__u64 canary_ns;    /* CLOCK_BOOTTIME of the last canary that passed */
	__u32 canary_mode;  /* enum mode that it proved */
	__u32 agent;        /* tgid of the agent in the first pid namespace */
	__u32 mount_ns;     /* the agent's mount namespace */
	__u32 signed_modules; /* 1: the kernel takes no module without a good signature (module.sig_enforce), for good */
	__u32 pad;
	__u32 layout;       /* LAYOUT of the object that made the maps */
	__u8 object[32];    /* SHA-256 of the object whose programs are attached */
};
/* Grows whenever a map or a structure here changes shape: older maps cannot be taken over then. */
#define LAYOUT 4

struct counts {
	__u64 seq, drops, denied, audited, hits, misses, hashed, hash_errors;
	__u64 quiet; /* byte code that was not there for its interpreter */
};

/* A file or directory that user space wants left alone: Ringwall's state. */
struct guarded { __u64 inode; __u32 device; __u32 pad; };
enum guard {
	GUARD_ALL = 1,   /* the file, or the directory and its entries */
	GUARD_PLACE = 2, /* a directory above such: may not be renamed, mounted over or unmounted */
};

#endif
