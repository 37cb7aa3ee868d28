/* SPDX-License-Identifier: Apache-2.0 */
/* Code put into a process by way of the kernel's debugging doors. */
#include "attack.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* Innocent code that the techniques overwrite; big enough for CODE_LEN bytes. */
static __attribute__((noinline, aligned(64))) uint32_t innocent(void)
{
	asm volatile("nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop");
	return 0;
}

static int write_mem(const char *path)
{
	char code[CODE_LEN];
	put_code(code);
	int fd = open(path, O_RDWR);
	if (fd < 0)
		return failed(path);
	if (pwrite(fd, code, sizeof(code), (off_t)(uintptr_t)innocent) != sizeof(code))
		return failed("pwrite");
	close(fd);
	return 0;
}

static int own_mem(char **a) { return write_mem("/proc/self/mem") ?: call(innocent); }
static int thread_mem(char **a) { return write_mem("/proc/thread-self/mem") ?: call(innocent); }

/* A child that waits for a signal and then runs what is at innocent. */
static pid_t victim(void)
{
	sigset_t s;
	sigemptyset(&s);
	sigaddset(&s, SIGUSR1);
	sigprocmask(SIG_BLOCK, &s, NULL);
	pid_t pid = fork();
	if (pid)
		return pid;
	int sig;
	sigwait(&s, &sig);
	_exit(call(innocent) ? 1 : 0);
}

static int release(pid_t pid, int rc)
{
	int st = 0;
	kill(pid, rc ? SIGKILL : SIGUSR1);
	waitpid(pid, &st, 0);
	return rc ? rc : WIFEXITED(st) && !WEXITSTATUS(st) ? 0 : EIO;
}

static int child_mem(char **a)
{
	char path[64];
	pid_t pid = victim();
	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	return release(pid, write_mem(path));
}

static int poke(pid_t pid)
{
	long word[2] = {};
	for (int i = 0; i < 2; i++) {
		errno = 0;
		word[i] = ptrace(PTRACE_PEEKTEXT, pid, (char *)innocent + 8 * i, 0);
		if (errno)
			return failed("PTRACE_PEEKTEXT");
	}
	put_code(word);
	for (int i = 0; i < 2; i++)
		if (ptrace(PTRACE_POKETEXT, pid, (char *)innocent + 8 * i, word[i]))
			return failed("PTRACE_POKETEXT");
	return 0;
}

static int attach(char **a)
{
	pid_t pid = victim();
	if (ptrace(PTRACE_ATTACH, pid, 0, 0))
		return release(pid, failed("PTRACE_ATTACH"));
	waitpid(pid, NULL, 0);
	int rc = poke(pid);
	ptrace(PTRACE_DETACH, pid, 0, 0);
	return release(pid, rc);
}

static int seize(char **a)
{
	pid_t pid = victim();
	if (ptrace(PTRACE_SEIZE, pid, 0, 0) || ptrace(PTRACE_INTERRUPT, pid, 0, 0))
		return release(pid, failed("PTRACE_SEIZE"));
	waitpid(pid, NULL, 0);
	int rc = poke(pid);
	ptrace(PTRACE_DETACH, pid, 0, 0);
	return release(pid, rc);
}

static int traceme(char **a)
{
	pid_t pid = fork();
	if (!pid) {
		if (ptrace(PTRACE_TRACEME, 0, 0, 0))
			_exit(failed("PTRACE_TRACEME"));
		raise(SIGSTOP);
		_exit(call(innocent) ? 1 : 0);
	}
	int st;
	waitpid(pid, &st, 0);
	if (!WIFSTOPPED(st))
		return EPERM;
	int rc = poke(pid);
	ptrace(PTRACE_DETACH, pid, 0, 0);
	waitpid(pid, &st, 0);
	return rc ? rc : WIFEXITED(st) && !WEXITSTATUS(st) ? 0 : EIO;
}

/* Stock kernels refuse this already (no FOLL_FORCE); it is here to notice if that changes. */
static int vm_write(char **a)
{
	pid_t pid = victim();
	char code[CODE_LEN];
	put_code(code);
	struct iovec from = { code, sizeof(code) }, to = { innocent, sizeof(code) };
	if (process_vm_writev(pid, &from, 1, &to, 1, 0) != sizeof(code))
		return release(pid, failed("process_vm_writev"));
	return release(pid, 0);
}

/*
 * The running program's own file is written. a[0]: its path, a copy that may
 * be written to. Kernels 6.11 and 6.12 do not refuse that by themselves.
 */
static int own_file(char **a)
{
	char code[CODE_LEN], line[256];
	unsigned long start, end, offset, at = (unsigned long)innocent, place = 0;
	put_code(code);
	FILE *maps = fopen("/proc/self/maps", "r");
	while (maps && fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %*s %lx", &start, &end, &offset) == 3 && at >= start && at < end)
			place = at - start + offset;
	int fd = place ? open(a[0], O_RDWR) : -1;
	if (fd < 0)
		return failed(a[0]);
	if (pwrite(fd, code, sizeof(code), place) != sizeof(code))
		return failed("pwrite");
	return call(innocent);
}

/* For a debugger, which is to put the code there. */
static int wait_for_code(char **a) { return call(innocent); }

const struct technique process_techniques[] = {
	{ "innocent", wait_for_code },
	{ "own-file", own_file },
	{ "own-mem", own_mem },
	{ "thread-mem", thread_mem },
	{ "child-mem", child_mem },
	{ "ptrace-attach", attach },
	{ "ptrace-seize", seize },
	{ "ptrace-traceme", traceme },
	{ "vm-write", vm_write },
	{},
};
