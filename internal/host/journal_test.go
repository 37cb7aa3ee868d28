package host

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestJournalNative(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{"run/systemd/journal/x": "", "dev/x": ""})
	l := listen(t, filepath.Join(root, "run/systemd/journal/socket"))
	j := openJournal(root, "ringwall")
	if !j.Send(true, "refused /tmp/x", map[string]string{"RINGWALL_PATH": "/tmp/a\nPRIORITY=0", "_UID": "0", "lower": "x", "MESSAGE": "other", "RINGWALL_KIND": "exec"}) {
		t.Fatal("not sent")
	}
	b := make([]byte, 64<<10)
	n, err := l.Read(b)
	want := fmt.Sprintf("MESSAGE=refused /tmp/x\nPRIORITY=4\nSYSLOG_FACILITY=10\nSYSLOG_IDENTIFIER=ringwall\nSYSLOG_PID=%d\nRINGWALL_KIND=exec\nRINGWALL_PATH\n\x11\x00\x00\x00\x00\x00\x00\x00/tmp/a\nPRIORITY=0\n", os.Getpid())
	if err != nil || string(b[:n]) != want {
		t.Errorf("%q, %v; want %q", b[:n], err, want)
	}
	// Nobody reads: it drops and counts and does not wait.
	start, sent := time.Now(), 0
	for j.Send(false, strings.Repeat("x", 2*maxJournalValue), nil) {
		if sent++; sent > 100_000 {
			t.Fatal("a socket that nobody reads takes everything")
		}
	}
	if d := time.Since(start); d > 5*time.Second || j.Dropped() != 1 {
		t.Errorf("%d sent in %v, %d dropped", sent, d, j.Dropped())
	}
	if n, err := l.Read(b); err != nil || n > maxJournalValue+200 {
		t.Errorf("a long message took %d bytes, %v", n, err)
	}
	many := map[string]string{}
	for i := range 100 {
		many[fmt.Sprintf("RINGWALL_%d", i)] = strings.Repeat("y", maxJournalValue)
	}
	if n := len(j.native(4, "x", []string{"RINGWALL_1"}, many)); n < maxJournalValue || n > maxJournalEntry {
		t.Errorf("%d bytes", n)
	}
}

func TestJournalClassic(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{"dev/x": ""})
	j := openJournal(root, "ringwall")
	if j.Send(true, "nobody there", nil) || j.Dropped() != 1 {
		t.Error("sent to nobody")
	}
	l := listen(t, filepath.Join(root, "dev/log"))
	j.now = func() time.Time { return time.Date(2031, 5, 3, 7, 8, 9, 0, time.UTC) }
	if !j.Send(true, "refused\n<0>x", map[string]string{"RINGWALL_PATH": "a \"b\"\n", "RINGWALL_LONG": strings.Repeat("\n", maxJournalValue)}) {
		t.Fatal("not sent")
	}
	b := make([]byte, 64<<10)
	n, err := l.Read(b)
	if want := fmt.Sprintf("<84>May  3 07:08:09 ringwall[%d]: refused?<0>x", os.Getpid()); err != nil || string(b[:n]) != want {
		t.Errorf("%q, %v; want %q", b[:n], err, want)
	}
	if got := string(j.classic(5, "x", []string{"RINGWALL_PATH"}, map[string]string{"RINGWALL_PATH": "a \"b\"\n"})); !strings.HasSuffix(got, `]: x RINGWALL_PATH="a \"b\"\n"`) {
		t.Errorf("%q", got)
	}
}

// TestJournal_journald starts a real journald in a mount namespace of its own,
// tells it something and reads that back with journalctl.
func TestJournal_journald(t *testing.T) {
	if os.Getenv("RINGWALL_TEST_JOURNAL") != "" { // the child, inside
		if !OpenJournal("ringwall").Send(true, "refused\nin two lines", map[string]string{"RINGWALL_PATH": "/tmp/é\x01"}) {
			t.Fatal("not sent")
		}
		return
	}
	journald := "/lib/systemd/systemd-journald"
	if _, err := os.Stat(journald); err != nil || os.Getuid() != 0 {
		t.Skip("SKIP: no journald here, or not root:", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-c", `
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal /run/log/journal || exit 77
[ -s /etc/machine-id ] || { echo 0123456789abcdef0123456789abcdef >/run/mid && mount --bind /run/mid /etc/machine-id; } || exit 77
"$1" 2>/run/err & pid=$!
for i in 1 2 3 4 5 6 7 8 9 10; do [ -S /run/systemd/journal/socket ] && break; sleep 0.2; done
[ -S /run/systemd/journal/socket ] || { cat /run/err >&2; exit 77; }
RINGWALL_TEST_JOURNAL=1 "$2" -test.run 'TestJournal_journald$' >&2 || exit 1
for i in 1 2 3 4 5 6 7 8 9 10; do
	out=$(journalctl -D /run/log/journal -o json SYSLOG_IDENTIFIER=ringwall 2>/dev/null)
	[ -n "$out" ] && break
	sleep 0.3
done
printf '%s\n' "$out"
kill $pid; wait $pid
exit 0
`, "sh", journald, self)
	var said strings.Builder
	c.Stderr = &said
	out, err := c.Output()
	if c.ProcessState != nil && c.ProcessState.ExitCode() == 77 {
		t.Skip("SKIP: journald does not start here:", said.String())
	}
	var entry map[string]any
	if e := json.Unmarshal(out, &entry); err != nil || e != nil {
		t.Fatalf("%v, %v: %s %s", err, e, out, said.String())
	}
	if entry["MESSAGE"] != "refused\nin two lines" || entry["PRIORITY"] != "4" || entry["SYSLOG_FACILITY"] != "10" || entry["_UID"] != "0" {
		t.Errorf("%v", entry)
	}
	if p, ok := entry["RINGWALL_PATH"].([]any); !ok || len(p) != 8 { // bytes, as journalctl gives what is not printable
		t.Errorf("path %v", entry["RINGWALL_PATH"])
	}
}
