/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attacks of the quickstart that need system calls of their own. The program
 * is authorised: it plays an attacker who already runs code inside an allowed
 * process. It exits with 0 if the attack worked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int fail(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	return 1;
}

/* mov eax, 42; ret */
static const unsigned char code42[] = { 0xb8, 42, 0, 0, 0, 0xc3 };

static int call42(void *p) { return ((int (*)(void))p)() == 42 ? 0 : 1; }

/* A program that exists in memory only. */
static int memfd(const char *program)
{
	char buf[65536];
	ssize_t n;
	int in = open(program, O_RDONLY), out = memfd_create("x", 0);
	if (in < 0 || out < 0)
		return fail("prepare");
	while ((n = read(in, buf, sizeof(buf))) > 0)
		if (write(out, buf, n) != n)
			return fail("write");
	char *argv[] = { "x", NULL }, *envp[] = { NULL };
	fexecve(out, argv, envp);
	return fail("execute");
}

/* Machine code written into memory that is then made executable. */
static int shellcode(void)
{
	void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(p, code42, sizeof(code42));
	if (mprotect(p, 4096, PROT_READ | PROT_EXEC))
		return fail("make it executable");
	return call42(p);
}

/* An authorised library, changed in a private mapping. */
static int patch(const char *library)
{
	int fd = open(library, O_RDONLY);
	void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	if (p == MAP_FAILED)
		return fail("map");
	memcpy(p, code42, sizeof(code42));
	if (mprotect(p, 4096, PROT_READ | PROT_EXEC))
		return fail("make it executable");
	return call42(p);
}

static __attribute__((noinline)) int victim(void)
{
	__asm__ volatile("nop; nop; nop; nop; nop; nop; nop; nop");
	return 7;
}

/* The program's own code, overwritten through the file of its memory. */
static int procmem(void)
{
	int fd = open("/proc/self/mem", O_RDWR);
	if (fd < 0)
		return fail("open /proc/self/mem");
	if (pwrite(fd, code42, sizeof(code42), (off_t)(uintptr_t)victim) != sizeof(code42))
		return fail("write");
	return call42((void *)victim);
}

/* Another process, controlled by a debugger's means. */
static int trace(void)
{
	pid_t child = fork();
	if (!child) {
		pause();
		_exit(0);
	}
	long rc = ptrace(PTRACE_SEIZE, child, 0, 0);
	int e = errno;
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	errno = e;
	return rc ? fail("attach") : 0;
}

/* A kernel module, from a file. */
static int module(const char *file)
{
	int fd = open(file, O_RDONLY);
	if (fd < 0)
		return fail("open");
	if (!syscall(SYS_finit_module, fd, "", 0) || errno == EEXIST)
		return 0;
	return fail("load");
}

/* A kernel module, from memory, where there is no file to judge. */
static int module_memory(const char *file)
{
	struct stat st;
	int fd = open(file, O_RDONLY);
	if (fd < 0 || fstat(fd, &st))
		return fail("open");
	void *p = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (!syscall(SYS_init_module, p, st.st_size, "") || errno == EEXIST)
		return 0;
	return fail("load");
}

/* A BPF program of the attacker's own. */
static int bpf(void)
{
	struct bpf_insn insns[] = { { .code = BPF_ALU64 | BPF_MOV | BPF_K }, { .code = BPF_JMP | BPF_EXIT } };
	union bpf_attr attr = { .prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insns = (uintptr_t)insns, .insn_cnt = 2, .license = (uintptr_t)"GPL" };
	return syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr)) >= 0 ? 0 : fail("load");
}

/* An authorised program, changed in place while it runs. */
static int overwrite(const char *file)
{
	int fd = open(file, O_RDWR);
	return fd >= 0 ? 0 : fail("open for writing");
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "", *arg = argc > 2 ? argv[2] : "";
	if (!strcmp(what, "memfd")) return memfd(arg);
	if (!strcmp(what, "shellcode")) return shellcode();
	if (!strcmp(what, "patch")) return patch(arg);
	if (!strcmp(what, "procmem")) return procmem();
	if (!strcmp(what, "trace")) return trace();
	if (!strcmp(what, "module")) return module(arg);
	if (!strcmp(what, "module-memory")) return module_memory(arg);
	if (!strcmp(what, "bpf")) return bpf();
	if (!strcmp(what, "overwrite")) return overwrite(arg);
	fprintf(stderr, "attack: what?\n");
	return 2;
}
