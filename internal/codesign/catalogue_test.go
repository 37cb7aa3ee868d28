package codesign_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func digest(b byte) integrity.Digest { return integrity.Digest{0: b, 31: b} }

func records(n int) []codesign.Record {
	var rs []codesign.Record
	for i := range n {
		rs = append(rs, codesign.Record{Digest: digest(byte(i * 3)), Verity: digest(byte(i)), Kinds: integrity.SetOf(integrity.KindExec)})
	}
	return rs
}

func TestCatalogue_roundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 2, 50} {
		rs := records(n)
		for i, j := 0, len(rs)-1; i < j; i, j = i+1, j-1 {
			rs[i], rs[j] = rs[j], rs[i] // order does not matter
		}
		blob, err := codesign.EncodeCatalogue(rs)
		if err != nil {
			t.Fatal(err)
		}
		c, err := codesign.ParseCatalogue(blob)
		if err != nil {
			t.Fatal(err)
		}
		var got []codesign.Record
		for _, r := range c.All() {
			got = append(got, r)
		}
		if d := cmp.Diff(records(n), got); d != "" || c.Len() != n || c.Classifier() != codesign.ClassifierVersion {
			t.Error(d)
		}
		for _, r := range got {
			if f, ok := c.Lookup(r.Digest); !ok || f != r {
				t.Errorf("%v not found", r.Digest)
			}
		}
		for _, d := range []integrity.Digest{digest(1), digest(2), digest(255), {}} {
			if _, ok := c.Lookup(d); ok != (d == digest(0) && n > 0) {
				t.Errorf("%v found in %d records", d, n)
			}
		}
	}
}

