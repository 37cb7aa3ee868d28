/* SPDX-License-Identifier: Apache-2.0 */
/* Crashes, so that the kernel writes a core. */
#include <stdlib.h>
int main(void) { abort(); }
