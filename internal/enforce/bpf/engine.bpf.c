// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Ringwall's decision in the kernel: may this content run?
 *
 * One object for Linux 6.1 and newer. Read in this order: ringwall.h (words),
 * maps.h (state), identity.h (what a file is), decide.h (the decision), code.h,
 * interpreter.h, guard.h (the hooks).
 */
#include "kernel.h"
#include "ringwall.h"
#include "maps.h"
#include "event.h"
#include "identity.h"
#include "decide.h"
#include "code.h"
#include "interpreter.h"
#include "guard.h"

/* the licence string that the kernel asks of LSM programs */
char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* makes the compiler describe the types that only user space or an inner map names */
const struct event *unused_event __attribute__((unused));
const struct entry *unused_entry __attribute__((unused));
