/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The attack tool: techniques that need C. It stands for an allowed program
 * that an attacker has taken over, and it is therefore authorised itself.
 *
 *	attack NAME TOKEN MARKER ARGUMENTS...
 *
 * Exit status 0: the technique went through. Whether its payload ran, the
 * marker tells.
 */
#include "attack.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *token, *marker;

int failed(const char *what)
{
	int e = errno ? errno : EIO;
	fprintf(stderr, "%s: %s\n", what, strerror(e));
	return e;
}

static uint32_t number(void)
{
	char first[9] = {};
	memcpy(first, token, 8);
	return strtoul(first, NULL, 16);
}

void put_code(void *at)
{
	uint32_t n = number();
	unsigned char code[CODE_LEN] = { 0xb8, n, n >> 8, n >> 16, n >> 24, 0xc3 }; /* mov eax, n; ret */
	memcpy(at, code, sizeof(code));
}

int call(void *p)
{
	uint32_t got = ((uint32_t (*)(void))p)();
	if (got != number()) {
		fprintf(stderr, "the code returned %#x: it is not the payload\n", got);
		return ENOEXEC;
	}
	int fd = open(marker, O_WRONLY | O_CREAT | O_TRUNC, 0666);
	if (fd < 0 || write(fd, token, strlen(token)) < 0)
		return failed("marker");
	close(fd);
	return 0;
}

int code_file(const char *dir, const char *name, char *path, size_t size)
{
	char page[PAGE] = {};
	put_code(page);
	snprintf(path, size, "%s/%s", dir, name);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || write(fd, page, PAGE) != PAGE)
		return -1;
	return fd;
}

int marker_there(void)
{
	struct stat st;
	return !stat(marker, &st) && st.st_size > 0;
}

int main(int argc, char **argv)
{
	const struct technique *tables[] = { memory_techniques, process_techniques, library_techniques, file_techniques };
	if (argc < 4 || strlen(argv[2]) < 8) {
		fprintf(stderr, "usage: attack NAME TOKEN MARKER ARGUMENTS...\n");
		return 2;
	}
	token = argv[2];
	marker = argv[3];
	/* techniques take at most four arguments; absent ones are NULL */
	char *args[5] = {};
	for (int i = 0; i < 4 && i + 4 < argc; i++)
		args[i] = argv[i + 4];
	for (unsigned t = 0; t < sizeof(tables) / sizeof(*tables); t++)
		for (const struct technique *q = tables[t]; q->name; q++)
			if (!strcmp(q->name, argv[1]))
				return q->run(args) ? 1 : 0;
	fprintf(stderr, "unknown technique %s\n", argv[1]);
	return 2;
}
