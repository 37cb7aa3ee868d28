// Package run tries builds in throw-away guests by the command line, as a
// pipeline does.
package run
