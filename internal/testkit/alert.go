package testkit

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// FreePort is a TCP port on 127.0.0.1 that nobody had a moment ago.
func FreePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port
}

// start runs a server until the test ends, and waits until ready.
func start(t testing.TB, fix string, ready func() bool, argv ...string) {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no %s here; fix: apt-get install %s", argv[0], fix)
	}
	var out bytes.Buffer
	c := exec.Command(argv[0], argv[1:]...)
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Signal(os.Interrupt)
		kill := time.AfterFunc(3*time.Second, func() { _ = c.Process.Kill() })
		_ = c.Wait()
		kill.Stop()
	})
	for range 1000 {
		if ready() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	_ = c.Process.Kill()
	_ = c.Wait()
	t.Fatalf("%s does not start:\n%s", argv[0], out.String())
}

// StartAlertmanager runs Prometheus' Alertmanager, which tells what it gets to a
// webhook, and returns its URL. It skips the test, loudly, where there is none.
func StartAlertmanager(t testing.TB, webhook string) string {
	t.Helper()
	dir := t.TempDir()
	conf := filepath.Join(dir, "alertmanager.yml")
	text := fmt.Sprintf(`route: {receiver: test, group_by: [incident], group_wait: 100ms, group_interval: 500ms, repeat_interval: 1h}
receivers: [{name: test, webhook_configs: [{url: %q, send_resolved: true}]}]
`, webhook)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", FreePort(t))
	start(t, "prometheus-alertmanager", func() bool {
		resp, err := http.Get("http://" + address + "/-/ready") //nolint:noctx // a test's own server
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}, "prometheus-alertmanager", "--config.file="+conf, "--storage.path="+filepath.Join(dir, "data"), "--web.listen-address="+address, "--cluster.listen-address=")
	return "http://" + address
}

// MailServer is a real SMTP server of a test's own.
type MailServer struct {
	Address string
	// Domain is of this server's recipients alone: what another left in the queue
	// that all of them have is not counted.
	Domain string
	dir    string
}

// StartMailServer runs OpenSMTPD on loopback, without TLS. It skips the test,
// loudly, where there is none or where the test is not root.
func StartMailServer(t testing.TB) *MailServer {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: OpenSMTPD needs root")
	}
	// all of them have one queue, so there must be one at a time on a machine
	lock, err := os.OpenFile(filepath.Join(os.TempDir(), "rwmail.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lock.Close() })
	dir, err := os.MkdirTemp("", "rwmail") // the user nobody writes there
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	port := FreePort(t)
	m := &MailServer{Address: fmt.Sprintf("127.0.0.1:%d", port), Domain: strings.ToLower(rand.Text()) + ".example.com", dir: filepath.Join(dir, "mail")}
	conf := fmt.Sprintf(`listen on 127.0.0.1 port %d
action "keep" mda "/bin/sh -c 'cat > %s/new.$$ && mv %s/new.$$ %s/mail.$$'" virtual { "@" = "nobody" }
match from any for any action "keep"
`, port, m.dir, m.dir, m.dir)
	file := filepath.Join(dir, "smtpd.conf")
	for _, err := range []error{
		os.Chmod(dir, 0o755), os.Mkdir(m.dir, 0o700), os.Chmod(m.dir, 0o777), os.WriteFile(file, []byte(conf), 0o600), //nolint:gosec // for mail of a test
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	start(t, "opensmtpd", func() bool {
		c, err := net.Dial("tcp", m.Address)
		if err != nil {
			return false
		}
		_ = c.Close()
		return true
	}, "smtpd", "-d", "-f", file)
	return m
}

// Wait returns the mails once there are n, or fails the test after a while.
func (m *MailServer) Wait(t testing.TB, n int) []string {
	t.Helper()
	var out []string
	for range 1000 {
		out = nil
		entries, err := os.ReadDir(m.dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), "mail.") {
				continue
			}
			b, err := os.ReadFile(filepath.Join(m.dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(b), "@"+m.Domain) {
				out = append(out, string(b))
			}
		}
		if len(out) >= n {
			return out
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("%d mails, want %d", len(out), n)
	return nil
}
