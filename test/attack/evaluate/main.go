// Command evaluate tries to run unauthorised code on the host it is started
// on, in every way that it knows, and says which ways worked.
//
// It belongs into a guest made for it: it mounts, loads modules and stops
// services. It refuses to run as anything but root, because it needs both
// root's techniques and those of an unprivileged user.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"ringwall/internal/errs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := dispatch(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "evaluate:", err)
		os.Exit(1)
	}
}

func dispatch(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("want one of: run, compare, list: %w", errs.Invalid)
	}
	switch args[0] {
	case "run":
		return runCommand(ctx, args[1:], out)
	case "compare":
		if len(args) != 3 {
			return fmt.Errorf("compare STOCK.jsonl PROTECTED.jsonl: %w", errs.Invalid)
		}
		return compareFiles(out, args[1], args[2])
	case "list":
		return list(out)
	case "attempt":
		return attemptCommand(args[1:])
	}
	return fmt.Errorf("command %q: %w", args[0], errs.Invalid)
}

func list(out io.Writer) error {
	root, user := 0, 0
	for _, t := range catalogue() {
		if _, err := fmt.Fprintf(out, "%-26s %3d  %-9s  %s\n", t.ID, t.Group, t.As, t.Title); err != nil {
			return err
		}
		if t.As.includes(asRoot) {
			root++
		}
		if t.As.includes(asUser) {
			user++
		}
	}
	_, err := fmt.Fprintf(out, "%d as root, %d as an unprivileged user\n", root, user)
	return err
}

// setup is what a run and its attempts share; it reaches the attempts as JSON.
type setup struct {
	Kit       string `json:"kit"`
	Base      string `json:"base"`       // attempts work below it; on a disk, executable
	UID       int    `json:"uid"`        // the unprivileged user
	AgentPID  int    `json:"agent_pid"`  // 0: there is none
	AgentUnit string `json:"agent_unit"` // its systemd unit
	State     string `json:"state"`      // Ringwall's state directory
	Pins      string `json:"pins"`       // where its BPF objects are pinned
	Rollback  string `json:"rollback"`   // command that offers an older signed policy
}

func runCommand(ctx context.Context, args []string, out io.Writer) error {
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	var s setup
	self, err := os.Executable()
	if err != nil {
		return err
	}
	f.StringVar(&s.Kit, "kit", filepath.Dir(self), "directory that the build step made")
	f.StringVar(&s.Base, "base", "/var/tmp/ringwall-attack", "scratch directory, on a disk")
	f.IntVar(&s.UID, "uid", 1000, "the unprivileged user")
	f.StringVar(&s.AgentUnit, "agent-unit", "ringwall-agent.service", "systemd unit of the agent")
	f.IntVar(&s.AgentPID, "agent-pid", 0, "process of the agent; 0: look for one")
	f.StringVar(&s.State, "state", "/var/lib/ringwall", "the agent's state directory")
	f.StringVar(&s.Pins, "pins", "/run/ringwall/bpf", "where the agent pins its BPF objects")
	f.StringVar(&s.Rollback, "rollback", "", "command that offers the agent an older signed policy")
	output := f.String("o", "", "write results here as JSON lines")
	events := f.String("events", "", "the agent's event file (JSON lines), to tell what was alerted")
	only := f.String("only", "", "regular expression: techniques to try")
	as := f.String("as", "root,user", "whom to be")
	limit := f.Duration("limit", 20*time.Second, "time for one attempt that sets none itself")
	if err := f.Parse(args); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("run as uid %d: root is needed: %w", os.Geteuid(), errs.Unsupported)
	}
	// an attack calls the OOM killer: it must not take the evaluator. Attempts give this up.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return err
	}
	choose, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-only: %w: %w", err, errs.Invalid)
	}
	if s.AgentPID == 0 {
		s.AgentPID = findAgent("/proc")
	}
	r := &runner{setup: s, self: self, limit: *limit, events: *events, progress: out}
	var plan []attemptPlan
	for _, t := range catalogue() {
		for _, w := range []who{asUser, asRoot} {
			if t.As.includes(w) && choose.MatchString(t.ID) && strings.Contains(*as, w.String()) {
				plan = append(plan, attemptPlan{technique: t, as: w})
			}
		}
	}
	results, err := r.run(ctx, plan)
	if err != nil {
		return err
	}
	if *output != "" {
		if err := writeResults(*output, results); err != nil {
			return err
		}
	}
	return summarise(out, results)
}

// attemptCommand is the child that tries one technique. It answers with one
// line of JSON on standard output; what ran is told by the marker alone.
func attemptCommand(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("attempt: %w", errs.Invalid)
	}
	var a attempt
	if err := json.Unmarshal([]byte(args[0]), &a); err != nil {
		return fmt.Errorf("attempt: %w: %w", err, errs.Invalid)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0); err != nil {
		return err
	}
	for _, t := range catalogue() {
		if t.ID != a.ID {
			continue
		}
		err := a.try(t)
		var ans answer
		if err != nil {
			ans.Error = err.Error()
			ans.Unavailable = errors.Is(err, errs.Unsupported)
		}
		return json.NewEncoder(os.Stdout).Encode(ans)
	}
	return fmt.Errorf("technique %q: %w", a.ID, errs.NotFound)
}
