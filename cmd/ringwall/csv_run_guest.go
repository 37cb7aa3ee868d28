package main

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ringwall/internal/agent"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
)

// trialPlan tells the guest what to do. It comes with the payload.
type trialPlan struct {
	Format  string     `json:"format"`          // deb, rpm or tar
	File    string     `json:"file"`            // below guestDir
	Into    string     `json:"into,omitempty"`  // where a tar is unpacked
	Files   []string   `json:"files,omitempty"` // of the candidate, to be measured as a host would measure them
	Smoke   [][]string `json:"smoke,omitempty"`
	Wait    float64    `json:"wait"`           // seconds after installation, and after each command
	Init    string     `json:"init"`           // auto, systemd or none
	Adds    []string   `json:"adds,omitempty"` // supplements, below guestDir
	Install []string   `json:"install,omitempty"`
}

// init is the image's own init to start; empty: none.
func (p *trialPlan) init() string {
	const systemd = "/usr/lib/systemd/systemd"
	if p.Init == "none" {
		return ""
	}
	for _, path := range []string{systemd, "/lib/systemd/systemd"} {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			return path
		}
	}
	if p.Init == "systemd" {
		return systemd // starting it says that it is not there
	}
	return ""
}

// newCSVGuestCommand is csv run's own side in the guest.
func newCSVGuestCommand(e *env) *cobra.Command {
	var trial bool
	c := &cobra.Command{
		Use: "guest", Hidden: true, Short: "The guest's side of csv run", Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			switch {
			case trial && exists(guestPlan):
				return runTrial(c.Context(), e)
			case os.Getpid() == 1 && exists(guestModules):
				bootGuest(e)
			}
			return usage(errors.New("csv guest runs in the guest of ringwall csv run only"))
		},
	}
	c.Flags().BoolVar(&trial, "trial", false, "make the trial (the system is up)")
	return c
}

func readPlan() (*trialPlan, error) {
	b, err := readBounded(guestPlan, maxCatalogueFile)
	if err != nil {
		return nil, fmt.Errorf("plan of the trial: %w", err)
	}
	var p trialPlan
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("plan of the trial: %w: %w", err, errs.Invalid)
	}
	return &p, nil
}

// unpackPayload unpacks what the host sent: an archive on a disk of its own.
func unpackPayload(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.MkdirAll(guestDir, 0o700); err != nil {
		return err
	}
	if err := os.RemoveAll(agent.DefaultStateDir); err != nil {
		return err
	}
	return unpackTar(bufio.NewReaderSize(f, 1<<20), "/")
}

// unpackTar unpacks an archive below a directory of the guest, with owners and
// modes. Names do not lead out of it; links that are there already may, as the
// image has them (/var/run), and so may the archive's: all of it is the guest.
func unpackTar(r io.Reader, into string) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("archive: %w", err)
		}
		if err := unpackOne(into, h, t); err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
}

