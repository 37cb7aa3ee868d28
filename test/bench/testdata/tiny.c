/* SPDX-License-Identifier: Apache-2.0 */
/* The smallest program: what an exec costs without the program's own work. */
void _start(void)
{
	__asm__ volatile("mov $60, %eax\n\txor %edi, %edi\n\tsyscall");
	__builtin_unreachable();
}
