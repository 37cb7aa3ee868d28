// Package util is a junk drawer.
package util
