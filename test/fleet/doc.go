// Command fleet drives a real server with many simulated hosts over real mTLS,
// and reports what it costs and how fast things get where they must: a change of
// policy to the hosts, a block to the person on call. A simulated host has a key,
// a certificate and a connection of its own, waits, fetches, applies and reports
// as the agent does; only nothing is enforced.
//
//	go run ./test/fleet -hosts 10000
//	go run ./test/fleet -hosts 2000 -database postgres://…
//
// Clients and server share the machine: rates are those of a server that has
// half of it.
package main