func TestEncodeCatalogue_merges(t *testing.T) {
	script, exec := integrity.SetOf(integrity.KindScript), integrity.SetOf(integrity.KindExec)
	for name, c := range map[string]struct{ in, want []codesign.Record }{
		"kinds unite": {
			[]codesign.Record{{Digest: digest(1), Kinds: exec}, {Digest: digest(1), Kinds: script, Flags: codesign.FlagSetID}},
			[]codesign.Record{{Digest: digest(1), Kinds: exec | script, Flags: codesign.FlagSetID}},
		},
		"code is not data": {
			[]codesign.Record{{Digest: digest(1), Kinds: script, Flags: codesign.FlagData}, {Digest: digest(1), Kinds: script}},
			[]codesign.Record{{Digest: digest(1), Kinds: script}},
		},
		"data twice stays data": {
			[]codesign.Record{{Digest: digest(1), Kinds: script, Flags: codesign.FlagData}, {Digest: digest(1), Kinds: script, Flags: codesign.FlagData}},
			[]codesign.Record{{Digest: digest(1), Kinds: script, Flags: codesign.FlagData}},
		},
		"capabilities stay, nested only while it is nowhere else": {
			[]codesign.Record{{Digest: digest(1), Kinds: exec, Flags: codesign.FlagNested | codesign.FlagCaps}, {Digest: digest(1), Kinds: exec}},
			[]codesign.Record{{Digest: digest(1), Kinds: exec, Flags: codesign.FlagCaps}},
		},
		"a file is not only inner": {
			[]codesign.Record{{Digest: digest(1), Kinds: exec, Flags: codesign.FlagInner}, {Digest: digest(1), Verity: digest(9), Kinds: exec}},
			[]codesign.Record{{Digest: digest(1), Verity: digest(9), Kinds: exec}},
		},
	} {
		blob, err := codesign.EncodeCatalogue(c.in)
		if err != nil {
			t.Fatal(err)
		}
		p, err := codesign.ParseCatalogue(blob)
		if err != nil {
			t.Fatal(err)
		}
		var got []codesign.Record
		for _, r := range p.All() {
			got = append(got, r)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// What was signed by the rules of yesterday must not become unreadable.
func TestParseCatalogue_classifier1(t *testing.T) {
	blob, err := codesign.EncodeCatalogue(records(3))
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint16(blob[10:], 1)
	c, err := codesign.ParseCatalogue(blob)
	if err != nil || c.Classifier() != 1 || c.Len() != 3 {
		t.Errorf("%v %v", c, err)
	}
}

func TestParseCatalogue_refuses(t *testing.T) {
	good, err := codesign.EncodeCatalogue(records(3))
	if err != nil {
		t.Fatal(err)
	}
	edit := func(f func(b []byte)) []byte { b := bytes.Clone(good); f(b); return b }
	const header, record = 32, 68
	for name, b := range map[string][]byte{
		"empty":          nil,
		"header only":    good[:header],
		"cut":            good[:len(good)-1],
		"trailing":       append(bytes.Clone(good), 0),
		"magic":          edit(func(b []byte) { b[0] = 'X' }),
		"version":        edit(func(b []byte) { b[8] = 2 }),
		"no classifier":  edit(func(b []byte) { b[10] = 0 }),
		"huge count":     edit(func(b []byte) { binary.LittleEndian.PutUint32(b[12:], 1<<32-1) }),
		"reserved":       edit(func(b []byte) { b[31] = 1 }),
		"no kinds":       edit(func(b []byte) { b[header+64] = 0 }),
		"kind zero":      edit(func(b []byte) { b[header+64] = 1 }),
		"kind bpf":       edit(func(b []byte) { b[header+64] |= 1 << integrity.KindBPF }),
		"unknown kind":   edit(func(b []byte) { b[header+65] = 1 }),
		"unknown flag":   edit(func(b []byte) { b[header+67] = 0x80 }),
		"out of order":   edit(func(b []byte) { b[header] = 200 }),
		"record repeats": edit(func(b []byte) { copy(b[header+record:], b[header:header+record]) }),
	} {
		if _, err := codesign.ParseCatalogue(b); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func nameTable(t testing.TB) (*codesign.Catalogue, *codesign.NameTable, []byte) {
	t.Helper()
	blob, err := codesign.EncodeCatalogue(records(3))
	if err != nil {
		t.Fatal(err)
	}
	c, err := codesign.ParseCatalogue(blob)
	if err != nil {
		t.Fatal(err)
	}
	n := &codesign.NameTable{
		Catalogue: c.Digest(),
		Names: [][]codesign.Name{
			{{Path: "usr/bin/a", Mode: 0o755, Origin: "data"}, {Path: "b\xff\n", Mode: fs.ModeSetuid | 0o755, Origin: "data"}},
			{{Path: "DEBIAN/postinst", Mode: 0o755, Origin: "control"}},
			{{Path: "c", Mode: 0o644}},
		},
		Others: []codesign.Name{{Path: "l", Mode: fs.ModeSymlink | 0o777, Origin: "data", Target: "../x"}},
	}
	enc, err := n.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return c, n, enc
}

func TestNames(t *testing.T) {
	c, n, enc := nameTable(t)
	got, err := codesign.ParseNames(enc, c)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(n, got); d != "" {
		t.Error(d)
	}
	otherBlob, err := codesign.EncodeCatalogue(records(2))
	if err != nil {
		t.Fatal(err)
	}
	other, err := codesign.ParseCatalogue(otherBlob)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := codesign.ParseNames(enc, other); !errors.Is(err, errs.Untrusted) {
		t.Errorf("names of another catalogue: %v", err)
	}
	for name, b := range map[string][]byte{"empty": nil, "cut": enc[:len(enc)-1], "not zstd": []byte("hello")} {
		if _, err := codesign.ParseNames(b, c); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseCatalogue(f *testing.F) {
	for _, n := range []int{0, 1, 4} {
		b, err := codesign.EncodeCatalogue(records(n))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := codesign.ParseCatalogue(b)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Errorf("error of no kind: %v", err)
			}
			return
		}
		var rs []codesign.Record
		for _, r := range c.All() {
			rs = append(rs, r)
		}
		again, err := codesign.EncodeCatalogue(rs)
		if err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint16(again[10:], uint16(c.Classifier()))
		if !bytes.Equal(again, b) {
			t.Errorf("two encodings of one catalogue")
		}
	})
}

func FuzzParseNames(f *testing.F) {
	c, _, enc := nameTable(f)
	f.Add(enc)
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := codesign.ParseNames(b, c)
		if err == nil && len(n.Names) != c.Len() {
			t.Error("wrong number of names")
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}
