// Command vminit is the first process of the guests that package vm starts, and
// in Debian guests the service that runs the script.
package main

import (
	"fmt"
	"os"

	"ringwall/test/vm/internal/guest"
)

func main() {
	if os.Getpid() == 1 {
		guest.Init()
	}
	if err := guest.Runner(); err != nil {
		fmt.Fprintln(os.Stderr, "vminit:", err)
		os.Exit(1)
	}
}
