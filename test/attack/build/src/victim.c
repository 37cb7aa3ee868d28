/* SPDX-License-Identifier: Apache-2.0 */
/* An authorised program that needs the demo library and finds it beside itself ($ORIGIN). */
extern int rw_demo(void);
int main(void) { return rw_demo(); }
