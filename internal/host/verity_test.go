package host

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

const oneRoot = "abababababababababababababababababababababababababababababababab"

func verityParams(more string) string {
	return "1 7:0 7:1 4096 4096 2 0 sha256 " + oneRoot + " -" + more
}

// dmAnswer is an answer as the kernel lays it out.
func dmAnswer(flags uint32, targets ...dmTarget) []byte {
	b := append([]byte(nil), make([]byte, dmHeadLen)...)
	for _, x := range targets {
		s := append([]byte(nil), make([]byte, dmSpecLen)...)
		binary.NativeEndian.PutUint64(s, x.start)
		binary.NativeEndian.PutUint64(s[8:], x.length)
		copy(s[24:], x.kind)
		s = append(append(s, x.params...), 0)
		for len(s)%8 != 0 {
			s = append(s, 0)
		}
		binary.NativeEndian.PutUint32(s[20:], uint32(len(b)+len(s)-dmHeadLen))
		b = append(b, s...)
	}
	binary.NativeEndian.PutUint32(b[12:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[16:], dmHeadLen)
	binary.NativeEndian.PutUint32(b[20:], uint32(len(targets)))
	binary.NativeEndian.PutUint32(b[28:], flags)
	return b
}

func TestVerityRoot(t *testing.T) {
	verity := func(more string) dmTarget { return dmTarget{0, 16, "verity", verityParams(more)} }
	for name, c := range map[string]struct {
		flags   uint32
		targets []dmTarget
		why     string
	}{
		"plain":         {dmActive, []dmTarget{verity("")}, ""},
		"no options":    {dmActive, []dmTarget{verity(" 0")}, ""},
		"harmless":      {dmActive, []dmTarget{verity(" 4 restart_on_corruption ignore_zero_blocks root_hash_sig_key_desc check_at_most_once")}, ""},
		"fec":           {dmActive, []dmTarget{verity(" 8 use_fec_from_device 7:1 fec_roots 2 fec_blocks 9 fec_start 9")}, ""},
		"let through":   {dmActive, []dmTarget{verity(" 1 ignore_corruption")}, "corrupt"},
		"once":          {dmActive, []dmTarget{verity(" 1 check_at_most_once")}, "first time"},
		"unknown":       {dmActive, []dmTarget{verity(" 1 trust_me")}, "not known"},
		"wrong count":   {dmActive, []dmTarget{verity(" 2 restart_on_corruption")}, "unknown form"},
		"another hash":  {dmActive, []dmTarget{{0, 16, "verity", strings.Replace(verityParams(""), "sha256", "sha512", 1)}}, "not sha256"},
		"a short root":  {dmActive, []dmTarget{{0, 16, "verity", strings.Replace(verityParams(""), oneRoot, "abab", 1)}}, "not sha256"},
		"version":       {dmActive, []dmTarget{{0, 16, "verity", "2" + verityParams("")[1:]}}, "unknown form"},
		"cut":           {dmActive, []dmTarget{{0, 16, "verity", "1 7:0 7:1 4096"}}, "unknown form"},
		"half a device": {dmActive, []dmTarget{verity(""), {16, 16, "linear", "7:2 0"}}, "not all verity"},
		"not at zero":   {dmActive, []dmTarget{{8, 16, "verity", verityParams("")}}, "not all verity"},
		"linear":        {dmActive, []dmTarget{{0, 16, "linear", "7:2 0"}}, "not all verity"},
		"no table":      {0, nil, "not active"},
		"suspended":     {dmActive | dmSuspend, []dmTarget{verity("")}, "not active"},
		"another table": {dmActive | dmInactive, []dmTarget{verity("")}, "another table"},
	} {
		flags, targets, err := parseDMTable(dmAnswer(c.flags, c.targets...))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		root, why := verityRoot(flags, targets)
		if (c.why == "") != (why == "") || !strings.Contains(why, c.why) || (fmt.Sprintf("%x", root) == oneRoot) != (c.why == "") {
			t.Errorf("%s: %x, %q", name, root, why)
		}
	}
}

func TestParseDMTable_malformed(t *testing.T) {
	good := dmAnswer(dmActive, dmTarget{0, 16, "verity", "a"}, dmTarget{16, 16, "linear", "b"})
	put := func(at int, v uint32) []byte {
		b := bytes.Clone(good)
		binary.NativeEndian.PutUint32(b[at:], v)
		return b
	}
	for name, b := range map[string][]byte{
		"empty": nil, "cut head": good[:100], "size beyond": put(12, 1<<20), "start in the head": put(16, 4), "size before start": put(12, 300),
		"more targets": put(20, 3), "many targets": put(20, 1<<31), "next beyond": put(dmHeadLen+20, 1<<31), "next to itself": put(dmHeadLen+20, 0),
		"no end": dmAnswer(dmActive, dmTarget{0, 16, strings.Repeat("v", 16), "a"}),
	} {
		if _, out, err := parseDMTable(b); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, %v", name, out, err)
		}
	}
}

