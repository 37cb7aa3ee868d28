package agent

import (
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// benchLoaded is a policy in force that authorises n programs of a package.
func benchLoaded(b *testing.B, n int) *loaded {
	b.Helper()
	p := &integrity.Policy{Name: "bench", Epoch: 5}
	s := integrity.Source{
		Origin: integrity.Origin{Archive: "debian", Package: "pkg", Version: "1"},
		Files: func(yield func(integrity.File) bool) {
			for i := range n {
				f := integrity.File{SHA256: sha256.Sum256(fmt.Append(nil, i)), Kinds: integrity.SetOf(integrity.KindExec), Names: []string{fmt.Sprintf("usr/bin/program%d", i)}}
				if !yield(f) {
					return
				}
			}
		},
	}
	c, err := integrity.Compile(p, []integrity.Source{s}, integrity.CompileOptions{Now: time.Now()})
	if err != nil {
		b.Fatal(err)
	}
	return &loaded{policy: p, signed: &codesign.SignedPolicy{}, compiled: c}
}

// benchPipeline tells neither the journal nor a webhook of this machine.
func benchPipeline(b *testing.B) *pipeline {
	b.Helper()
	log, err := openLog(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(log.close)
	p := &pipeline{
		rec: recorder{host: "host-1", booted: time.Now(), lookup: host.NewLookup("/")}, log: log, now: time.Now,
		repeats: map[repeatKey]*repeat{},
	}
	p.use(benchLoaded(b, 100_000))
	return p
}

// A distinct event: explained and written to the disk.
func BenchmarkEvent_recordAndWrite(b *testing.B) {
	p := benchPipeline(b)
	e := block(1, "/tmp/evil")
	b.ReportAllocs()
	for b.Loop() {
		e.Seq++
		p.count(&e)
		r := p.rec.record(&e, p.current.Load())
		p.log.write(&r)
	}
	if p.log.lost > 0 || p.seq.lost > 0 {
		b.Fatalf("%d lines and %d events lost", p.log.lost, p.seq.lost)
	}
}

// The same event again: explained and counted.
func BenchmarkEvent_recordAndFold(b *testing.B) {
	p := benchPipeline(b)
	e := block(1, "/tmp/evil")
	first := p.rec.record(&e, p.current.Load())
	k := repeatKey{
		reason: first.Reason, kind: first.Kind, path: first.Path, detail: first.Detail, digest: first.Digest,
		program: first.Process.Program, refused: true, uid: first.Process.UID,
	}
	p.repeats[k] = &repeat{record: first, first: first.Time, last: first.Time}
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		n++
		e.Seq++
		p.count(&e)
		p.fold(p.rec.record(&e, p.current.Load()))
	}
	if p.repeats[k].count != n {
		b.Fatalf("%d of %d events were counted", p.repeats[k].count, n)
	}
}
