// Command probe does inside a guest what a shell cannot do fast enough: it tries
// to execute things, uses memory up, and adds up what the event log tells.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"

	"ringwall/internal/agent"
)

const usage = `usage:
  probe storm FILE UNTIL   execute FILE over and over until the file UNTIL is there
  probe flood N FILE       call execve N times, as fast as it goes
  probe hog MIB            use up memory
  probe sum PATH <EVENTS   count what JSON lines tell of PATH, and what is told as lost
`

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	switch {
	case len(args) == 3 && args[0] == "storm":
		return storm(args[1], args[2], out)
	case len(args) == 3 && args[0] == "flood":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return flood(n, args[2], out)
	case len(args) == 2 && args[0] == "hog":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return hog(n, out)
	case len(args) == 2 && args[0] == "sum":
		return sum(in, args[1], out)
	}
	return fmt.Errorf("%s", usage)
}

// storm counts how often a program ran that must never run. A refusal is EPERM
// and nothing else, so that a missing file is no success.
func storm(file, until string, out io.Writer) error {
	tried, ran, refused := 0, 0, 0
	for {
		if _, err := os.Stat(until); err == nil {
			break
		}
		tried++
		pid, err := syscall.ForkExec(file, []string{file}, &syscall.ProcAttr{})
		switch {
		case err == nil:
			ran++
			var ws syscall.WaitStatus
			_, _ = syscall.Wait4(pid, &ws, 0, nil)
		case errors.Is(err, syscall.EPERM):
			refused++
		}
		time.Sleep(2 * time.Millisecond)
	}
	fmt.Fprintf(out, "tried=%d ran=%d refused=%d\n", tried, ran, refused)
	return nil
}

// flood needs no new process for a try: an execve that is refused returns.
func flood(n int, file string, out io.Writer) error {
	refused := 0
	for range n {
		if err := syscall.Exec(file, []string{file}, nil); !errors.Is(err, syscall.EPERM) {
			return fmt.Errorf("execute %s: %w", file, err)
		}
		refused++
	}
	fmt.Fprintf(out, "refused=%d\n", refused)
	return nil
}

func hog(mib int, out io.Writer) error {
	var all [][]byte
	for range mib {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
	}
	fmt.Fprintf(out, "used %d MiB\n", len(all))
	return nil
}

// sum adds up the refusals of a path that are told, and the events of whatever
// path that are told as lost.
func sum(in io.Reader, path string, out io.Writer) error {
	var told, lost uint64
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var r agent.Record
		if err := json.Unmarshal(s.Bytes(), &r); err != nil {
			return err
		}
		lost += r.Lost
		if r.Type == "block" && r.Path == path {
			told += uint64(max(r.Count, 1)) //nolint:gosec // a count
		}
	}
	fmt.Fprintf(out, "told=%d lost=%d\n", told, lost)
	return s.Err()
}