func TestParseDMList(t *testing.T) {
	entry := func(dev uint64, next uint32, name string) []byte {
		b := binary.NativeEndian.AppendUint64(nil, dev)
		b = binary.NativeEndian.AppendUint32(b, next)
		b = append(append(b, name...), 0)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
		return b
	}
	answer := func(body ...[]byte) []byte {
		b := append(dmAnswer(0), bytes.Join(body, nil)...)
		binary.NativeEndian.PutUint32(b[12:], uint32(len(b)))
		return b
	}
	got, err := parseDMList(answer(entry(64768, 24, "usr-verity"), entry(64769, 0, "data")))
	if err != nil || len(got) != 2 || got[0] != (dmDevice{"usr-verity", unix.Mkdev(253, 0)}) || got[1].name != "data" {
		t.Errorf("%v, %v", got, err)
	}
	for _, none := range [][]byte{answer(), answer(entry(0, 0, ""))} {
		if got, err := parseDMList(none); err != nil || len(got) != 0 {
			t.Errorf("no devices: %v, %v", got, err)
		}
	}
	for name, b := range map[string][]byte{
		"cut": answer(entry(1, 0, "a")[:10]), "next beyond": answer(entry(1, 999, "a")), "next within": answer(entry(1, 3, "a")),
		"no name": answer(entry(1, 0, "")), "long name": answer(entry(1, 0, strings.Repeat("a", 200))), "ends": answer(entry(1, 16, "a")),
	} {
		if got, err := parseDMList(b); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func FuzzDM(f *testing.F) {
	f.Add(dmAnswer(dmActive, dmTarget{0, 16, "verity", verityParams(" 1 ignore_corruption")}))
	f.Add(dmAnswer(dmActive, dmTarget{0, 16, "verity", "a"}, dmTarget{16, 16, "linear", "b"}))
	f.Add(append(dmAnswer(0), 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 'a', 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if list, err := parseDMList(b); err == nil {
			for _, d := range list {
				if d.name == "" {
					t.Error("a device without a name")
				}
			}
		}
		if flags, targets, err := parseDMTable(b); err == nil {
			if root, why := verityRoot(flags, targets); why == "" && !strings.Contains(targets[0].params, " ") {
				t.Errorf("%x", root)
			}
		}
	})
}

func TestVerityVolumes_none(t *testing.T) {
	if _, err := os.Stat(dmControl); err == nil {
		t.Skip("SKIP: this kernel has a device mapper: TestVerityVolumes_kernel tests it")
	}
	if got, err := VerityVolumes(); err != nil || got != nil {
		t.Errorf("%v, %v", got, err)
	}
}

// TestVerityVolumes_kernel makes real volumes, one sound and several not, and
// lets the kernel's device mapper tell of them.
func TestVerityVolumes_kernel(t *testing.T) {
	f, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if err != nil {
		t.Skip("SKIP: no device mapper here, run it in a guest:", err)
	}
	t.Cleanup(func() { _ = f.Close() }) // after the devices are gone
	data := bytes.Repeat([]byte("Ringwall"), 2*4096/8)
	a, b := sha256.Sum256(data[:4096]), sha256.Sum256(data[4096:])
	tree := make([]byte, 4096)
	copy(tree, a[:])
	copy(tree[32:], b[:])
	root := sha256.Sum256(tree)
	dataDev, hashDev := loopDevice(t, data), loopDevice(t, tree)
	table := fmt.Sprintf("1 %s %s 4096 4096 2 0 sha256 %x -", dataDev, hashDev, root)

	dev := mapDevice(t, f, "rw-sound", dmTarget{0, 16, "verity", table})
	mapDevice(t, f, "rw-linear", dmTarget{0, 16, "linear", dataDev + " 0"})
	loose := mapDevice(t, f, "rw-loose", dmTarget{0, 16, "verity", table + " 1 ignore_corruption"})
	mapDevice(t, f, "rw-once", dmTarget{0, 16, "verity", table + " 1 check_at_most_once"})
	// That a verity target shares a device the kernel does not allow at all.
	if err := loadTable(f, "rw-loose", dmTarget{0, 8, "verity", table}, dmTarget{8, 8, "linear", dataDev + " 0"}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("half of a device is verity: %v", err)
	}
	// A table that waits to take a sound one's place.
	mapDevice(t, f, "rw-next", dmTarget{0, 16, "verity", table})
	if err := loadTable(f, "rw-next", dmTarget{0, 16, "verity", table + " 1 ignore_corruption"}); err != nil {
		t.Fatal(err)
	}
	// Enough of them that the list does not fit the first answer.
	for i := range 130 {
		mapDevice(t, f, fmt.Sprintf("rw-%s-%d", strings.Repeat("x", 100), i), dmTarget{0, 16, "linear", dataDev + " 0"})
	}
	good, weak, err := ListVerity()
	if err != nil {
		t.Fatal(err)
	}
	if len(good) != 1 || good[0] != (VerityVolume{"rw-sound", dev, root}) {
		t.Errorf("good: %+v", good)
	}
	if len(weak) != 3 || !slices.ContainsFunc(weak, func(w WeakVolume) bool { return w.Dev == loose }) {
		t.Errorf("weak: %+v", weak)
	}
	// That the number is the one that a file on it would have, and that the
	// kernel agrees with the root.
	node := filepath.Join(t.TempDir(), "dev")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(dev)); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(node); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes through verity, %v", len(got), err)
	}
	t.Logf("volume %d:%d, %d weak", unix.Major(dev), unix.Minor(dev), len(weak))
}

