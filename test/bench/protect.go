package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

const (
	ringwall  = payload + "/ringwall"
	stateDir  = "/var/lib/ringwall"
	startTime = 10 * time.Minute // of the guest's clock
	// asking costs as much as compiling some modules
	askCompiled = 20 * time.Second
)

// quiet runs a command and shows what it said only if it fails.
func quiet(ctx context.Context, argv ...string) error {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// until asks again and again until ask is true.
func until(ctx context.Context, what string, ask func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	for {
		if ok, err := ask(); err != nil || ok {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, ctx.Err())
		}
	}
}

// agent is a running `ringwall agent`.
type agent struct {
	cmd   *exec.Cmd
	ended chan error
	log   string
}

// startAgent makes the prepared state this host's and waits until the kernel
// enforces, proven by the canary.
func startAgent(ctx context.Context, state string) (*agent, error) {
	if err := quiet(ctx, "cp", "-a", state, stateDir); err != nil {
		return nil, err
	}
	log, err := os.CreateTemp("", "agent-*.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	a := &agent{cmd: exec.CommandContext(ctx, ringwall, "agent"), ended: make(chan error, 1), log: log.Name()}
	a.cmd.Stdout, a.cmd.Stderr = log, log
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { a.ended <- a.cmd.Wait() }()
	if err := until(ctx, "Ringwall enforces", func() (bool, error) {
		select {
		case err := <-a.ended:
			said, _ := os.ReadFile(a.log)
			return false, fmt.Errorf("the agent ended: %w: %s", err, said)
		default:
		}
		return exec.CommandContext(ctx, ringwall, "status").Run() == nil, nil
	}); err != nil {
		return nil, err
	}
	// before Linux 6.9 scripts outside of packages have to be measured
	return a, quiet(ctx, ringwall, "host", "measure", buildDir)
}

// compiled waits until the agent has compiled Python's modules, which it does in
// the background and which is not part of what is measured.
func (a *agent) compiled(ctx context.Context, say func(string, ...any)) (modules float64, err error) {
	last := time.Time{}
	return modules, until(ctx, "Python's byte code is made", func() (bool, error) {
		if time.Since(last) < askCompiled {
			return false, nil
		}
		out, err := exec.CommandContext(ctx, ringwall, "status", "--output", "json").Output()
		if err != nil {
			return false, fmt.Errorf("status: %w", err)
		}
		var s struct {
			Bytecode struct {
				State   string  `json:"state"`
				Why     string  `json:"why"`
				Made    float64 `json:"made"`
				Pending int     `json:"pending"`
			} `json:"bytecode"`
		}
		err = json.Unmarshal(out, &s)
		modules, last = s.Bytecode.Made, time.Now()
		say("byte code: %s, %.0f made, %d to be made %s", s.Bytecode.State, modules, s.Bytecode.Pending, s.Bytecode.Why)
		return s.Bytecode.State == "done", err
	})
}

// stop takes Ringwall out, as an operator does: that takes a signed policy in
// audit mode.
func (a *agent) stop(ctx context.Context) error {
	if err := quiet(ctx, ringwall, "host", "apply", payload+"/end.policy.json"); err != nil {
		return err
	}
	if err := quiet(ctx, ringwall, "host", "remove", "--purge"); err != nil {
		return err
	}
	return until(ctx, "the agent is gone", func() (bool, error) {
		select {
		case err := <-a.ended:
			return true, err
		default:
			return false, nil
		}
	})
}

// refusals are the lines of the event log about what was refused.
func (a *agent) refusals(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, ringwall, "events", "--blocks").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("events: %w: %s", err, out)
	}
	var lines []string
	for l := range strings.Lines(string(out)) {
		if strings.Contains(l, " BLOCK") {
			lines = append(lines, strings.TrimSpace(l))
		}
	}
	return lines, nil
}

// kibibytes reads a field of /proc/PID/status, such as VmRSS.
func kibibytes(pid int, field string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, fmt.Errorf("%s of process %d: %w", field, pid, errs.NotFound)
}

// ---- fapolicyd ----

const fapolicyConf = "/etc/fapolicyd/fapolicyd.conf"

