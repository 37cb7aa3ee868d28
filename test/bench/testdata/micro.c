/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The small operations whose cost is measured. Prints the nanoseconds that all
 * rounds took, by a guest's clock that counts executed instructions.
 *
 *   micro exec N PROGRAM | open N FILE | map N LIBRARY | fork N | loop PROGRAM...
 *
 * loop executes its programs in turn until it is killed: the first must run,
 * the second must be refused. It stops with a message at the first wrong
 * verdict, and writes one byte for every hundred right ones.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void die(const char *what)
{
	fprintf(stderr, "micro: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Returns 0 if the program ran and ended well, else the errno of execve. */
static int execute(char *program)
{
	volatile int failed = 0;
	int status;
	char *argv[] = { program, NULL };
	pid_t pid = vfork();
	if (pid < 0)
		die("vfork");
	if (pid == 0) {
		execve(program, argv, environ);
		failed = errno;
		_exit(127);
	}
	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	if (failed)
		return failed;
	return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : EIO;
}

static void exec_once(char *program)
{
	errno = execute(program);
	if (errno)
		die(program);
}

static void open_once(char *file)
{
	char buf[4096];
	int fd = open(file, O_RDONLY);
	if (fd < 0 || read(fd, buf, sizeof(buf)) < 0)
		die(file);
	close(fd);
}

static int library = -1;

static void map_once(char *file)
{
	if (library < 0 && (library = open(file, O_RDONLY)) < 0)
		die(file);
	void *p = mmap(NULL, 65536, PROT_READ | PROT_EXEC, MAP_PRIVATE, library, 0);
	if (p == MAP_FAILED)
		die(file);
	munmap(p, 65536);
}

static void fork_once(char *unused)
{
	(void)unused;
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0)
		_exit(0);
	if (waitpid(pid, NULL, 0) != pid)
		die("waitpid");
}

static int loop(char *good, char *bad)
{
	for (unsigned long n = 1;; n++) {
		int e = execute(good);
		if (e) {
			printf("\nWRONG: what is authorised in every table was refused: %s\n", strerror(e));
			return 1;
		}
		e = execute(bad);
		if (e != EPERM && e != EACCES) {
			printf("\nWRONG: what no table authorises ran: %s\n", strerror(e));
			return 1;
		}
		if (n % 100 == 0 && write(1, ".", 1) != 1)
			return 1;
	}
}

int main(int argc, char **argv)
{
	void (*once)(char *) = NULL;
	if (argc == 4 && !strcmp(argv[1], "loop"))
		return loop(argv[2], argv[3]);
	if (argc >= 3) {
		once = !strcmp(argv[1], "exec") ? exec_once : !strcmp(argv[1], "open") ? open_once :
		       !strcmp(argv[1], "map") ? map_once : !strcmp(argv[1], "fork") ? fork_once : NULL;
	}
	if (!once || (once != fork_once && argc != 4)) {
		fprintf(stderr, "usage: micro exec|open|map|fork N [FILE]\n");
		return 2;
	}
	long n = atol(argv[2]);
	for (int i = 0; i < 5; i++)
		once(argv[3]);
	long long start = now();
	for (long i = 0; i < n; i++)
		once(argv[3]);
	printf("%lld\n", now() - start);
	return 0;
}
