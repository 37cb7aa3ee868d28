/* SPDX-License-Identifier: Apache-2.0 */
/* Built twice, as a program and as a library: code that nobody signed. It leaves a mark that it ran. */
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

static void mark(void)
{
	const char *name = getenv("EVIL_MARK");
	int fd = open(name ? name : "/tmp/evil-ran", O_WRONLY | O_CREAT, 0600);
	if (fd >= 0)
		close(fd);
}

#ifdef LIBRARY
__attribute__((constructor)) static void loaded(void) { mark(); }
#else
int main(void)
{
	mark();
	return 0;
}
#endif
