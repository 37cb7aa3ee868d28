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
// Of a host in a fleet: bundle.go (what a manifest brings), chunks.go (content by
// its digest), provisional.go (a manifest on trial, and the way back), flip.go
// (what it refuses that the one before did not), link.go (the server), link_join.go
// (becoming a member), link_report.go (how the host stands), spool.go and
// link_push.go (what waits for the server), link_inventory.go (what ran).
//
// Nothing that reaches the agent from outside is believed without a signature:
// root may hand in any document, and only one that a trusted authority signed
// changes anything.
package agent
