/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a file is: its SHA-256, cached with everything that tells whether the
 * content is still the same. Digests are cached, never verdicts, so that a
 * policy change needs no flush.
 */
#ifndef RINGWALL_IDENTITY_H
#define RINGWALL_IDENTITY_H

#define HASH_ALGO_SHA256 4
#define FSVERITY_SHA256 1 /* FS_VERITY_HASH_ALG_SHA256 */
#define S_VERITY (1 << 16)

extern int bpf_get_fsverity_digest(struct file *file, struct bpf_dynptr *digest) __ksym __weak;

struct version { __u64 ctime_s, size; __u32 ctime_ns; int writers; };

/* Direct reads work on trusted pointers, also under lockdown=confidentiality. */
static __always_inline void version_of(struct inode *in, struct version *v)
{
	struct inode___since611 *a = (void *)in;
	struct inode___before611 *b = (void *)in;
	struct inode___before66 *c = (void *)in;
	if (bpf_core_field_exists(a->i_ctime_sec)) {
		v->ctime_s = a->i_ctime_sec;
		/* since 6.13 bit 31 says "somebody asked", not a time */
		v->ctime_ns = a->i_ctime_nsec & 0x7fffffff;
	} else if (bpf_core_field_exists(b->__i_ctime)) {
		v->ctime_s = b->__i_ctime.tv_sec;
		v->ctime_ns = b->__i_ctime.tv_nsec;
	} else {
		v->ctime_s = c->i_ctime.tv_sec;
		v->ctime_ns = c->i_ctime.tv_nsec;
	}
	v->size = in->i_size;
	v->writers = in->i_writecount.counter;
}

/* The same of an inode that is only an address: overlayfs's real one. */
static __always_inline void version_of_probed(struct inode *in, struct version *v)
{
	struct inode___since611 *a = (void *)in;
	struct inode___before611 *b = (void *)in;
	struct inode___before66 *c = (void *)in;
	int writers = BPF_CORE_READ(in, i_writecount.counter);
	if (bpf_core_field_exists(a->i_ctime_sec)) {
		v->ctime_s = BPF_CORE_READ(a, i_ctime_sec);
		v->ctime_ns = BPF_CORE_READ(a, i_ctime_nsec) & 0x7fffffff;
	} else if (bpf_core_field_exists(b->__i_ctime)) {
		v->ctime_s = BPF_CORE_READ(b, __i_ctime.tv_sec);
		v->ctime_ns = BPF_CORE_READ(b, __i_ctime.tv_nsec);
	} else {
		v->ctime_s = BPF_CORE_READ(c, i_ctime.tv_sec);
		v->ctime_ns = BPF_CORE_READ(c, i_ctime.tv_nsec);
	}
	v->size = BPF_CORE_READ(in, i_size);
	if (writers > v->writers)
		v->writers = writers;
}

/*
 * File systems whose content can only change through this kernel, so that a
 * digest stays true. Network file systems and FUSE are not among them: their
 * server may answer the next read differently.
 */
static __always_inline bool is_stable(unsigned long magic)
{
	switch (magic) {
	case EXT4_MAGIC: case XFS_MAGIC: case BTRFS_MAGIC: case F2FS_MAGIC:
	case TMPFS_MAGIC: case RAMFS_MAGIC: case OVERLAY_MAGIC:
	case SQUASHFS_MAGIC: case EROFS_MAGIC: case ISOFS_MAGIC:
		return true;
	}
	return false;
}

/*
 * A file system on a loop or network block device can be changed from below:
 * write the backing file, drop the page cache, and the same inode with the same
 * times reads differently. Only dm-verity and fs-verity identify what lies there.
 */
static __always_inline bool is_exposed(__u32 device)
{
	return MAJOR(device) == LOOP_MAJOR || MAJOR(device) == NBD_MAJOR;
}

/* The inode of the layer that an open file on overlayfs is read from, as an address; NULL if it cannot be told. */
static __always_inline struct inode *real_inode(const struct steering *c, struct file *f)
{
	void *real = f->private_data;
	if (!c->overlay || !real)
		return NULL;
	if (c->overlay == 2)
		bpf_probe_read_kernel(&real, sizeof(real), real);
	return real ? BPF_CORE_READ((struct file *)real, f_inode) : NULL;
}

/*
 * A file on overlayfs has an inode of its own that does not change when a
 * layer's file is written: look at the real one. Returns false if overlayfs
 * keeps it where we cannot find it, or if it lies where content is not stable
 * (another overlay included); then the file has no identity.
 */
static __always_inline bool version_of_file(const struct steering *c, struct file *f, struct version *v)
{
	version_of(f->f_inode, v);
	if (f->f_inode->i_sb->s_magic != OVERLAY_MAGIC)
		return true;
	struct inode *in = real_inode(c, f);
	if (!in)
		return false;
	unsigned long magic = BPF_CORE_READ(in, i_sb, s_magic);
	if (!is_stable(magic) || magic == OVERLAY_MAGIC || is_exposed(BPF_CORE_READ(in, i_sb, s_dev)))
		return false;
	version_of_probed(in, v);
	return true;
}

/*
 * memfd and other unlinked shared memory does not count its writers. It has an
 * identity only once it is sealed against writing.
 */
