// Command vminit is the first process of the guests that package vm starts.
package main

import (
	"fmt"
	"os"

	"ringwall/test/vm/internal/guest"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "vminit: runs only as process 1 of a guest")
		os.Exit(2)
	}
	guest.Init()
}