// loopDevice puts data on a loop device and returns its number as "7:0".
func loopDevice(t *testing.T, data []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	back, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skip("SKIP: no loop devices here:", err)
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := os.Open(fmt.Sprintf("/dev/loop%d", n))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_FD, int(back.Fd())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0)
		_ = dev.Close()
	})
	return fmt.Sprintf("7:%d", n)
}

// mapDevice makes a mapping, as dmsetup would.
func mapDevice(t *testing.T, f *os.File, name string, targets ...dmTarget) uint64 {
	t.Helper()
	const create, remove, suspend = 3, 4, 6
	b, err := dmDo(f, create, 0, name, dmAnswer(0))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() {
		if _, err := dmDo(f, remove, 0, name, dmAnswer(0)); err != nil {
			t.Errorf("remove %s: %v", name, err)
		}
	})
	if err := loadTable(f, name, targets...); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if _, err := dmDo(f, suspend, 0, name, dmAnswer(0)); err != nil { // without the flag: resume
		t.Fatalf("%s: %v", name, err)
	}
	return binary.NativeEndian.Uint64(b[40:])
}

func loadTable(f *os.File, name string, targets ...dmTarget) error {
	const load, readOnly = 9, 1
	table := dmAnswer(0, targets...)
	at, end := dmHeadLen, 0
	for range targets { // here the offset counts from the target itself
		next := int(binary.NativeEndian.Uint32(table[at+20:]))
		binary.NativeEndian.PutUint32(table[at+20:], uint32(next-end))
		at, end = dmHeadLen+next, next
	}
	_, err := dmDo(f, load, readOnly, name, table)
	return err
}

func dmDo(f *os.File, command, flags uint32, name string, b []byte) ([]byte, error) {
	binary.NativeEndian.PutUint32(b, 4)
	binary.NativeEndian.PutUint32(b[28:], flags)
	copy(b[48:], name)
	return b, dmIoctl(f, command, b)
}

func TestFileVerity_none(t *testing.T) {
	for _, name := range []string{"/proc/self/exe", "/dev/null", "/proc/version"} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if d, ok := FileVerity(f); ok {
			t.Errorf("%s: %x", name, d)
		}
		_ = f.Close()
	}
}
