// Package hosts is the server's side of hosts: how they join, their certificates,
// what they are given and what they report. docs/design/fleet.md tells the whole
// protocol.
//
// A host is who its certificate says, never who a message says. The server
// believes what a host reports for what it shows and judges, never for what it
// gives. Everything that people change goes through control.Door; what hosts
// report, and which manifest is meant for a host, is kept apart from documents.
package hosts
