/* SPDX-License-Identifier: Apache-2.0 */
/* An authorised library with one function, on which techniques work. */
__attribute__((noinline, aligned(64))) int rw_demo(void)
{
	asm volatile("nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop; nop");
	return 0;
}