func unpackOne(into string, h *tar.Header, content io.Reader) error {
	inside := func(name string) string { return filepath.Join(into, filepath.Clean("/"+name)) }
	path := inside(h.Name)
	if h.Typeflag == tar.TypeDir {
		return os.MkdirAll(path, h.FileInfo().Mode().Perm())
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // as the system has it
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch h.Typeflag {
	case tar.TypeSymlink:
		return os.Symlink(h.Linkname, path)
	case tar.TypeLink:
		return os.Link(inside(h.Linkname), path)
	case tar.TypeReg:
	default:
		return nil // devices and the like run nothing
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Lchown(path, h.Uid, h.Gid); err != nil {
		return err
	}
	return os.Chmod(path, h.FileInfo().Mode()) // after the owner, which takes set-user-ID away
}

// trial is one trial, in the guest.
type trial struct {
	*reporter
	e       *env
	plan    *trialPlan
	agent   *exec.Cmd
	ended   chan error // of the agent
	log     string     // what the agent says
	client  *agent.Client
	install time.Time // when the candidate came
	smoke   time.Time // when its installation was done
}

// agentWait is how long the guest's agent may take: emulated machines are slow.
const agentWait = 8 * time.Minute

// runTrial starts the agent, installs the candidate, uses it and reports what the
// policy would have refused. Failures are reported: nobody reads its exit code.
func runTrial(ctx context.Context, e *env) error {
	t := &trial{reporter: openReport(), e: e, log: "/run/ringwall-csv.log", client: agent.NewClient(agent.DefaultRunDir), ended: make(chan error, 1)}
	defer t.close()
	what, err := t.steps(ctx)
	if err != nil {
		t.failed(what, err)
	}
	t.send(csv.RunLine{End: true})
	// Should the host not have heard the end. The disk is thrown away.
	return errors.Join(err, t.err, unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

func (t *trial) steps(ctx context.Context) (what string, err error) {
	if t.plan, err = readPlan(); err != nil {
		return "read the plan", err
	}
	if err := t.startAgent(ctx); err != nil {
		return "start the agent under the policy", err
	}
	for _, a := range t.plan.Adds {
		b, err := os.ReadFile(filepath.Join(guestDir, a))
		if err != nil {
			return "add a supplement", err
		}
		var s agent.Status
		if err := t.client.Call(ctx, "supplement", agent.DocumentRequest{Document: b}, &s); err != nil {
			return "add a supplement", err
		}
	}
	if err := t.control(ctx); err != nil {
		return "run the control", err
	}
	t.use(ctx)
	if err := t.stopAgent(); err != nil {
		return "stop the agent", err
	}
	if err := t.events(ctx); err != nil {
		return "read the agent's log", err
	}
	return "", nil
}

// startAgent starts the agent and waits until the kernel acts on the policy.
func (t *trial) startAgent(ctx context.Context) error {
	t.step("the agent takes up the policy")
	log, err := os.OpenFile(t.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	t.agent = exec.Command(guestBinary, "agent", "--no-bytecode") //nolint:noctx // stopped by name, so that it writes what it holds
	t.agent.Stdout, t.agent.Stderr, t.agent.Env = log, log, guestEnv()
	if err := t.agent.Start(); err != nil {
		return err
	}
	go func() { t.ended <- t.agent.Wait() }()
	ctx, cancel := context.WithTimeout(ctx, agentWait)
	defer cancel()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	text := "it does not answer"
	for {
		if s, err := t.client.Status(ctx); err == nil {
			switch s.State {
			case agent.StateAuditing, agent.StateEnforcing:
				return nil
			}
			text = s.State + ": " + s.Text
		}
		select {
		case <-again.C:
		case err := <-t.ended:
			t.ended <- err
			return fmt.Errorf("it ended: %w: %s", err, t.agentLog())
		case <-ctx.Done():
			return fmt.Errorf("%s: %w: %s", text, ctx.Err(), t.agentLog())
		}
	}
}

// controlScript is unlisted, and read by the image's shell before anything else:
// where no event tells of it, the agent does not know that shell, and sees nothing
// of what it reads.
const controlScript = "/run/ringwall-csv-control"

func (t *trial) control(ctx context.Context) error {
	if err := os.WriteFile(controlScript, []byte(": "+t.e.now().String()+"\n"), 0o600); err != nil {
		return err
	}
	if out, err := t.command(ctx, []string{"/bin/sh", controlScript}); err != nil {
		return fmt.Errorf("%w: %s", err, lastOutput(out))
	}
	return nil
}

func (t *trial) agentLog() string {
	b, _ := os.ReadFile(t.log)
	return lastOutput(b)
}

// use installs the candidate and runs the smoke test.
func (t *trial) use(ctx context.Context) {
	t.step("installing %s", filepath.Base(t.plan.File))
	t.install = t.now()
	err := t.installIt(ctx)
	t.rest(ctx)
	t.smoke = t.now()
	if err != nil {
		t.send(csv.RunLine{Failed: &csv.RunFailed{What: "installation", Output: lastOutput([]byte(err.Error())), Command: true}})
		return
	}
	// as whoever deploys it on such a kernel does: ringwall host measure
	if err := t.measure(ctx); err != nil {
		t.failed("measure what was installed", err)
	}
	for _, argv := range t.plan.Smoke {
		t.step("running %s", strings.Join(argv, " "))
		if out, err := t.command(ctx, argv); err != nil {
			t.send(csv.RunLine{Failed: &csv.RunFailed{What: strings.Join(argv, " ") + ": " + err.Error(), Output: lastOutput(out), Command: true}})
		}
		t.rest(ctx)
	}
}

func (t *trial) measure(ctx context.Context) error {
	var there []string
	for _, f := range t.plan.Files {
		if st, err := os.Lstat(f); err == nil && st.Mode().IsRegular() { // scripts may have moved others
			there = append(there, f)
		}
	}
	if len(there) == 0 {
		return nil
	}
	var m agent.MeasureAnswer
	return t.client.Call(ctx, "measure", agent.PackagesRequest{Files: there}, &m)
}

// now is the time by the clock that the kernel stamps files with: it lags behind
// the other one by up to a tick.
func (t *trial) now() time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts); err != nil {
		return t.e.now()
	}
	return time.Unix(ts.Unix())
}

func (t *trial) rest(ctx context.Context) {
	select {
	case <-time.After(time.Duration(t.plan.Wait * float64(time.Second))):
	case <-ctx.Done():
	}
}

func (t *trial) installIt(ctx context.Context) error {
	file := filepath.Join(guestDir, t.plan.File)
	argv := map[string][]string{
		"deb": {"dpkg", "--force-confold", "-i", file},
		"rpm": {"rpm", "-U", file},
	}[t.plan.Format]
	if argv == nil {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		return unpackTar(bufio.NewReaderSize(f, 1<<20), t.plan.Into)
	}
	out, err := t.command(ctx, argv)
	if err != nil {
		return fmt.Errorf("%s: %w: %s", argv[0], err, lastOutput(out))
	}
	return nil
}

// command runs a program of the image or of the candidate.
func (t *trial) command(ctx context.Context, argv []string) ([]byte, error) {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Dir, c.Env, c.WaitDelay = "/", guestEnv(), 2*time.Second
	out := &limitedOutput{}
	c.Stdout, c.Stderr = out, out
	err := c.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // a daemon keeps the output open
	}
	return out.b, err
}

// limitedOutput keeps the end of what is written.
type limitedOutput struct{ b []byte }

// Write never fails.
func (l *limitedOutput) Write(p []byte) (int, error) {
	const keep = 64 << 10
	l.b = append(l.b, p...)
	if len(l.b) > keep {
		l.b = append(l.b[:0], l.b[len(l.b)-keep:]...)
	}
	return len(p), nil
}

// stopAgent ends the agent, which writes what it has not written yet.
func (t *trial) stopAgent() error {
	t.step("collecting events")
	if err := t.agent.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	select {
	case err := <-t.ended:
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Exited() {
			return fmt.Errorf("%w: %s", err, t.agentLog())
		}
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("it does not end: %s", t.agentLog())
	}
}

// events reports what the log holds.
func (t *trial) events(ctx context.Context) error {
	self, err := fileSHA256(guestBinary)
	if err != nil {
		return err
	}
	var lost uint64
	seen := false
	err = readEvents(ctx, agent.DefaultStateDir, 0, false, func(r *agent.Record, _ []byte) {
		switch r.Type {
		case "gap":
			lost += max(r.Lost, 1)
		case "audit", "block":
			if r.Path == controlScript {
				seen = true
			} else if ev := t.event(r); ev.SHA256 != self {
				t.send(csv.RunLine{Event: ev})
			}
		}
	})
	t.send(csv.RunLine{Lost: lost, Blind: !seen})
	return err
}

func (t *trial) event(r *agent.Record) *csv.RunEvent {
	ev := &csv.RunEvent{Phase: csv.PhaseBoot, Reason: r.Reason, Text: r.Text, Kind: r.Kind, Path: r.Path, Detail: r.Detail}
	switch {
	case t.smoke.IsZero() || t.install.IsZero() || r.Time.Before(t.install):
	case r.Time.Before(t.smoke):
		ev.Phase = csv.PhaseInstall
	default:
		ev.Phase = csv.PhaseSmoke
	}
	if r.Process != nil {
		if ev.Process = r.Process.Program; ev.Process == "" {
			ev.Process = r.Process.Name
		}
	}
	if d, ok := strings.CutPrefix(r.Digest, "sha256:"); ok {
		ev.SHA256 = d
	}
	var st unix.Stat_t
	if r.Path == "" || unix.Stat(r.Path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return ev
	}
	ev.Old = time.Unix(st.Ctim.Unix()).Before(t.install)
	if ev.SHA256 == "" && r.Kind != "" {
		ev.SHA256, _ = fileSHA256(r.Path)
	}
	return ev
}

// fileSHA256 is a file's SHA-256 in hex.
func fileSHA256(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
