// Package testkit holds what tests of several packages need and no product code
// may import.
package testkit

import (
	"bytes"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Postgres is a PostgreSQL server of a test's own, on a socket in a temporary
// directory; it ends with the test.
type Postgres struct {
	t      testing.TB
	bin    string
	dir    string
	cred   *syscall.SysProcAttr
	server *exec.Cmd
	count  int
}

// StartPostgres makes a cluster and starts it. It skips the test, loudly, where
// PostgreSQL is not installed.
func StartPostgres(t testing.TB) *Postgres {
	t.Helper()
	p := newPostgres(t)
	t.Cleanup(p.remove)
	p.begin()
	return p
}

// Shared is one server for all tests of a package, each with a database of its
// own: making a server takes much longer than most tests. TestMain closes it.
type Shared struct {
	mu     sync.Mutex
	server *Postgres
}

// Database makes an empty database and returns its URL.
func (s *Shared) Database(t testing.TB) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil {
		p := newPostgres(t)
		p.begin()
		s.server = p
	}
	s.server.t = t
	return s.server.Database()
}

// Close ends the server, if there is one.
func (s *Shared) Close() {
	if s.server != nil {
		s.server.remove()
	}
}

func newPostgres(t testing.TB) *Postgres {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Skip("SKIPPED, NOT TESTED: no PostgreSQL here; fix: apt-get install postgresql")
	}
	dir, err := os.MkdirTemp("", "rwpg") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	return &Postgres{t: t, bin: filepath.Dir(found[len(found)-1]), dir: dir, cred: &syscall.SysProcAttr{Pdeathsig: syscall.SIGINT}}
}

func (p *Postgres) remove() {
	p.Stop()
	_ = os.RemoveAll(p.dir)
}

func (p *Postgres) begin() {
	p.t.Helper()
	t, dir := p.t, p.dir
	if os.Geteuid() == 0 { // it refuses to run as root
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Skipf("SKIPPED, NOT TESTED: PostgreSQL does not run as root, and there is no user for it: %v", err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		p.cred.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	p.run("initdb", "-D", filepath.Join(dir, "data"), "-A", "trust", "-U", "ringwall", "-E", "UTF8", "--no-sync")
	p.Start()
}

func (p *Postgres) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(p.bin, name), args...)
	cmd.Dir, cmd.SysProcAttr = p.dir, p.cred
	return cmd
}

func (p *Postgres) run(name string, args ...string) {
	p.t.Helper()
	if out, err := p.command(name, args...).CombinedOutput(); err != nil {
		p.t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// Start starts the server again after Stop.
func (p *Postgres) Start() {
	p.t.Helper()
	p.server = p.command("postgres", "-D", filepath.Join(p.dir, "data"), "-k", p.dir, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50")
	var log bytes.Buffer
	p.server.Stderr = &log
	if err := p.server.Start(); err != nil {
		p.t.Fatal(err)
	}
	for range 300 {
		if p.command("pg_isready", "-q", "-h", p.dir, "-U", "ringwall", "-d", "postgres").Run() == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	p.t.Fatalf("PostgreSQL does not start:\n%s", log.String())
}

// Stop ends the server at once, as a crash of its machine would.
func (p *Postgres) Stop() {
	if p.server != nil {
		_ = p.server.Process.Signal(syscall.SIGQUIT)
		_ = p.server.Wait()
		p.server = nil
	}
}

// Database makes an empty database and returns its URL.
func (p *Postgres) Database() string {
	p.t.Helper()
	p.count++
	name := fmt.Sprintf("test%d", p.count)
	p.run("createdb", "-h", p.dir, "-U", "ringwall", name)
	return "postgres://ringwall@/" + name + "?host=" + url.QueryEscape(p.dir)
}
