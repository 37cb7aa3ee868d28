/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The payload: writes the token into the marker file. Both stand in slot,
 * which the evaluator fills in, so that no two copies have the same content.
 * No libc: the same text becomes a static program, a 32-bit one, a dynamic
 * one and a shared library.
 */
#define SLOT 512
__attribute__((used, section(".data"))) static volatile char slot[SLOT] = "RINGWALL-PAYLOAD-SLOT";

#ifdef __i386__
static long sys(long n, long a, long b, long c)
{
	long r;
	asm volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
	return r;
}
enum { OPEN = 5, WRITE = 4, CLOSE = 6, EXIT = 1 };
#else
static long sys(long n, long a, long b, long c)
{
	long r;
	asm volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return r;
}
enum { OPEN = 2, WRITE = 1, CLOSE = 3, EXIT = 231 };
#endif

static void mark(void)
{
	/* TOKEN NUL PATH NUL */
	long n = 0;
	while (n < SLOT / 2 && slot[n])
		n++;
	long fd = sys(OPEN, (long)(slot + n + 1), 0x241 /* O_WRONLY|O_CREAT|O_TRUNC */, 0666);
	if (fd >= 0) {
		sys(WRITE, fd, (long)slot, n);
		sys(CLOSE, fd, 0, 0);
	}
}

#ifdef LIBRARY
__attribute__((constructor)) static void loaded(void) { mark(); }
/* what the demo library has, so that this one can take its place */
int rw_demo(void) { return 0; }
/* rtld-audit(7): say that this is an auditor */
unsigned int la_version(unsigned int version) { return version; }
/* ssh-keygen looks for this name before it loads */
int C_GetFunctionList(void) { return 1; }
#elif defined(WITH_LIBC)
int main(void) { mark(); return 0; }
#else
__attribute__((noreturn)) void _start(void)
{
	mark();
	sys(EXIT, 0, 0, 0);
	for (;;)
		;
}
#endif
