package enforce

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"ringwall/internal/integrity"
)

const (
	canaryDigestAMD64 = "c40929f3c87485db93ca4fd0354d93118dd856cc515253b6c1a08137b9e8e65e"
	canaryDigestARM64 = "5e943471fbbf3191f3748e0a2af8c0210139aba8a4d8258547b1f957f2031d74"
)

func rawEvent() engineEvent {
	var e engineEvent
	e.Seq, e.Kind, e.Reason, e.Mode, e.Tgid = 5, uint16(integrity.KindScript), uint16(Inline), uint8(integrity.ModeEnforce), 77
	copy(e.Path[:], []int8{'/', 'x'})
	e.Ancestors[0].Tgid, e.Ancestors[1].Tgid, e.Ancestors[2].Tgid = 9, 1, 8
	return e
}

func TestParseEvent(t *testing.T) {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.NativeEndian, rawEvent()); err != nil {
		t.Fatal(err)
	}
	e, err := parseEvent(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	// nothing is above process 1
	if e.Seq != 5 || e.Kind != integrity.KindScript || e.Reason != Inline || !e.Refused || e.Path != "/x" || e.TGID != 77 || len(e.Ancestors) != 2 {
		t.Errorf("%+v", e)
	}
	if _, err := parseEvent(b.Bytes()[:b.Len()-1]); err == nil {
		t.Error("a short record was accepted")
	}
	for r := Unlisted; r <= Userfault; r++ {
		if r.Text() == "" || r.String() == "" || strings.HasPrefix(r.String(), "reason(") {
			t.Errorf("reason %d has no words", r)
		}
	}
}

func FuzzParseEvent(f *testing.F) {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.NativeEndian, rawEvent()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := parseEvent(raw)
		if err == nil && (len(e.Path) > 256 || len(e.Detail) > 128 || len(e.Ancestors) > 5) {
			t.Errorf("%+v", e)
		}
	})
}

func TestParseStart(t *testing.T) {
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := parseStart(stat); err != nil || n == 0 {
		t.Errorf("%d %v", n, err)
	}
	if n, err := parseStart([]byte("1 (a) b) R" + strings.Repeat(" 0", 18) + " 42 0")); err != nil || n != 42 {
		t.Errorf("a name with a parenthesis: %d %v", n, err)
	}
}

func FuzzParseStart(f *testing.F) {
	f.Add([]byte("1 (init) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 42 0"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = parseStart(b) })
}

func TestMountDevice(t *testing.T) {
	const table = "21 1 0:20 / / rw - tmpfs x rw\n35 21 253:7 / /var rw - ext4 /dev/dm-7 rw\n36 21 x / /y rw - z z rw\n"
	if d, err := mountDevice([]byte(table), 35); err != nil || d != 253<<20|7 {
		t.Errorf("%#x %v", d, err)
	}
	for _, id := range []uint64{36, 37} {
		if d, err := mountDevice([]byte(table), id); err == nil {
			t.Errorf("mount %d: %#x", id, d)
		}
	}
}

func FuzzMountDevice(f *testing.F) {
	f.Add([]byte("21 1 0:20 / / rw - tmpfs x rw\n"), uint64(21))
	f.Fuzz(func(t *testing.T, b []byte, id uint64) { _, _ = mountDevice(b, id) })
}

func TestCanaryProgram(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		p := canaryProgram(arch, canaryMark)
		if len(p) < 130 || len(p) > 160 || !bytes.HasSuffix(p, []byte(canaryMark)) {
			t.Errorf("%s: %d bytes", arch, len(p))
		}
	}
	if canaryProgram("mips", "") != nil {
		t.Error("a program for an architecture that has none")
	}
	// policies that were compiled list this digest: it must not change by accident
	if got := CanaryDigest().String(); got != canaryDigestAMD64 && got != canaryDigestARM64 {
		t.Errorf("the canary has changed: %s", got)
	}
}

func TestStatus_state(t *testing.T) {
	enforcing := Status{Programs: []string{"rw_exec"}, Epoch: 1, Now: 100 * CanaryInterval, Canary: 99 * CanaryInterval, CanaryMode: integrity.ModeEnforce}
	enforcing.Modes[integrity.KindExec] = integrity.ModeEnforce
	change := func(fn func(*Status)) Status {
		s := enforcing
		fn(&s)
		return s
	}
	for name, c := range map[string]struct {
		s    Status
		want State
	}{
		"proved":             {enforcing, StateEnforcing},
		"no programs":        {change(func(s *Status) { s.Programs = nil }), StateOff},
		"no policy":          {change(func(s *Status) { s.Epoch = 0 }), StateOff},
		"never proved":       {change(func(s *Status) { s.Canary = 0 }), StateUnproven},
		"proved long ago":    {change(func(s *Status) { s.Canary = CanaryInterval }), StateUnproven},
		"proved for another": {change(func(s *Status) { s.CanaryMode = integrity.ModeAudit }), StateUnproven},
		"break-glass":        {change(func(s *Status) { s.RelaxedUntil = s.Now + 1 }), StateRelaxed},
		"break-glass ended":  {change(func(s *Status) { s.RelaxedUntil = s.Now }), StateEnforcing},
		"audit": {change(func(s *Status) {
			s.Modes[integrity.KindExec], s.CanaryMode = integrity.ModeAudit, integrity.ModeAudit
		}), StateAuditing},
	} {
		if got := c.s.State(); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// A map that is missing in the list is not guarded, and after a restart the
// programs get another one than the pinned one.
func TestMaps_complete(t *testing.T) {
	spec, err := loadEngine()
	if err != nil {
		t.Fatal(err)
	}
	listed := (&Engine{}).maps()
	for name := range spec.Maps {
		if _, ok := listed[name]; !ok && name[0] != '.' {
			t.Errorf("map %s is not listed", name)
		}
	}
}
