/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that becomes code. */
#include "attack.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RWX (PROT_READ | PROT_WRITE | PROT_EXEC)
#define RX (PROT_READ | PROT_EXEC)
#define RW (PROT_READ | PROT_WRITE)

static int write_and_call(void *p)
{
	if (p == MAP_FAILED)
		return failed("mmap");
	put_code(p);
	return call(p);
}

static int seal_and_call(void *p, size_t len)
{
	if (p == MAP_FAILED)
		return failed("mmap");
	put_code(p);
	if (mprotect((void *)((uintptr_t)p & ~(uintptr_t)(PAGE - 1)), len, RX))
		return failed("mprotect");
	return call(p);
}

static int anon_rwx(char **a) { return write_and_call(mmap(NULL, PAGE, RWX, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)); }
static int anon_shared_rwx(char **a) { return write_and_call(mmap(NULL, PAGE, RWX, MAP_SHARED | MAP_ANONYMOUS, -1, 0)); }
static int anon_rw_rx(char **a) { return seal_and_call(mmap(NULL, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), PAGE); }
static int anon_shared_rw_rx(char **a) { return seal_and_call(mmap(NULL, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0), PAGE); }

static int dev_zero(char **a)
{
	int fd = open("/dev/zero", O_RDWR);
	return write_and_call(mmap(NULL, PAGE, RWX, MAP_PRIVATE, fd, 0));
}

static int stack_x(char **a)
{
	char room[3 * PAGE];
	char *p = (char *)(((uintptr_t)room + PAGE) & ~(uintptr_t)(PAGE - 1));
	put_code(p);
	if (mprotect(p, PAGE, RWX))
		return failed("mprotect");
	return call(p);
}

static int heap_x(char **a)
{
	char *p = sbrk(2 * PAGE);
	return seal_and_call((char *)(((uintptr_t)p + PAGE - 1) & ~(uintptr_t)(PAGE - 1)), PAGE);
}

