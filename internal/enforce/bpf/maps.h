/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef RINGWALL_MAPS_H
#define RINGWALL_MAPS_H

/* What is known of an inode's content; made before a digest is computed so that writers can void it. */
struct identity {
	__u32 seq;    /* odd while the digest is being written; 0: there is none yet */
	__u32 ctime_ns;
	__u64 ctime_s, size;
	__u64 as_of;  /* writes when the digest was computed */
	__u8 digest[32];
	__u64 writes; /* opens for writing and truncations, so far */
	__u32 in_use; /* authorised, and last mapped executable or opened as a script then: seconds since boot, 0 never */
	__u32 pad;
};
struct task {
	__u16 roles;
	__u8 interpreter; /* slot of its rule, 0: none */
	__u8 pad;
	__u32 script_len;
	__u64 script_hash; /* of the last path component of the script named on the command line */
};
/* A directory, with its closing slash, or a file whose content an interpreter may read unchecked. */
#define DATA_PATH_LEN 64
struct data_path { __u8 generation, interpreter; __u8 pad[6]; char path[DATA_PATH_LEN]; };
/* Reading the arguments of an interpreter. */
enum code_source { FROM_STDIN, FROM_SCRIPT, FROM_INLINE, UNREADABLE };
struct scan {
	__u64 next;   /* user address of the next argument */
	__u64 hash;   /* of the last component of the script's name */
	__u32 len;    /* of the same */
	__u32 left;   /* arguments to go */
	__u32 slot;   /* of the interpreter rule */
	__u32 source; /* enum code_source */
	bool skip, done, stdin_forced, more;
	bool script;    /* the next argument is the script's name */
	bool doubt;     /* an option came that may take the next argument */
	bool candidate; /* and that argument was taken for the script */
	__u8 pad;
	__u32 variables; /* of the environment, to go */
	__u32 pad2;
};
/* Working space of an interpreter's task; too big for the BPF stack. */
struct scratch {
	struct scan scan;
	char name[PATH_LEN];
	char path[PATH_LEN];
	struct data_path key;
	__u8 verity[68];
	__u8 pad[4];
};

struct { __uint(type, BPF_MAP_TYPE_INODE_STORAGE); __uint(map_flags, BPF_F_NO_PREALLOC); __type(key, int); __type(value, struct identity); } identities SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_TASK_STORAGE); __uint(map_flags, BPF_F_NO_PREALLOC); __type(key, int); __type(value, struct task); } tasks SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_TASK_STORAGE); __uint(map_flags, BPF_F_NO_PREALLOC); __type(key, int); __type(value, struct scratch); } scratches SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, struct steering); } control SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, struct counts); } counters SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, __u32); __type(value, struct generation); } settings SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2 * INTERPRETERS); __type(key, __u32); __type(value, struct interpreter); } interpreters SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4096); __type(key, struct data_path); __type(value, __u8); } data_paths SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 256); __type(key, __u32); __type(value, struct key); } verity_devices SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1024); __type(key, struct guarded); __type(value, __u8); } guarded_inodes SEC(".maps");
/* Files of overlays' layers whose code is mapped through the overlay: the inode that writers below open is another one. */
struct layer { __u32 in_use; __u8 digest[32]; };
struct { __uint(type, BPF_MAP_TYPE_LRU_HASH); __uint(max_entries, 8192); __type(key, struct guarded); __type(value, struct layer); } layers SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 128); __type(key, __u32); __type(value, __u8); } own_maps SEC(".maps");
/* Processes that were there before the programs, by tgid; start in clock ticks since boot, as in /proc/PID/stat. */
#define TICK_NS 10000000
struct adoption { __u64 start; struct task task; };
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4096); __type(key, __u32); __type(value, struct adoption); } adopted SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 1 << 22); } events SEC(".maps");
/* One table per policy generation, filled before it is put in force. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_HASH);
		__uint(max_entries, 1);
		__type(key, struct key);
		__type(value, struct entry);
	});
} tables SEC(".maps");

#endif
