package enforce

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// Programs start while the policy is exchanged a thousand times: no verdict may
// be one that neither policy gives.
func TestSwaps(t *testing.T) {
	l := newLab(t)
	swaps := 1000
	if testing.Short() {
		swaps = 50
	}
	good, evil := l.file("good", tinyELF()), l.file("evil", append(tinyELF(), "unlisted"...))
	l.allow(tinyELF(), 0, 0)
	// The other policy audits what this one enforces, and lists what this one does not.
	other := l.table
	other.Epoch = 8
	other.Entries = map[integrity.Key]integrity.Entry{}
	for k := range other.Modes {
		other.Modes[k] = integrity.ModeAudit
	}
	l.apply()
	var done atomic.Bool
	type result struct{ runs, wrong, refused int }
	load := func(path string, wrong func(error) bool) chan result {
		out := make(chan result)
		go func() {
			var r result
			for !done.Load() {
				err := l.run(path)
				r.runs++
				if wrong(err) {
					r.wrong++
				}
				if err != nil {
					r.refused++
				}
			}
			out <- r
		}()
		return out
	}
	goods := load(good, func(err error) bool { return err != nil }) // allowed or audited: it always runs
	evils := load(evil, func(err error) bool { return err != nil && !errors.Is(err, unix.EPERM) && !killed(err) })
	start := time.Now()
	for i := range swaps {
		table := &l.table
		if i%2 == 0 {
			table = &other
		}
		if err := l.e.Apply(table); err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(start)
	done.Store(true)
	g, e := <-goods, <-evils
	t.Logf("%d swaps in %v; listed program ran %d times, unlisted %d times of which %d were refused", swaps, took, g.runs, e.runs, e.refused)
	if g.wrong != 0 || e.wrong != 0 || g.runs == 0 || e.runs == 0 {
		t.Errorf("wrong verdicts: %d of %d for the listed program, %d of %d for the other", g.wrong, g.runs, e.wrong, e.runs)
	}
}

// killed: the policy became strict between execve and the program's first mapping.
func killed(err error) bool { return refusedWith(err, -1) }

func TestMillionDigests(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	l := newLab(t)
	good := l.file("good", tinyELF())
	l.allow(tinyELF(), 0, 0)
	const n = 1_000_000
	for i := range uint64(n) {
		var seed [8]byte
		binary.LittleEndian.PutUint64(seed[:], i)
		l.table.Entries[integrity.Key{Digest: sha256.Sum256(seed[:])}] = integrity.Entry{Kinds: integrity.SetOf(integrity.KindLibrary)}
	}
	start := time.Now()
	l.apply()
	took := time.Since(start)
	info, err := l.e.table.Info()
	if err != nil {
		t.Fatal(err)
	}
	size, _ := info.Memlock()
	t.Logf("%d digests: filled and put in force in %v, %d MiB of kernel memory", len(l.table.Entries), took, size>>20)
	if err := l.run(good); err != nil {
		t.Error(err)
	}
	clear(l.table.Entries)
	runtime.GC()
}

// The kernel's verdict is that of integrity.Evaluate, for content of all sorts.
func TestAgainstEvaluate(t *testing.T) {
	l := newLab(t)
	now := time.Now()
	p := &integrity.Policy{Name: "test", Epoch: 9, Modes: l.table.Modes}
	kinds := []integrity.KindSet{
		0, integrity.SetOf(integrity.KindExec), integrity.SetOf(integrity.KindLibrary), integrity.SetOf(integrity.KindScript),
		integrity.SetOf(integrity.KindExec, integrity.KindLibrary), integrity.SetOf(integrity.KindModule),
	}
	contents := map[string][]byte{}
	for i, set := range kinds {
		for j, banned := range []bool{false, true} {
			name := string(rune('a'+i)) + string(rune('0'+j))
			contents[name] = canaryProgram("amd64", "case "+name)
			d := integrity.Digest(sha256.Sum256(contents[name]))
			p.Allow = append(p.Allow, integrity.AllowRule{Rule: "allow-" + name, Kinds: set, SHA256: []integrity.Digest{d}})
			if banned {
				p.Deny = append(p.Deny, integrity.DenyRule{Rule: "deny-" + name, SHA256: []integrity.Digest{d}, Reason: "test"})
			}
		}
	}
	contents["unknown"] = canaryProgram("amd64", "unknown")
	self := integrity.Digest(sha256.Sum256(l.read("/proc/self/exe")))
	compiled, err := integrity.Compile(p, nil, integrity.CompileOptions{Self: self, Canary: CanaryDigest(), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.e.Apply(compiled.Table); err != nil {
		t.Fatal(err)
	}
	want := func(kind integrity.Kind, b []byte) bool {
		return integrity.Evaluate(p, &integrity.Object{Kind: kind, SHA256: sha256.Sum256(b)}, now).Allow
	}
	for name, b := range contents {
		path := l.file(name, b)
		// a program is mapped too: as one that may be executed, or as a library
		exec, library := want(integrity.KindExec, b), want(integrity.KindLibrary, b)
		if got := l.run(path) == nil; got != exec {
			t.Errorf("%s as a program: kernel says %v, Evaluate %v", name, got, exec)
		}
		if got := l.role("mmap-exec", path) == nil; got != (exec || library) {
			t.Errorf("%s as a library: kernel says %v, Evaluate %v", name, got, exec || library)
		}
		if got, want := refusedWith(l.role("finit-module", path), 2), want(integrity.KindModule, b); got != want {
			t.Errorf("%s as a module: kernel says %v, Evaluate %v", name, got, want)
		}
	}
}
