// Package e2e takes whole Debian guests through a life under Ringwall, as
// scripts. userland.sh: it boots enforcing, installs packages, compiles,
// interprets and contains, without one false denial. robustness.sh: what may go
// wrong around the agent (killed, frozen, out of memory or disk, flooded,
// crashed half way through a change of policy, files put back) does not open
// the host. start.sh is what both begin with; demo/prepare.sh makes the host's
// state, with every package of the image.
//
// Nothing is imported from here.
package e2e