// installFapolicyd installs Debian's package without starting it, with the
// rules that its authors recommend, and trusts what dpkg installed. Debian's
// own rules directory would refuse every program.
func installFapolicyd(ctx context.Context) error {
	debs, err := filepath.Glob("/var/cache/apt/archives/fapolicyd_*.deb")
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("fapolicyd's package: %v: %w", debs, errs.NotFound)
	}
	if err := os.WriteFile("/usr/sbin/policy-rc.d", []byte("#!/bin/sh\nexit 101\n"), 0o755); err != nil { //nolint:gosec // a program
		return err
	}
	if err := errors.Join(quiet(ctx, "dpkg", "-i", debs[0]), os.Remove("/usr/sbin/policy-rc.d")); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll("/etc/fapolicyd/rules.d"), os.MkdirAll("/etc/fapolicyd/rules.d", 0o755)); err != nil { //nolint:gosec // as it was
		return err
	}
	// README-rules: fapolicyd.rules.known-libs; without 20-dracut, which lets
	// root run everything.
	for _, n := range []string{"10-languages", "21-updaters", "30-patterns", "40-bad-elf", "41-shared-obj", "42-trusted-elf", "70-trusted-lang", "72-shell", "90-deny-execute", "95-allow-open"} {
		if err := quiet(ctx, "cp", "/usr/share/fapolicyd/sample-rules/"+n+".rules", "/etc/fapolicyd/rules.d/"); err != nil {
			return err
		}
	}
	_ = exec.CommandContext(ctx, "fagenrules").Run() // non-zero also when it changed something
	return trustInstalled()
}

// trustInstalled lists in fapolicyd's trust file what dpkg installed and could
// be code, with compiled Python and our own build.
func trustInstalled() error {
	lists, err := filepath.Glob("/var/lib/dpkg/info/*.list")
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			return err
		}
		for name := range strings.Lines(string(b)) {
			if p, err := filepath.EvalSymlinks(strings.TrimSpace(name)); err == nil {
				seen[p] = true
			}
		}
	}
	for _, dir := range []string{"/usr/lib/python3", "/usr/lib/python3.11", buildDir} {
		err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				seen[p] = true
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	var out []string
	for p := range seen {
		line, err := trustLine(p)
		if err != nil {
			return err
		}
		if line != "" {
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return os.WriteFile("/etc/fapolicyd/fapolicyd.trust", []byte(strings.Join(out, "")), 0o644) //nolint:gosec // as packaged
}

// trustLine is the entry of a file that could be code, or "".
func trustLine(path string) (string, error) {
	st, err := os.Lstat(path)
	if err != nil || !st.Mode().IsRegular() || strings.ContainsAny(path, " \n") || strings.HasPrefix(path, "/usr/lib/modules/") || strings.HasPrefix(path, "/boot/") {
		return "", nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var head [4]byte
	n, _ := io.ReadFull(f, head[:])
	ext := filepath.Ext(path)
	if st.Mode()&0o111 == 0 && !isProgram(head[:n]) && !slices.Contains([]string{".py", ".pyc", ".sh", ".so", ".pl", ".pm"}, ext) {
		return "", nil
	}
	h := sha256.New()
	if _, err := h.Write(head[:n]); err != nil {
		return "", err
	}
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %d %x\n", path, st.Size(), h.Sum(nil)), nil
}

// startFapolicyd starts the daemon and waits until it watches. integrity is
// its option of that name.
func startFapolicyd(ctx context.Context, integrity string) (pid int, err error) {
	conf := "permissive = 0\nnice_val = 14\nq_size = 640\nuid = fapolicyd\ngid = fapolicyd\ndo_stat_report = 1\ndetailed_report = 1\ndb_max_size = 50\n" +
		"subj_cache_size = 1549\nobj_cache_size = 8191\nwatch_fs = ext2,ext3,ext4,tmpfs,xfs,vfat,iso9660,btrfs\ntrust = file\nintegrity = " + integrity +
		"\nsyslog_format = rule,dec,perm,auid,pid,exe,:,path,ftype,trust\nrpm_sha256_only = 0\nallow_filesystem_mark = 0\n"
	if err := os.WriteFile(fapolicyConf, []byte(conf), 0o644); err != nil { //nolint:gosec // as packaged
		return 0, err
	}
	if err := quiet(ctx, "sh", "-c", "rm -f /var/lib/fapolicyd/* && mkdir -p /run/fapolicyd /var/lib/fapolicyd && chown fapolicyd:fapolicyd /run/fapolicyd /var/lib/fapolicyd && /usr/sbin/fapolicyd"); err != nil {
		return 0, err
	}
	return pid, until(ctx, "fapolicyd watches", func() (bool, error) {
		b, err := os.ReadFile("/run/fapolicyd.pid")
		if err != nil {
			return false, nil
		}
		if pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			return false, err
		}
		return watches(pid), nil
	})
}

// watches says whether a process has a fanotify mark.
func watches(pid int) bool {
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		return false
	}
	for _, i := range infos {
		f, err := os.Open(i)
		if err != nil {
			continue
		}
		s := bufio.NewScanner(f)
		found := false
		for s.Scan() {
			found = found || strings.HasPrefix(s.Text(), "fanotify mnt_id") || strings.HasPrefix(s.Text(), "fanotify sdev")
		}
		_ = f.Close()
		if found {
			return true
		}
	}
	return false
}

func stopFapolicyd(ctx context.Context, pid int) error {
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		return err
	}
	return until(ctx, "fapolicyd is gone", func() (bool, error) {
		return errors.Is(unix.Kill(pid, 0), syscall.ESRCH), nil
	})
}
