// Package build takes a small service from its source to a release and stops it
// on the way in every manner that it should be stopped: its own tests, git,
// go build and dpkg-deb are real, and everything goes through the command line.
//
// Nothing is imported from here.
package build
