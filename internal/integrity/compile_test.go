package integrity_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// packages yields n files over 500 packages of an archive.
func packages(n int) []integrity.Source {
	var out []integrity.Source
	const count = 500
	for i := range count {
		out = append(out, integrity.Source{
			Origin: integrity.Origin{Archive: "debian", Package: fmt.Sprintf("pkg%d", i), Version: "1"},
			Files: func(yield func(integrity.File) bool) {
				for j := range n / count {
					var b [16]byte
					binary.BigEndian.PutUint64(b[:], uint64(i))
					binary.BigEndian.PutUint64(b[8:], uint64(j))
					f := integrity.File{SHA256: sha256.Sum256(b[:]), Kinds: integrity.SetOf(integrity.Kind(1 + j%3))}
					f.Verity = sha256.Sum256(f.SHA256[:])
					f.Names = []string{fmt.Sprintf("usr/lib/pkg%d/some/directory/module%d.so", i, j)}
					if !yield(f) {
						return
					}
				}
			},
		})
	}
	return out
}

func BenchmarkCompile(b *testing.B) {
	p, _ := busy()
	for _, n := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			sources := packages(n)
			for b.Loop() {
				c, err := integrity.Compile(p, sources, integrity.CompileOptions{Now: noon()})
				if err != nil || len(c.Table.Entries) != 2*n+1 { // and one ban
					b.Fatalf("%v", err)
				}
				b.StopTimer()
				var before, m runtime.MemStats
				runtime.ReadMemStats(&before)
				runtime.GC()
				runtime.ReadMemStats(&m)
				b.ReportMetric(float64(before.HeapSys>>20), "peak-MiB")
				b.ReportMetric(float64(m.HeapAlloc>>20), "kept-MiB")
				runtime.KeepAlive(c)
				b.StartTimer()
			}
		})
	}
}

