package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type attemptPlan struct {
	technique technique
	as        who
}

// runner tries techniques one after the other. Each has its own process,
// scratch directory, mount namespace and cgroup, which are gone afterwards.
type runner struct {
	setup
	self     string
	limit    time.Duration
	events   string
	progress io.Writer
}

func (r *runner) run(ctx context.Context, plan []attemptPlan) ([]result, error) {
	if err := os.MkdirAll(r.Base, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(r.Base)
	// the user must reach what lies below, whatever the umask
	if err := os.Chmod(r.Base, 0o755); err != nil {
		return nil, err
	}
	since := time.Now()
	var out []result
	for i, p := range plan {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		res := r.attempt(ctx, p)
		out = append(out, res)
		fmt.Fprintf(r.progress, "%3d/%d %-11s %-4s %-26s %5.1fs %s\n", i+1, len(plan), res.Outcome, res.As, res.ID, res.Seconds, res.Error)
	}
	if r.events != "" {
		// the agent tells repetitions only when they have stopped for a while
		time.Sleep(15 * time.Second)
		if err := markAlerted(r.events, r.self, since, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (r *runner) attempt(ctx context.Context, p attemptPlan) result {
	t := p.technique
	res := result{
		ID: t.ID, Group: t.Group, Title: t.Title, As: p.as.String(), Stop: t.Stop, Agent: t.Agent, Outcome: stopped,
		Ran: t.Ran,
	}
	if res.Ran == "" {
		res.Ran = "the payload left its token in the marker file"
	}
	if t.Agent && r.AgentPID == 0 {
		res.Outcome, res.Error = notHere, "no agent on this host"
		return res
	}
	start := time.Now()
	a, err := r.prepare(t, p.as)
	if err != nil {
		res.Outcome, res.Error = broken, err.Error()
		return res
	}
	defer os.RemoveAll(a.Dir)
	res.token, res.start = a.Token, start
	if p.as == asUser {
		res.uid = r.UID
	}
	limit := r.limit
	if t.Limit > 0 {
		limit = time.Duration(t.Limit) * time.Second
	}
	ans, pid, hung, err := r.child(ctx, a, t, limit)
	res.pid, res.Hung = pid, hung
	res.Error = ans.Error
	switch {
	case markerHolds(a.Marker, a.Token):
		res.Outcome = ran
	case ans.Unavailable:
		res.Outcome = notHere
	case hung:
		res.Error = fmt.Sprintf("hung: ended after %s", limit)
	case errors.Is(err, errNoAttempt):
		res.Outcome, res.Error = broken, err.Error()
	case err != nil:
		res.Error = strings.TrimSpace(err.Error() + " " + ans.Error)
	}
	res.Error = res.Error[:min(len(res.Error), 2000)]
	res.end = time.Now()
	res.Seconds = res.end.Sub(start).Seconds()
	return res
}

func (r *runner) prepare(t technique, as who) (*attempt, error) {
	var raw [8]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return nil, err
	}
	a := &attempt{setup: r.setup, ID: t.ID, Token: hex.EncodeToString(raw[:]), As: as}
	a.Dir = filepath.Join(r.Base, a.Token)
	a.Marker = filepath.Join(a.Dir, "marker")
	if err := os.Mkdir(a.Dir, 0o777); err != nil {
		return nil, err
	}
	// usermode helpers and other users must be able to leave their mark
	if err := os.Chmod(a.Dir, 0o777); err != nil {
		return nil, err
	}
	if as == asUser {
		return a, os.Chown(a.Dir, r.UID, r.UID)
	}
	return a, nil
}

// errNoAttempt: the attempt's process could not be started; says nothing about the host.
var errNoAttempt = errors.New("attempt not started")

// child runs the attempt and ends everything that it started.
func (r *runner) child(ctx context.Context, a *attempt, t technique, limit time.Duration) (ans answer, pid int, hung bool, err error) {
	arg, err := json.Marshal(a)
	if err != nil {
		return ans, 0, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.self, "attempt", string(arg))
	attr := &syscall.SysProcAttr{Setsid: true}
	if !t.Host {
		attr.Unshareflags = syscall.CLONE_NEWNS
	}
	if a.As == asUser {
		attr.Credential = &syscall.Credential{Uid: uint32(r.UID), Gid: uint32(r.UID)}
	}
	box := newCgroup(a.Token)
	if box != nil {
		attr.UseCgroupFD, attr.CgroupFD = true, int(box.dir.Fd())
	}
	var said bytes.Buffer
	var wrong tail
	cmd.SysProcAttr, cmd.Env, cmd.Dir = attr, a.environment(), a.Dir
	cmd.Stdout, cmd.Stderr = &said, &wrong
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		box.end()
		return ans, 0, false, fmt.Errorf("%w: %w", errNoAttempt, err)
	}
	pid = cmd.Process.Pid
	err = cmd.Wait()
	// its session is its own, so this ends no other process
	_ = syscall.Kill(-pid, syscall.SIGKILL)
	box.end()
	if e := json.Unmarshal(said.Bytes(), &ans); e != nil && err == nil {
		err = fmt.Errorf("no answer: %s", &wrong)
	} else if err != nil {
		err = fmt.Errorf("%w: %s", err, &wrong)
	}
	return ans, pid, errors.Is(ctx.Err(), context.DeadlineExceeded), err
}

// cgroup holds all processes of one attempt, however they detach themselves.
type cgroup struct {
	path string
	dir  *os.File
}

// newCgroup returns nil where there is no cgroup v2 to make one in.
func newCgroup(name string) *cgroup {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(raw)) {
		own, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		path := filepath.Join("/sys/fs/cgroup", own, "attack-"+name)
		var fs unix.Statfs_t
		if unix.Statfs("/sys/fs/cgroup", &fs) != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC || os.Mkdir(path, 0o755) != nil {
			return nil
		}
		dir, err := os.Open(path)
		if err != nil {
			return nil
		}
		return &cgroup{path: path, dir: dir}
	}
	return nil
}

// end kills what is in it and removes it.
func (c *cgroup) end() {
	if c == nil {
		return
	}
	c.dir.Close()
	_ = os.WriteFile(filepath.Join(c.path, "cgroup.kill"), []byte("1"), 0)
	for range 40 {
		if os.Remove(c.path) == nil {
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
}

// findAgent looks for a running agent. Returns 0 if there is none.
func findAgent(proc string) int {
	dirs, err := filepath.Glob(proc + "/[0-9]*")
	if err != nil {
		return 0
	}
	for _, d := range dirs {
		raw, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil {
			continue
		}
		argv := strings.Split(string(raw), "\x00")
		if len(argv) > 1 && filepath.Base(argv[0]) == "ringwall" && argv[1] == "agent" {
			pid, err := strconv.Atoi(filepath.Base(d))
			if err == nil {
				return pid
			}
		}
	}
	return 0
}
