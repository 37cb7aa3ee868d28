package agent

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A service manager that does not listen yet, or is busy, is told that the agent
// is ready all the same.
func TestTellReady_untilHeard(t *testing.T) {
	name := filepath.Join(t.TempDir(), "notify")
	t.Setenv("NOTIFY_SOCKET", name)
	done := make(chan struct{})
	go func() {
		tellReady(t.Context(), Status{State: StateEnforcing, Text: "x"})
		close(done)
	}()
	time.Sleep(250 * time.Millisecond)
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 200)
	n, err := c.Read(b)
	if err != nil || !strings.HasPrefix(string(b[:n]), "READY=1\n") {
		t.Errorf("%q, %v", b[:n], err)
	}
	<-done
}
