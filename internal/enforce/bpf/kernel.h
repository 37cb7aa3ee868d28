/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few kernel types that the programs look at. Every access is relocated
 * against the running kernel's BTF (CO-RE), so only names and types matter,
 * not offsets; a 2.8 MB vmlinux.h is not needed.
 */
#ifndef RINGWALL_KERNEL_H
#define RINGWALL_KERNEL_H

#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct { int counter; } atomic_t;
struct timespec64 { __s64 tv_sec; long tv_nsec; };

struct super_block { __u32 s_dev; unsigned long s_magic; };

struct hlist_node { struct hlist_node *next; };
struct hlist_head { struct hlist_node *first; };
struct inode {
	__u16 i_mode;
	unsigned int i_flags;
	struct super_block *i_sb;
	unsigned long i_ino;
	unsigned int i_nlink;
	__u32 i_rdev;
	__s64 i_size;
	atomic_t i_writecount;
	atomic_t i_readcount;
};
/* i_ctime has had three shapes */
struct inode___before66 { struct timespec64 i_ctime; };
struct inode___before611 { struct timespec64 __i_ctime; };
struct inode___since611 { __s64 i_ctime_sec; __u32 i_ctime_nsec; };

struct qstr { __u32 hash; __u32 len; const unsigned char *name; };
struct dentry { struct dentry *d_parent; struct qstr d_name; struct inode *d_inode; };
struct vfsmount { struct dentry *mnt_root; struct super_block *mnt_sb; };
struct path { struct vfsmount *mnt; struct dentry *dentry; };
struct address_space { struct inode *host; };
struct file {
	unsigned int f_mode;
	unsigned int f_flags;
	struct inode *f_inode;
	struct path f_path;
	void *private_data;
	void *f_op;
	struct address_space *f_mapping;
};
struct block_device { __u32 bd_dev; void *bd_holder; };
struct bdev_inode { struct block_device bdev; struct inode vfs_inode; };
struct pid { struct hlist_head tasks[4]; };
struct proc_inode { struct pid *pid; struct inode vfs_inode; };
struct ns_common { unsigned int inum; };
struct mnt_namespace { struct ns_common ns; };
struct pid_namespace { struct task_struct *child_reaper; unsigned int level; };
struct nsproxy { struct mnt_namespace *mnt_ns; struct pid_namespace *pid_ns_for_children; };
struct fs_struct { struct path root; };
struct mm_struct { struct file *exe_file; unsigned long arg_start; };
struct shmem_inode_info { unsigned int seals; struct inode vfs_inode; };

struct filename { const char *name; };
struct nameidata { struct filename *name; };
struct fdtable { unsigned int max_fds; struct file **fd; };
struct files_struct { struct fdtable *fdt; };
struct task_struct {
	int pid;
	int tgid;
	char comm[16];
	__u64 start_boottime;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct nameidata *nameidata;
	struct files_struct *files;
	unsigned int flags;
	unsigned int ptrace;
	unsigned int personality;
	struct mm_struct *mm;
	struct fs_struct *fs;
	struct nsproxy *nsproxy;
	void *bpf_storage;
	struct hlist_node pid_links[4];
};

struct linux_binprm {
	struct file *file;
	unsigned long p;
	int argc;
	int envc;
	const char *filename;
	char buf[256];
};
struct linux_binprm___check { unsigned int is_check : 1; };

struct vm_area_struct { unsigned long vm_flags; struct file *vm_file; void *anon_vma; };
struct bpf_map { __u32 id; };
struct kernel_siginfo { int si_signo; };
struct cred { int unused; };
struct iattr;
struct rlimit;
struct fown_struct;
struct posix_acl;
struct mnt_idmap;
/* registers of a system call */
struct pt_regs___call_x86 { unsigned long di, bx, orig_ax; };
struct pt_regs___call { __u64 regs[31]; int syscallno; };
struct dm_verity_digest { const char *alg; const __u8 *digest; __u64 digest_len; };
enum lsm_integrity_type { LSM_INT_DMVERITY_SIG_VALID, LSM_INT_DMVERITY_ROOTHASH, LSM_INT_FSVERITY_BUILTINSIG_VALID };

enum kernel_read_file_id {
	READING_UNKNOWN,
	READING_FIRMWARE,
	READING_MODULE,
	READING_MODULE_COMPRESSED,
	READING_KEXEC_IMAGE,
	READING_KEXEC_INITRAMFS,
};
enum kernel_load_data_id {
	LOADING_UNKNOWN,
	LOADING_FIRMWARE,
	LOADING_MODULE,
	LOADING_KEXEC_IMAGE,
	LOADING_KEXEC_INITRAMFS,
};


#pragma clang attribute pop

#ifndef barrier_var
#define barrier_var(v) asm volatile("" : "+r"(v))
#endif

#define EPERM 1
#define ENOENT 2
#define ETXTBSY 26

#define PROT_WRITE 2
#define PROT_EXEC 4
#define VM_WRITE 2
#define VM_EXEC 4
#define FMODE_READ 1
#define FMODE_WRITE 2
#define FMODE_EXEC_FLAG 0x20 /* __FMODE_EXEC, in f_flags */
#define PTRACE_MODE_ATTACH 2
#define READ_IMPLIES_EXEC 0x0400000
#define F_SEAL_WRITE 8
#define PF_KTHREAD 0x00200000

#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define S_IFREG 0100000
#define S_IFBLK 0060000
#define S_IFDIR 0040000
#define S_IFCHR 0020000
#define S_IFIFO 0010000
#define MAJOR(dev) ((dev) >> 20)
#define MINOR(dev) ((dev) & 0xfffff)

#define EXT4_MAGIC 0xef53
#define XFS_MAGIC 0x58465342
#define BTRFS_MAGIC 0x9123683e
#define F2FS_MAGIC 0xf2f52010
#define TMPFS_MAGIC 0x01021994
#define RAMFS_MAGIC 0x858458f6
#define OVERLAY_MAGIC 0x794c7630
#define SQUASHFS_MAGIC 0x73717368
#define EROFS_MAGIC 0xe0f5e1e2
#define ISOFS_MAGIC 0x9660
#define PROC_MAGIC 0x9fa0
#define CGROUP2_MAGIC 0x63677270
#define LOOP_MAJOR 7
#define NBD_MAJOR 43

#endif
