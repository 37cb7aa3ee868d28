// Package enforce puts a compiled policy into the kernel and keeps it there.
//
// The decision is made by BPF LSM programs (bpf/engine.bpf.c) that look a
// file's content up in a table. Nothing in user space is asked while a program
// waits: unknown content is refused in enforce mode. Programs and maps are
// pinned in a private bpffs, so that enforcement outlives the agent and a
// restarted agent takes it over without a gap.
//
// The table is compiled by integrity.Compile from integrity.Evaluate; a test
// compares what the kernel does with what Evaluate says.
package enforce
