// Package notify tells the owners of a build what is wrong with it: by a
// webhook (CloudEvents 1.0), by mail, or by a command. The same problem of the
// same thing is told once for a while, also across runs.
//
// Secrets are read from files that a configuration names; none is taken from a
// command line, and none is put on one or into an error.
package notify
