/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the attack tool share. */
#ifndef ATTACK_H
#define ATTACK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096

/* One technique. args: what the evaluator passed after token and marker. Returns 0 or an errno. */
struct technique {
	const char *name;
	int (*run)(char **args);
};

/* Says what failed and returns errno. */
int failed(const char *what);
/* Machine code that returns the token; CODE_LEN bytes. */
#define CODE_LEN 6
void put_code(void *at);
/* Calls the code at p. If it returns the token, the marker is written. */
int call(void *p);
/* A fresh file in dir that holds one page of code. Returns a descriptor open for reading and writing. */
int code_file(const char *dir, const char *name, char *path, size_t size);
/* Offset of rw_demo's code in the demo library's file. */
long demo_offset(const char *library);
/* True once the payload has left its token in the marker. */
int marker_there(void);

extern const struct technique memory_techniques[], process_techniques[], library_techniques[], file_techniques[];

#endif
