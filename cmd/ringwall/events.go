package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/errs"
)

func newEventsCommand(e *env) *cobra.Command {
	var d hostDirs
	var follow, blocks bool
	var last int
	c := &cobra.Command{
		Use: "events", GroupID: groupHost, Short: "Who tried what, and why it was refused",
		Long: `Print this host's event log: one line an event, or with --output json the records
as they are on the disk (JSON lines). It works without an agent.

  BLOCK   refused by the kernel
  AUDIT   would be refused; it went ahead
  GAP     events were lost: refusals were made as always, but there is no record
  NOTE    what the agent did or found; "!" marks what someone should look at`,
		Example: `  ringwall events -n 20
  ringwall events --blocks --follow --output json`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			show := func(r *agent.Record, raw []byte) {
				if blocks && r.Type != "block" {
					return
				}
				if e.json {
					fmt.Fprintf(e.stdout, "%s\n", raw)
					return
				}
				fmt.Fprint(printableWriter{e.stdout}, eventText(r))
			}
			return readEvents(c.Context(), d.state, last, follow, show)
		},
	}
	d.flags(c)
	c.Flags().BoolVarP(&follow, "follow", "f", false, "wait for more")
	c.Flags().BoolVar(&blocks, "blocks", false, "only what was refused")
	c.Flags().IntVarP(&last, "last", "n", 0, "only the last N records; 0 is all")
	return c
}

// eventText is a record in one or two lines.
func eventText(r *agent.Record) string {
	label := map[string]string{"block": "BLOCK", "audit": "AUDIT", "gap": "GAP", "notice": "NOTE"}[r.Type]
	if r.Alert {
		label += "!"
	}
	out := fmt.Sprintf("%s %-6s ", r.Time.Local().Format("2006-01-02 15:04:05"), label)
	switch r.Type {
	case "gap", "notice":
		return out + r.Text + "\n"
	}
	out += r.Reason
	if r.Kind != "" {
		out += " " + r.Kind
	}
	if r.Path != "" {
		out += " " + shown(r.Path)
	}
	if r.Detail != "" {
		out += " " + shown(r.Detail)
	}
	if p := r.Process; p != nil {
		out += fmt.Sprintf(" by %s[%d] uid %d", shown(p.Name), p.PID, p.UID)
		if p.User != "" {
			out += " (" + shown(p.User) + ")"
		}
		if p.Container != "" {
			out += " in " + shown(p.Container)
		}
	}
	if r.Count > 1 || r.First != nil {
		out += fmt.Sprintf(", %d more times", r.Count)
	}
	out += "\n                           " + r.Text
	if r.Why != "" {
		out += "; policy: " + r.Why
		if r.Rule != "" {
			out += " [" + r.Rule + "]"
		}
	}
	if r.Digest != "" {
		out += "\n                           " + r.Digest + ", " + r.Signer
	}
	return out + "\n"
}

// readEvents shows the records of the log, oldest first, and then new ones.
func readEvents(ctx context.Context, state string, last int, follow bool, show func(*agent.Record, []byte)) error {
	paths := agent.LogPaths(state)
	if len(paths) == 0 && !follow {
		return hint(fmt.Errorf("events: no log in %s: %w", state, errs.NotFound), "has an agent run here? see `ringwall status`")
	}
	var tail [][]byte
	keep := func(line []byte) {
		if last > 0 {
			tail = append(tail, append([]byte(nil), line...))
			if len(tail) > last {
				tail = tail[1:]
			}
			return
		}
		showLine(line, show)
	}
	var at int64
	for _, p := range paths {
		n, err := readLines(p, 0, keep)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("events: %w", err)
		}
		at = n
	}
	for _, line := range tail {
		showLine(line, show)
	}
	if !follow {
		return nil
	}
	last = 0
	return followLog(ctx, state, at, keep)
}

func showLine(line []byte, show func(*agent.Record, []byte)) {
	var r agent.Record
	if json.Unmarshal(line, &r) == nil {
		show(&r, line)
	}
}

// readLines reads whole lines from an offset and returns the one after them.
func readLines(name string, from int64, line func([]byte)) (int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return from, err
	}
	defer f.Close()
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return from, err
	}
	r := bufio.NewReaderSize(f, 64<<10)
	for {
		b, err := r.ReadBytes('\n')
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil // a line without an end is still being written
			}
			return from, err
		}
		from += int64(len(b))
		if len(b) > 1 {
			line(b[:len(b)-1])
		}
	}
}

// followLog polls the log; a file that got shorter was rotated.
func followLog(ctx context.Context, state string, at int64, line func([]byte)) error {
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		paths := agent.LogPaths(state)
		if len(paths) == 0 {
			continue
		}
		live := paths[len(paths)-1]
		if st, err := os.Stat(live); err == nil && st.Size() < at {
			if len(paths) > 1 { // the end of the file before
				if _, err := readLines(paths[len(paths)-2], at, line); err != nil {
					return fmt.Errorf("events: %w", err)
				}
			}
			at = 0
		}
		n, err := readLines(live, at, line)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("events: %w", err)
		}
		at = n
	}
}
