// Package integrity does I/O.
package integrity

import (
	_ "net/http"
	_ "os/exec"

	_ "github.com/spf13/cobra"

	_ "ringwall/internal/enforce"
)

type wide interface {
	A()
	B()
	C()
	D()
	E()
	F()
	G()
	H()
	I()
}