static int pkey(char **a)
{
	char *p = mmap(NULL, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	put_code(p);
	/* -1: no key, the call is mprotect by another number */
	if (syscall(SYS_pkey_mprotect, p, PAGE, RX, -1))
		return failed("pkey_mprotect");
	return call(p);
}

static int data_file(char **a, int prot, int flags, int then)
{
	char path[512];
	int fd = code_file(a[0], "data.bin", path, sizeof(path));
	if (fd < 0)
		return failed("data.bin");
	close(fd);
	fd = open(path, O_RDONLY);
	void *p = mmap(NULL, PAGE, prot, flags, fd, 0);
	if (p == MAP_FAILED)
		return failed("mmap");
	if (then && mprotect(p, PAGE, then))
		return failed("mprotect");
	return call(p);
}

static int data_x(char **a) { return data_file(a, RX, MAP_PRIVATE, 0); }
static int data_shared_x(char **a) { return data_file(a, RX, MAP_SHARED, 0); }
static int data_r_x(char **a) { return data_file(a, PROT_READ, MAP_PRIVATE, RX); }

static int imply(void)
{
	/* the old value comes back; what counts is whether the flag is on now */
	personality(READ_IMPLIES_EXEC);
	if (!(personality(0xffffffff) & READ_IMPLIES_EXEC)) {
		errno = EPERM;
		return failed("personality");
	}
	return 0;
}

static int imply_file(char **a) { return imply() ?: data_file(a, PROT_READ, MAP_PRIVATE, 0); }
static int imply_anon(char **a) { return imply() ?: write_and_call(mmap(NULL, PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)); }

/* brk(2) asks no security module for the protection of what it adds. */
static int imply_brk(char **a)
{
	if (imply())
		return EPERM;
	uintptr_t now = syscall(SYS_brk, 0), want = (now + PAGE - 1) & ~(uintptr_t)(PAGE - 1);
	if ((uintptr_t)syscall(SYS_brk, want + 4 * PAGE) != want + 4 * PAGE)
		return failed("brk");
	/* the last page: the first may be part of an area that was there before */
	return write_and_call((void *)(want + 3 * PAGE));
}

/* A page of the program's own code is replaced by a data file. */
static int __attribute__((noinline, aligned(PAGE))) fixed_target(void)
{
	asm volatile(".skip 8192, 0x90");
	return 0;
}

static int fixed(char **a)
{
	char path[512];
	int fd = code_file(a[0], "fixed.bin", path, sizeof(path));
	if (fd < 0)
		return failed("fixed.bin");
	close(fd);
	fd = open(path, O_RDONLY);
	void *p = (void *)(((uintptr_t)fixed_target + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
	if (mmap(p, PAGE, RX, MAP_PRIVATE | MAP_FIXED, fd, 0) == MAP_FAILED)
		return failed("mmap");
	return call(p);
}

static int memfd_map(int flags, int seals)
{
	char page[PAGE] = {};
	put_code(page);
	int fd = memfd_create("data", MFD_ALLOW_SEALING);
	if (fd < 0 || write(fd, page, PAGE) != PAGE)
		return failed("memfd_create");
	if (seals && fcntl(fd, F_ADD_SEALS, seals))
		return failed("F_ADD_SEALS");
	void *p = mmap(NULL, PAGE, RX, flags, fd, 0);
	if (p == MAP_FAILED)
		return failed("mmap");
	return call(p);
}

static int memfd_shared(char **a) { return memfd_map(MAP_SHARED, 0); }
static int memfd_private(char **a) { return memfd_map(MAP_PRIVATE, 0); }
static int memfd_sealed(char **a) { return memfd_map(MAP_PRIVATE, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW); }

/* The classic of JITs: one page twice, once to write and once to run. */
static int dual_map(char **a)
{
	int fd = memfd_create("dual", 0);
	if (fd < 0 || ftruncate(fd, PAGE))
		return failed("memfd_create");
	void *w = mmap(NULL, PAGE, RW, MAP_SHARED, fd, 0);
	void *x = mmap(NULL, PAGE, RX, MAP_SHARED, fd, 0);
	if (w == MAP_FAILED || x == MAP_FAILED)
		return failed("mmap");
	put_code(w);
	return call(x);
}

static int secret(char **a)
{
	int fd = syscall(SYS_memfd_secret, 0);
	if (fd < 0 || ftruncate(fd, PAGE))
		return failed("memfd_secret");
	return write_and_call(mmap(NULL, PAGE, RWX, MAP_SHARED, fd, 0));
}

static int sysv(char **a)
{
	int id = shmget(IPC_PRIVATE, PAGE, IPC_CREAT | 0700);
	if (id < 0)
		return failed("shmget");
	void *p = shmat(id, NULL, SHM_EXEC);
	int e = errno;
	shmctl(id, IPC_RMID, NULL);
	errno = e;
	return write_and_call(p);
}

/* The page of the demo library that holds rw_demo, mapped with prot. Sets in to rw_demo's place in it. */
static char *demo_page(const char *lib, int prot, int flags, long *in)
{
	long off = demo_offset(lib);
	int fd = off < 0 ? -1 : open(lib, O_RDONLY);
	if (fd < 0)
		return MAP_FAILED;
	*in = off % PAGE;
	return mmap(NULL, PAGE, prot, flags, fd, off - *in);
}

static int cow_library(char **a)
{
	long in;
	char *p = demo_page(a[0], RW, MAP_PRIVATE, &in);
	return p == MAP_FAILED ? failed("mmap") : seal_and_call(p + in, PAGE);
}

static int rwx_library(char **a)
{
	long in;
	char *p = demo_page(a[0], RWX, MAP_PRIVATE, &in);
	return p == MAP_FAILED ? failed("mmap") : write_and_call(p + in);
}

/* Executable first, writable for a moment, executable again. */
static int flip_library(char **a)
{
	long in;
	char *p = demo_page(a[0], RX, MAP_PRIVATE, &in);
	if (p == MAP_FAILED)
		return failed("mmap");
	if (mprotect(p, PAGE, RW))
		return failed("mprotect RW");
	return seal_and_call(p + in, PAGE);
}

/*
 * userfaultfd(2) puts a page of ours below an executable private mapping of
 * authorised code on tmpfs. No mapping is ever writable, no protection changes.
 */
static int userfault(char **a)
{
	long in;
	char *p = demo_page(a[0], RX, MAP_PRIVATE, &in);
	if (p == MAP_FAILED)
		return failed("mmap");
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY: needs no privilege */);
	struct uffdio_api api = { .api = UFFD_API };
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		return failed("userfaultfd");
	struct uffdio_register r = { .range = { (uintptr_t)p, PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	if (ioctl(fd, UFFDIO_REGISTER, &r))
		return failed("UFFDIO_REGISTER");
	static char page[PAGE] __attribute__((aligned(PAGE)));
	put_code(page + in);
	struct uffdio_copy c = { .dst = (uintptr_t)p, .src = (uintptr_t)page, .len = PAGE };
	if (ioctl(fd, UFFDIO_COPY, &c))
		return failed("UFFDIO_COPY");
	return call(p + in);
}

/* An area grown by mremap(2): the new part has the old part's protection. */
static int remap(char **a)
{
	char path[512];
	int fd = code_file(a[0], "remap.bin", path, sizeof(path));
	if (fd < 0)
		return failed("remap.bin");
	char *p = mmap(NULL, PAGE, RW, MAP_SHARED, fd, 0);
	char *q = p == MAP_FAILED ? p : mremap(p, PAGE, 2 * PAGE, MREMAP_MAYMOVE);
	if (q == MAP_FAILED)
		return failed("mremap");
	return seal_and_call(q, PAGE);
}

const struct technique memory_techniques[] = {
	{ "anon-rwx", anon_rwx },
	{ "anon-shared-rwx", anon_shared_rwx },
	{ "anon-rw-rx", anon_rw_rx },
	{ "anon-shared-rw-rx", anon_shared_rw_rx },
	{ "dev-zero", dev_zero },
	{ "stack-x", stack_x },
	{ "heap-x", heap_x },
	{ "pkey-mprotect", pkey },
	{ "data-x", data_x },
	{ "data-shared-x", data_shared_x },
	{ "data-r-x", data_r_x },
	{ "imply-file", imply_file },
	{ "imply-anon", imply_anon },
	{ "imply-brk", imply_brk },
	{ "fixed", fixed },
	{ "memfd-shared", memfd_shared },
	{ "memfd-private", memfd_private },
	{ "memfd-sealed", memfd_sealed },
	{ "dual-map", dual_map },
	{ "secret", secret },
	{ "sysv", sysv },
	{ "cow-library", cow_library },
	{ "rwx-library", rwx_library },
	{ "flip-library", flip_library },
	{ "userfault", userfault },
	{ "remap", remap },
	{},
};
