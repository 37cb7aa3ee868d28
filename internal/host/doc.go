// Package host is the adapter to the machine that the agent runs on: what its
// kernel can do, its knobs, package database, processes, containers, verity
// devices, logs and boot integration, and the floor under which a policy's
// epoch never falls again.
//
// Nothing here decides whether code may run. Every function says in its
// comment what it does when it cannot see: "fails open" means that it reports
// less than there is, "fails closed" that it returns an error or counts the
// unseen as missing. Functions take the directory that stands for "/" where a
// test or an installer needs another one.
package host