static __always_inline bool is_loose_memory(struct file *f)
{
	struct inode *in = f->f_inode;
	if (in->i_nlink || in->i_sb->s_magic != TMPFS_MAGIC)
		return false;
	if (!bpf_core_field_exists(((struct shmem_inode_info *)0)->seals))
		return true;
	struct shmem_inode_info *info = (void *)in - bpf_core_field_offset(struct shmem_inode_info, vfs_inode);
	return !(BPF_CORE_READ(info, seals) & F_SEAL_WRITE);
}

/* The digest that was last computed, true or not any more. */
static __always_inline bool last_digest(const struct identity *id, __u8 *digest)
{
	__u32 seq = *(volatile __u32 *)&id->seq;
	__builtin_memcpy(digest, id->digest, 32);
	asm volatile("" ::: "memory");
	return seq && !(seq & 1) && *(volatile __u32 *)&id->seq == seq;
}

static __always_inline bool cached(const struct identity *id, const struct version *v, __u8 *digest)
{
	__u32 seq = *(volatile __u32 *)&id->seq;
	if (!seq || seq & 1 || id->as_of != *(volatile __u64 *)&id->writes)
		return false;
	if (id->ctime_s != v->ctime_s || id->ctime_ns != v->ctime_ns || id->size != v->size)
		return false;
	__builtin_memcpy(digest, id->digest, 32);
	asm volatile("" ::: "memory");
	return *(volatile __u32 *)&id->seq == seq;
}

static __always_inline void remember(struct identity *id, const struct version *v, __u64 writes, const __u8 *digest)
{
	__u32 seq = *(volatile __u32 *)&id->seq;
	/* one writer at a time; who loses leaves it to the next check */
	if (seq & 1 || __sync_val_compare_and_swap(&id->seq, seq, seq + 1) != seq)
		return;
	id->ctime_s = v->ctime_s;
	id->ctime_ns = v->ctime_ns;
	id->size = v->size;
	id->as_of = writes;
	__builtin_memcpy(id->digest, digest, 32);
	__sync_fetch_and_add(&id->seq, 1);
}

/*
 * Puts the file's SHA-256 into digest (32 zero bytes before). Returns 0, or a
 * negative number if the content cannot be pinned down: no digest means no
 * trust, so this fails closed. may_hash: the hook can sleep and the file be
 * read. verity: the kernel checks what it reads, whatever lies below.
 */
static __always_inline int identify(const struct steering *c, struct file *f, __u8 *digest, bool may_hash, bool verity)
{
	struct counts *n = counted();
	struct inode *in = f->f_inode;
	struct version before = {}, after = {};
	if (!n || !is_stable(in->i_sb->s_magic) || (is_exposed(in->i_sb->s_dev) && !verity) || is_loose_memory(f) || !version_of_file(c, f, &before))
		return -1;
	if (before.writers > 0)
		return -ETXTBSY;
	struct identity *id = bpf_inode_storage_get(&identities, in, 0, 0);
	if (id && cached(id, &before, digest)) {
		__sync_fetch_and_add(&n->hits, 1);
		return 0;
	}
	if (!may_hash)
		return -ENOENT;
	__sync_fetch_and_add(&n->misses, 1);
	/*
	 * Made before hashing: whoever opens the file for writing meanwhile counts
	 * here. Who came before that found nothing to count in: look again.
	 */
	id = bpf_inode_storage_get(&identities, in, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!id)
		return -1;
	if (!version_of_file(c, f, &before) || before.writers > 0)
		return -ETXTBSY;
	__u64 writes = *(volatile __u64 *)&id->writes;
	long algo = bpf_ima_file_hash(f, digest, 32);
	if (algo != HASH_ALGO_SHA256) {
		__sync_fetch_and_add(&n->hash_errors, 1);
		return algo < 0 ? (int)algo : -1;
	}
	__sync_fetch_and_add(&n->hashed, 1);
	if (!version_of_file(c, f, &after) || after.writers > 0 || *(volatile __u64 *)&id->writes != writes ||
	    after.ctime_s != before.ctime_s || after.ctime_ns != before.ctime_ns || after.size != before.size)
		return -ETXTBSY;
	remember(id, &after, writes, digest);
	return 0;
}

/*
 * The file's fs-verity digest, where file and kernel have one (6.12). The
 * kernel checks each page against it as it is read: no freshness question.
 */
static __always_inline bool fsverity_digest(struct file *f, __u8 *digest)
{
	if (!bpf_get_fsverity_digest || !(f->f_inode->i_flags & S_VERITY))
		return false;
	struct scratch *s = bpf_task_storage_get(&scratches, bpf_get_current_task_btf(), 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!s)
		return false;
	struct bpf_dynptr p;
	/* u16 algorithm, u16 size, then the digest */
	bpf_dynptr_from_mem(s->verity, sizeof(s->verity), 0, &p);
	if (bpf_get_fsverity_digest(f, &p) < 0)
		return false;
	if (s->verity[0] != FSVERITY_SHA256 || s->verity[1] || s->verity[2] != 32)
		return false;
	__builtin_memcpy(digest, s->verity + 4, 32);
	return true;
}

#endif
