package host

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

func listen(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func TestNotify(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify("READY=1"); err != nil {
		t.Errorf("nobody waits: %v", err)
	}
	dir := t.TempDir()
	for _, name := range []string{filepath.Join(dir, "notify"), "@ringwall-test-" + strings.ReplaceAll(dir, "/", "-")} {
		l := listen(t, name)
		t.Setenv("NOTIFY_SOCKET", name)
		if err := Notify("READY=1\nSTATUS=x"); err != nil {
			t.Error(err)
		}
		b := make([]byte, 100)
		if n, err := l.Read(b); err != nil || string(b[:n]) != "READY=1\nSTATUS=x" {
			t.Errorf("%q, %v", b[:n], err)
		}
		var err error
		for i := 0; err == nil && i < 100_000; i++ {
			err = Notify("WATCHDOG=1") // nobody reads: it must not wait
		}
		if !errors.Is(err, unix.EAGAIN) {
			t.Errorf("a full socket: %v", err)
		}
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "gone"))
	if err := Notify("READY=1"); !errors.Is(err, errs.NotFound) {
		t.Errorf("no socket: %v", err)
	}
}
