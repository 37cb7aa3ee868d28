package sim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"ringwall/internal/api"
)

// Server is `ringwall server` in a process of its own.
type Server struct {
	Dir    string // data is below it, the log is Dir/server.log
	URL    string
	CA     []byte      // PEM
	Client *api.Client // as the local administrator

	program string
	cmd     *exec.Cmd
	log     *os.File
}

// Build compiles ringwall once.
func Build(ctx context.Context, dir string) (string, error) {
	out := filepath.Join(dir, "ringwall")
	c := exec.CommandContext(ctx, "go", "build", "-o", out, "ringwall/cmd/ringwall")
	if b, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, b)
	}
	return out, nil
}

// StartServer starts a server on a directory, with more arguments.
func StartServer(ctx context.Context, program, dir string, args ...string) (*Server, error) {
	s := &Server{Dir: dir, program: program}
	if err := s.start(ctx, args...); err != nil {
		return nil, fmt.Errorf("start server: %w", err)
	}
	return s, nil
}

func (s *Server) start(ctx context.Context, args ...string) error {
	var err error
	if s.log, err = os.OpenFile(filepath.Join(s.Dir, "server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	data := filepath.Join(s.Dir, "data")
	s.cmd = exec.CommandContext(ctx, s.program, append([]string{"server", "--data", data, "--listen", "127.0.0.1:0"}, args...)...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	in := bufio.NewReader(out)
	for s.URL == "" {
		line, err := in.ReadString('\n')
		_, _ = s.log.WriteString(line)
		if err != nil {
			return fmt.Errorf("it ended: %w", errors.Join(err, s.cmd.Wait()))
		}
		if _, rest, ok := strings.Cut(line, "serving on "); ok {
			s.URL = strings.TrimSpace(rest)
		}
	}
	go func() { _, _ = io.Copy(s.log, in) }()
	if s.CA, err = os.ReadFile(filepath.Join(data, "tls/ca.crt")); err != nil {
		return err
	}
	token, err := os.ReadFile(filepath.Join(data, "break-glass.token"))
	if err != nil {
		return err
	}
	s.Client, err = api.NewClient(s.URL, s.CA, strings.TrimSpace(string(token)))
	if err != nil {
		return err
	}
	_, err = s.Ringwall(ctx, "", "login", "--server", s.URL, "--ca", filepath.Join(data, "tls/ca.crt"), "--token-file", filepath.Join(data, "break-glass.token"))
	return err
}

// Stop ends the server as an operator does.
func (s *Server) Stop() {
	_ = s.cmd.Process.Signal(os.Interrupt)
	kill := time.AfterFunc(15*time.Second, func() { _ = s.cmd.Process.Kill() })
	_ = s.cmd.Wait()
	kill.Stop()
	_ = s.log.Close()
}

// Ringwall runs a command as the administrator and returns what it printed.
func (s *Server) Ringwall(ctx context.Context, stdin string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, s.program, args...)
	c.Env = append(os.Environ(), "RINGWALL_SESSION="+filepath.Join(s.Dir, "admin.session"))
	c.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("ringwall %s: %w: %s%s", strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.String(), nil
}

// Put stores a document of the tree.
func (s *Server) Put(ctx context.Context, id string, properties any) error {
	body, err := json.Marshal(map[string]any{"properties": properties})
	if err != nil {
		return err
	}
	_, _, err = s.Client.Do(ctx, api.Request{Method: http.MethodPut, Path: id, Body: body})
	return err
}

// Use is what a process has used up to now.
type Use struct {
	CPU time.Duration
	RSS int64 // bytes, now
}

// Use tells what the server has used.
func (s *Server) Use() (Use, error) {
	var u Use
	dir := "/proc/" + strconv.Itoa(s.cmd.Process.Pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return u, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const user, system, ticks = 11, 12, 100 // proc(5), from the third field on; USER_HZ
	for _, f := range []string{fields[user], fields[system]} {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return u, err
		}
		u.CPU += time.Duration(n) * time.Second / ticks
	}
	pages, err := os.ReadFile(dir + "/statm")
	if err != nil {
		return u, err
	}
	n, err := strconv.ParseInt(strings.Fields(string(pages))[1], 10, 64)
	u.RSS = n * int64(os.Getpagesize())
	return u, err
}

// Document reads a document's properties.
func (s *Server) Document(ctx context.Context, id string, v any) error {
	b, _, err := s.Client.Do(ctx, api.Request{Method: http.MethodGet, Path: id})
	if err != nil {
		return err
	}
	return json.Unmarshal(b, &struct {
		Properties any `json:"properties"`
	}{v})
}
