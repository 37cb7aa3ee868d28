package csv_test

import (
	"crypto/sha256"
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func link(to string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(to), Mode: fs.ModeSymlink} }

func TestTreeBaseline(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s), Mode: 0o755} }
	b := csv.TreeBaseline(fstest.MapFS{
		"usr/bin/dash": file("dash"), "usr/bin/sh": link("dash"), "bin": link("usr/bin"), "usr/bin/up": link("../../../../../usr/bin/dash"),
		"usr/bin/absolute": link("/usr/bin/sh"), "usr/bin/loop": link("pool"), "usr/bin/pool": link("loop"), "usr/bin/self": link("self"),
		"usr/bin/gone": link("nothing"), "usr/bin/through": link("dash/x"),
		"usr/lib/x86_64-linux-gnu/libz.so.1.2.13": file("z"), "usr/lib/x86_64-linux-gnu/libz.so.1": link("libz.so.1.2.13"), "usr/lib/own/libown.so": file("own"),
	})
	for name, want := range map[string]string{
		"usr/bin/sh": "dash", "bin/sh": "dash", "usr/bin/up": "dash", "usr/bin/absolute": "dash", // links end at the root
		"usr/bin/loop": "", "usr/bin/self": "", "usr/bin/gone": "", "usr/bin/through": "", "usr/bin": "", "usr/bin/dash/x": "", "": "", "../../etc/passwd": "",
	} {
		d, ok, err := b.File(name)
		if err != nil || ok != (want != "") || ok && d != integrity.Digest(sha256.Sum256([]byte(want))) {
			t.Errorf("%q: %v, %v, %v; want %q", name, d, ok, err, want)
		}
	}
	for name, want := range map[string]bool{"libz.so.1": true, "libz.so.2": false, "libown.so": false, "/usr/lib/own/libown.so": true, "../libz.so.1": false} {
		if _, ok, err := b.Library(name); ok != want || err != nil {
			t.Errorf("%q: %v, %v", name, ok, err)
		}
	}
}

func TestListBaseline(t *testing.T) {
	list := "/.\n/bin/sh\n\npackage diverts others to: /bin/sh.distrib\n/usr/lib/x86_64-linux-gnu/libz.so.1.2.13\n"
	b, err := csv.ListBaseline(strings.NewReader(list))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"usr/bin/sh": true, "bin/sh": true, "usr/bin/sh.distrib": true, "usr/bin/bash": false} {
		if d, ok, _ := b.File(name); ok != want || !d.IsZero() {
			t.Errorf("%q: %v", name, ok)
		}
	}
	for name, want := range map[string]bool{"libz.so.1": true, "libz.so": true, "libz.so.1.2.13": true, "libz.so.2": false, "ibz.so.1": false} {
		if _, ok, _ := b.Library(name); ok != want {
			t.Errorf("%q: %v", name, ok)
		}
	}
	for _, bad := range []string{"usr/bin/sh\n", "/" + strings.Repeat("a", 10_000)} {
		if _, err := csv.ListBaseline(strings.NewReader(bad)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
	// A baseline that knows the content is the better one.
	j := csv.JoinBaselines(b, csv.TreeBaseline(fstest.MapFS{"usr/bin/sh": {Data: []byte("x")}}))
	if d, ok, err := j.File("usr/bin/sh"); !ok || d.IsZero() || err != nil {
		t.Errorf("%v, %v, %v", d, ok, err)
	}
	if _, ok, err := j.Library("libz.so.1"); !ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
}

func TestSelect(t *testing.T) {
	v := &csv.Inventory{Rings: []string{"canary", "prod"}, Cells: []csv.Cell{{Ring: "prod"}, {Ring: "canary"}, {}}}
	got, err := v.Select([]string{"prod"})
	if err != nil || len(got.Cells) != 2 || got.Cells[0].Ring != "prod" || got.Cells[1].Ring != "" || strings.Join(got.Rings, " ") != "prod" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err = v.Select(nil); err != nil || len(got.Cells) != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err = v.Select([]string{"moon"}); !errors.Is(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
}