func TestCompile_own(t *testing.T) {
	self, verity, canary, script := digest(60), digest(61), digest(62), digest(63)
	o := integrity.CompileOptions{Self: self, SelfVerity: verity, Canary: canary, Script: script, Now: noon()}
	c, err := integrity.Compile(&integrity.Policy{Name: "p"}, nil, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []integrity.Key{{Digest: self}, {Space: integrity.SpaceFSVerity, Digest: verity}} {
		if e := c.Table.Entries[k]; !e.Kinds.Has(integrity.KindExec) || e.Roles != integrity.RoleAgent {
			t.Errorf("agent's entry %+v", e)
		}
	}
	if e := c.Table.Entries[integrity.Key{Digest: canary}]; !e.Kinds.Has(integrity.KindExec) || e.Roles != 0 {
		t.Errorf("canary's entry %+v", e)
	}
	if e := c.Table.Entries[integrity.Key{Digest: script}]; e.Kinds != integrity.SetOf(integrity.KindScript) || e.Roles != 0 {
		t.Errorf("script's entry %+v", e)
	}
	object := c.Object(integrity.KindExec, integrity.Key{Digest: self})
	if v := c.Evaluate(&object, noon()); !v.Allow || v.Rule != "ringwall" {
		t.Errorf("agent: %+v", v)
	}
	for _, d := range []integrity.Digest{self, canary, script} {
		p := integrity.Policy{Name: "p", Deny: []integrity.DenyRule{{Rule: "d", SHA256: []integrity.Digest{d}}}}
		if _, err := integrity.Compile(&p, nil, o); !errors.Is(err, errs.Denied) {
			t.Errorf("policy denies Ringwall: %v", err)
		}
	}
}

func TestCompile_bans(t *testing.T) {
	sources := []integrity.Source{{
		Origin: integrity.Origin{Archive: "debian", Package: "nodejs"},
		Files: func(yield func(integrity.File) bool) {
			yield(integrity.File{SHA256: digest(1), Verity: digest(2), Kinds: integrity.SetOf(integrity.KindExec)})
		},
	}}
	p := integrity.Policy{
		Allow: []integrity.AllowRule{
			{Rule: "debian", Package: &integrity.PackageSet{Archive: "debian", Names: []string{"*"}}},
			{Rule: "v", FSVerity: []integrity.Digest{digest(2)}},
		},
		Deny: []integrity.DenyRule{{Rule: "d", SHA256: []integrity.Digest{digest(1), digest(3)}}},
	}
	c, err := integrity.Compile(&p, sources, integrity.CompileOptions{Now: noon()})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []integrity.Key{{Digest: digest(1)}, {Space: integrity.SpaceFSVerity, Digest: digest(2)}, {Digest: digest(3)}} {
		if e, ok := c.Table.Entries[k]; !ok || e != (integrity.Entry{}) {
			t.Errorf("%v: entry %+v, present %v; want an empty one", k, e, ok)
		}
	}
}

// What a catalogue says of the other digest must not carry an authorisation
// over: whoever may sign something could otherwise authorise anything.
func TestCompile_claimsAllowNothing(t *testing.T) {
	liar := []integrity.Source{{
		Origin: integrity.Origin{Release: digest(30), Authority: "ca9"},
		Files: func(yield func(integrity.File) bool) {
			_ = yield(integrity.File{SHA256: digest(1), Verity: digest(40), Kinds: integrity.SetOf(integrity.KindExec)}) &&
				yield(integrity.File{SHA256: digest(41), Verity: digest(2), Kinds: integrity.SetOf(integrity.KindExec)})
		},
	}}
	p := integrity.Policy{Allow: []integrity.AllowRule{
		{Rule: "s", SHA256: []integrity.Digest{digest(1)}}, {Rule: "v", FSVerity: []integrity.Digest{digest(2)}},
	}}
	o := integrity.CompileOptions{Self: digest(1), Now: noon()}
	c, err := integrity.Compile(&p, liar, o)
	if err != nil {
		t.Fatal(err)
	}
	if e, ok := c.Table.Entries[integrity.Key{Space: integrity.SpaceFSVerity, Digest: digest(40)}]; ok {
		t.Errorf("a claim about an authorised SHA-256 authorised %+v", e)
	}
	if e, ok := c.Table.Entries[integrity.Key{Digest: digest(41)}]; ok {
		t.Errorf("a claim about an authorised fs-verity digest authorised %+v", e)
	}
}

func TestCompile_bounds(t *testing.T) {
	one := func(f integrity.File) []integrity.Source {
		return []integrity.Source{{Files: func(yield func(integrity.File) bool) { yield(f) }}}
	}
	for name, sources := range map[string][]integrity.Source{
		"no digest":  one(integrity.File{}),
		"long name":  one(integrity.File{SHA256: digest(1), Names: []string{string(make([]byte, 5000))}}),
		"many names": one(integrity.File{SHA256: digest(1), Names: make([]string, 5000)}),
	} {
		if _, err := integrity.Compile(&integrity.Policy{}, sources, integrity.CompileOptions{}); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p := &integrity.Policy{}
	for i := range integrity.MaxInterpreters + 1 {
		p.Interpreters = append(p.Interpreters, integrity.InterpreterRule{
			Match: []integrity.Match{{SHA256: []integrity.Digest{digest(i)}}}, Interpreter: integrity.Interpreter{Name: fmt.Sprintf("i%d", i)},
		})
		p.Allow = append(p.Allow, integrity.AllowRule{Rule: fmt.Sprintf("a%d", i), SHA256: []integrity.Digest{digest(i)}})
	}
	if _, err := integrity.Compile(p, nil, integrity.CompileOptions{}); !errors.Is(err, errs.Invalid) {
		t.Errorf("too many interpreters: %v", err)
	}
	p.Allow = p.Allow[1:]
	c, err := integrity.Compile(p, nil, integrity.CompileOptions{})
	if err != nil || len(c.Table.Interpreters) != integrity.MaxInterpreters {
		t.Errorf("unused interpreters count: %v", err)
	}
}

func TestCompile_nextChange(t *testing.T) {
	p := &integrity.Policy{}
	for _, h := range []int{-1, 5, 3, 4} {
		p.Allow = append(p.Allow, integrity.AllowRule{SHA256: []integrity.Digest{digest(h + 1)}, Until: noon().Add(time.Duration(h) * time.Hour)})
	}
	if c, err := integrity.Compile(p, []integrity.Source{
		{Origin: integrity.Origin{NotAfter: noon().Add(time.Hour)}, Files: func(func(integrity.File) bool) {}},
		{Origin: integrity.Origin{NotAfter: noon()}, Files: func(func(integrity.File) bool) {}},
	}, integrity.CompileOptions{Now: noon()}); err != nil || !c.NextChange.Equal(noon().Add(time.Hour)) {
		t.Errorf("a break-glass release ends: %v, %v", c.NextChange, err)
	}
	c, err := integrity.Compile(p, nil, integrity.CompileOptions{Now: noon()})
	if err != nil {
		t.Fatal(err)
	}
	if want := noon().Add(3 * time.Hour); !c.NextChange.Equal(want) {
		t.Errorf("next change %v, want %v", c.NextChange, want)
	}
	if c.Table.Allows(integrity.Key{Digest: digest(0)}, integrity.KindExec) || !c.Table.Allows(integrity.Key{Digest: digest(4)}, integrity.KindExec) {
		t.Error("exceptions do not follow the time given")
	}
}
