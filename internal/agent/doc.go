// Package agent is Ringwall on a host: it verifies the signed policy, compiles
// it with everything that is authorised into a table, puts that table into the
// kernel, proves with a canary that the kernel acts on it, and tells who tried
// what. The kernel decides; the agent may die at any time and enforcement goes
// on as it was.
//
// Read state.go (what is on the disk), load.go (from signed documents to a
// table), agent.go (the process), events.go (from kernel events to records and
// alerts), packages.go (trust in a package archive), control.go (what the
// command line asks of a running agent).
//
// Nothing that reaches the agent from outside is believed without a signature:
// root may hand in any document, and only one that a trusted authority signed
// changes anything.
package agent
