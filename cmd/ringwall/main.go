// Command ringwall decides what may run on a fleet of Linux hosts: it signs
// builds and policies, checks them, and is the agent that enforces them.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal asks for an orderly end; after it, a second one kills.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], &env{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, now: time.Now, getenv: os.Getenv,
	}))
}

// env is what a command may touch of the process that it runs in. Commands use
// it instead of package os's variables, so that a test can be a terminal too.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	now            func() time.Time
	getenv         func(string) string

	// Set by the flags that every command has.
	json  bool // --output json
	quiet bool // --quiet
}

// run is one invocation; it returns the exit code.
func run(ctx context.Context, args []string, e *env) int {
	root := newRootCommand(e) //nolint:contextcheck // cobra hands it to each command
	running := watchStart(root)
	root.SetArgs(args)
	root.SetIn(e.stdin)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	err := root.ExecuteContext(ctx)
	if err != nil && !*running {
		err = usage(err) // refused before the command began: it was typed wrongly
	}
	return e.fail(err)
}
