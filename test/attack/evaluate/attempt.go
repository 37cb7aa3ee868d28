package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"ringwall/internal/errs"
)

// attempt is one technique being tried, inside its own process.
type attempt struct {
	setup
	ID     string `json:"id"`
	Token  string `json:"token"`  // 16 hexadecimal digits; the payload writes them into Marker
	Marker string `json:"marker"` // below Dir
	Dir    string `json:"dir"`    // scratch, owned by the user that tries
	As     who    `json:"as"`
	Inner  bool   `json:"inner"` // already in the user namespace
}

// answer is what an attempt's process says.
type answer struct {
	Error       string `json:"error,omitempty"`
	Unavailable bool   `json:"unavailable,omitempty"`
}

const slotMark = "RINGWALL-PAYLOAD-SLOT"

func unavailable(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errs.Unsupported)...)
}

func (a *attempt) try(t technique) error {
	if (t.Userns || t.Mounts && a.As == asUser) && !a.Inner {
		return a.again()
	}
	return t.Run(a)
}

// again runs this attempt in a new user and mount namespace, made by the user itself.
func (a *attempt) again() error {
	b := *a
	b.Inner = true
	arg, err := json.Marshal(b)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "attempt", string(arg))
	id := []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	group := []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: id, GidMappings: group}
	cmd.Stderr = os.Stderr
	raw, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("user namespace: %w", err)
	}
	var ans answer
	if err := json.Unmarshal(raw, &ans); err != nil {
		return fmt.Errorf("answer from the user namespace: %w", err)
	}
	if ans.Unavailable {
		return unavailable("%s", ans.Error)
	}
	if ans.Error != "" {
		return errors.New(ans.Error)
	}
	return nil
}

func (a *attempt) path(name string) string  { return filepath.Join(a.Dir, name) }
func (a *attempt) inKit(name string) string { return filepath.Join(a.Kit, name) }

// listed is a script that the policy authorises: an innocent program that an
// attacker feeds.
func (a *attempt) listed(name string) string { return filepath.Join(a.Kit, "authorised", name) }

// payload writes a copy of the kit's payload that nobody has seen before.
func (a *attempt) payload(kind, to string) error { return a.payloadFor(kind, to, a.Marker) }

// payloadFor is payload with a marker of another name, for techniques under which names mean something else.
func (a *attempt) payloadFor(kind, to, marker string) error {
	raw, err := os.ReadFile(a.inKit(kind))
	if err != nil {
		return err
	}
	filled, err := fillSlot(raw, a.Token, marker)
	if err != nil {
		return fmt.Errorf("%s: %w", kind, err)
	}
	if err := os.WriteFile(to, filled, 0o755); err != nil {
		return err
	}
	return os.Chmod(to, 0o755)
}

// fillSlot puts token and marker into the payload's slot.
func fillSlot(raw []byte, token, marker string) ([]byte, error) {
	at := bytes.Index(raw, []byte(slotMark))
	text := token + "\x00" + marker + "\x00"
	if at < 0 || len(text) > 500 || len(raw) < at+512 {
		return nil, fmt.Errorf("payload without room for %d bytes: %w", len(text), errs.Invalid)
	}
	out := bytes.Clone(raw)
	clear(out[at : at+512])
	copy(out[at:], text)
	return out, nil
}

// program is a fresh payload program in the scratch directory.
func (a *attempt) program(name string) (string, error) {
	p := a.path(name)
	return p, a.payload("payload", p)
}

// library is a fresh payload library in the scratch directory.
func (a *attempt) library(name string) (string, error) {
	p := a.path(name)
	return p, a.payload("payload.so", p)
}

func (a *attempt) write(name, text string) (string, error) {
	p := a.path(name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
		return "", err
	}
	return p, os.Chmod(p, 0o755)
}

// code is a payload in an interpreter's language; it writes the marker by itself.
func (a *attempt) code(language string) string {
	m, t := a.Marker, a.Token
	switch language {
	case "sh":
		return fmt.Sprintf("echo %s >%s\n", t, m)
	case "python":
		return fmt.Sprintf("open(%q,'w').write(%q)\n", m, t)
	case "perl":
		return fmt.Sprintf("open(F,'>','%s');print{F}'%s';close(F);1;\n", m, t) // no blanks: PERL5OPT splits at them
	case "lua":
		return fmt.Sprintf("local f=io.open('%s','w') f:write('%s') f:close()\n", m, t)
	case "awk":
		return fmt.Sprintf("BEGIN{printf \"%s\" > \"%s\"}\n", t, m)
	case "node":
		return fmt.Sprintf("require('fs').writeFileSync('%s','%s')\n", m, t)
	case "make":
		return fmt.Sprintf("$(file >%s,%s)\nall: ;\n", m, t)
	}
	panic("no payload in " + language)
}

// call describes a process to start.
type call struct {
	argv  []string
	env   []string // added to the plain environment
	stdin io.Reader
	dir   string
}

// run starts a program and waits for it.
func (a *attempt) run(argv ...string) error { return a.start(call{argv: argv}) }

func (a *attempt) start(c call) error {
	path, err := exec.LookPath(c.argv[0])
	if err != nil && !strings.Contains(c.argv[0], "/") {
		return unavailable("%s is not installed", c.argv[0])
	}
	if path == "" {
		path = c.argv[0]
	}
	// no limit here: the attempt as a whole has one, and ends with all that it started
	cmd := exec.Command(path, c.argv[1:]...)
	cmd.Args[0] = c.argv[0]
	cmd.Env = append(a.environment(), c.env...)
	cmd.Stdin, cmd.Dir = c.stdin, c.dir
	cmd.WaitDelay = 2 * time.Second
	said := &tail{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(c.argv[0]), err, said)
	}
	return nil
}

func (a *attempt) environment() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + a.Dir, "LANG=C.UTF-8", "TERM=dumb"}
}

// tool runs the C part of a technique, from a copy: equal programs in
// different attempts would be told apart only by the agent's counts.
func (a *attempt) tool(name string, args ...string) error {
	own := a.path("attack")
	if err := copyFile(a.inKit("attack"), own); err != nil {
		return err
	}
	return a.run(append([]string{own, name, a.Token, a.Marker}, args...)...)
}

// observed writes the marker for techniques whose effect only the evaluator can see.
func (a *attempt) observed() error { return os.WriteFile(a.Marker, []byte(a.Token), 0o600) }

// ran tells whether the payload has left its token.
func (a *attempt) ran() bool { return markerHolds(a.Marker, a.Token) }

// await waits for the marker of a payload that somebody else starts.
func (a *attempt) await(limit time.Duration) error {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if a.ran() {
			return nil
		}
	}
	return errors.New("nobody started the payload")
}

func markerHolds(path, token string) bool {
	raw, err := os.ReadFile(path)
	return err == nil && strings.TrimSpace(string(raw)) == token
}

// tail keeps the last bytes written to it.
type tail struct{ kept []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	if n := len(t.kept) - 300; n > 0 {
		t.kept = append(t.kept[:0], t.kept[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.Join(strings.Fields(string(t.kept)), " ") }

// copyFile copies an authorised file, byte for byte.
func copyFile(from, to string) error {
	raw, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, raw, 0o755)
}
