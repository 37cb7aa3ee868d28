package csv_test

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/integrity"
)

// manyFiles is a build of n small scripts that costs no memory itself.
type manyFiles int

func (n manyFiles) Walk(visit func(codesign.Member, io.Reader) error) error {
	for i := range int(n) {
		text := fmt.Sprintf("#!/usr/bin/env python3\nprint(%d)\n", i)
		m := codesign.Member{Path: fmt.Sprintf("usr/lib/product/part%02d/module%06d.py", i%100, i), Mode: fs.FileMode(0o644), Size: int64(len(text))}
		if err := visit(m, strings.NewReader(text)); err != nil {
			return err
		}
	}
	return nil
}

// cells are n policies that differ, each with sources of its own; half of them
// refuse everything, so that there is much to report.
func (l *lab) manyCells(n int) []csv.Cell {
	var out []csv.Cell
	base := hostHas(l.t, l, map[string]string{"usr/bin/python3.11*": elfImage{kind: 3, soname: "py"}.bytes(), "usr/bin/env*": elfImage{kind: 3, soname: "env"}.bytes()})
	for i := range n {
		rules := allowFleet
		if i%2 == 1 {
			rules = "allow:\n  - {rule: base, signer: {authority: Fleet build CA, product: base}}"
		}
		c := cell(fmt.Sprintf("r%d", i), 100, l.policy("base", i+1, "enforce", rules), base)
		out = append(out, c)
	}
	return out
}

// scale verifies n contents under twenty policies, and returns the most that
// was held when a policy was loaded.
func (l *lab) scale(n int) (*csv.Report, uint64) {
	src := manyFiles(n)
	rel := l.sign(src, codesign.ReleaseInfo{})
	cells := l.manyCells(20)
	runtime.GC()
	var before, m runtime.MemStats
	runtime.ReadMemStats(&before)
	var most uint64
	for i := range cells {
		load := cells[i].Load
		cells[i].Load = func(ctx context.Context) (*csv.Live, error) {
			runtime.GC()
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapAlloc-min(before.HeapAlloc, m.HeapAlloc))
			return load(ctx)
		}
	}
	return l.verify(src, rel, csv.Options{}, cells...), most
}

// What is held grows with the build and not with the policies: a kilobyte for
// each content is generous.
func TestVerify_scale(t *testing.T) {
	const n = 10_000
	r, most := newLab(t).scale(n)
	if r.Contents != n || r.Cells[0].Allowed != n || r.Cells[19].Blocked != n {
		t.Errorf("%+v", r.Cells[19])
	}
	if most > n<<10 {
		t.Errorf("%d KiB held", most>>10)
	}
}

// BenchmarkScale is a hundred thousand contents under twenty policies.
func BenchmarkScale(b *testing.B) {
	l := newLab(b)
	var most uint64
	var used time.Duration
	for b.Loop() {
		start := cpu()
		_, held := l.scale(100_000)
		most, used = max(most, held), used+cpu()-start
	}
	b.ReportMetric(float64(most>>20), "MiB-held")
	b.ReportMetric(used.Seconds()/float64(b.N), "CPU-s/op")
}

// cpu is what this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkTree compares a whole verification of a real tree with sha256sum of
// the same files: the ratio of CPU times is what counts on a shared machine.
func BenchmarkTree(b *testing.B) {
	dir := os.Getenv("RINGWALL_TREE")
	if dir == "" {
		dir = "/usr/lib/x86_64-linux-gnu"
	}
	if _, err := os.Stat(dir); err != nil {
		b.Skip(err)
	}
	sum := exec.Command("sh", "-c", "find \"$0\" -xdev -type f -print0 | xargs -0 sha256sum >/dev/null", dir)
	if err := sum.Run(); err != nil {
		b.Skip(err)
	}
	reference := sum.ProcessState.UserTime() + sum.ProcessState.SystemTime()
	p, err := integrity.ParsePolicy([]byte("version: 1\nname: base\nepoch: 1\nmode: enforce\n"))
	if err != nil {
		b.Fatal(err)
	}
	v := &csv.Inventory{Cells: []csv.Cell{cell("a", 1, p), cell("b", 1, p)}}
	var bytes int64
	b.ResetTimer()
	start := cpu()
	for b.Loop() {
		r, err := csv.Verify(b.Context(), csv.Candidate{
			Source: codesign.DirSource(os.DirFS(filepath.Clean(dir))), Subject: func() csv.Subject { return csv.Subject{Name: dir} },
		}, v, csv.Options{Now: time.Now()})
		if err != nil {
			b.Fatal(err)
		}
		bytes = r.Bytes
	}
	b.SetBytes(bytes)
	b.ReportMetric(float64(cpu()-start)/float64(b.N)/float64(reference), "×sha256sum")
}
