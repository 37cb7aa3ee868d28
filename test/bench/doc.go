// Command bench measures what Ringwall costs: the same work without
// protection, with Ringwall, and with fapolicyd (Debian's package), in one boot
// of a Debian guest whose clock counts executed instructions. docs/performance.md
// tells what the figures mean.
//
//	go run ./test/bench [-kernel 6.1] [-json FILE] [-gate]
//
// It exits with 1 if something failed, or if -gate is given and a goal is missed
// by more than -margin.
//
// Read workload.go (what is measured), report.go (medians, ratios, goals),
// prepare.go (what the guest is given), guest.go (the order of things in the
// guest), protect.go (Ringwall and fapolicyd, on and off), table.go (large
// policies, and what each kernel program costs).
package main
