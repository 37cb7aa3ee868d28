// Package e2e takes whole Debian guests through a life under Ringwall: it boots
// enforcing, installs packages, compiles, interprets and contains, without one
// false denial. Nothing is imported from here.
package e2e
