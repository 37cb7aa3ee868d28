package csv

import (
	"bytes"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

// scan feeds a file to a window in pieces.
func scan(b []byte, piece int) (*elfFacts, error) {
	w := &window{}
	for len(b) > 0 {
		n := min(piece, len(b))
		_, _ = w.Write(b[:n])
		b = b[n:]
	}
	if !w.read {
		w.plan()
	}
	return parseELF(w)
}

// What debug/elf reads in this machine's programs and libraries is what we
// read. It goes by section headers where we go by program headers.
func TestELF_debugELF(t *testing.T) {
	var files []string
	for _, pattern := range []string{"/usr/bin/*", "/usr/sbin/*", "/usr/lib/x86_64-linux-gnu/*.so*", "/usr/lib/aarch64-linux-gnu/*.so*"} {
		found, _ := filepath.Glob(pattern)
		files = append(files, found...)
	}
	compared := 0
	for _, name := range files {
		st, err := os.Stat(name)
		if err != nil || !st.Mode().IsRegular() || st.Size() > 8<<20 {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil || !bytes.HasPrefix(b, []byte("\x7fELF")) {
			continue
		}
		want, err := elf.NewFile(bytes.NewReader(b))
		if err != nil {
			continue
		}
		got, err := scan(b, 256<<10)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got == nil {
			if want.Type == elf.ET_EXEC || want.Type == elf.ET_DYN {
				t.Errorf("%s: taken for no program", name)
			}
			continue
		}
		compared++
		needed, _ := want.ImportedLibraries()
		if !slices.Equal(got.needed, needed) {
			t.Errorf("%s: needs %q, debug/elf %q", name, got.needed, needed)
		}
		soname, _ := want.DynString(elf.DT_SONAME)
		if strings.Join(soname, "") != got.soname {
			t.Errorf("%s: soname %q, debug/elf %q", name, got.soname, soname)
		}
		interp := ""
		for _, p := range want.Progs {
			if p.Type == elf.PT_INTERP {
				raw := make([]byte, p.Filesz)
				_, _ = p.ReadAt(raw, 0)
				interp = clean(strings.TrimRight(string(raw), "\x00"))
			}
		}
		if interp != got.interp || got.fixed != (want.Type == elf.ET_EXEC) {
			t.Errorf("%s: interpreter %q, debug/elf %q; fixed %v", name, got.interp, interp, got.fixed)
		}
	}
	if compared < 20 {
		t.Fatalf("only %d files compared", compared)
	}
	t.Logf("%d files", compared)
}

// What lies behind the head is kept where the headers speak of it, whatever
// pieces the file comes in; patchelf puts names at a file's end.
func TestELF_farAway(t *testing.T) {
	b, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Skip(err)
	}
	near, err := scan(b, len(b))
	if err != nil {
		t.Fatal(err)
	}
	// A segment of its own, far behind, holds the names and the dynamic section.
	f := &elfFile{w: &window{head: b, pos: int64(len(b))}}
	if err := f.headers(); err != nil || !f.wide {
		t.Skip("not the machine that this test was written for")
	}
	const far = 9 << 20
	size := uint64(len(b))
	moved := append(bytes.Clone(b), make([]byte, far-len(b))...)
	moved = append(moved, b...)
	for i, p := range f.progs {
		at := f.bo.Uint64(b[32:]) + uint64(i)*56
		switch p.kind {
		case ptLoad:
			f.bo.PutUint64(moved[at+8:], far+p.off)
		case ptDynamic, ptInterp:
			f.bo.PutUint64(moved[at+8:], far+p.off)
		}
	}
	for _, piece := range []int{len(moved), 256 << 10, 4093} {
		got, err := scan(moved, piece)
		if err != nil || !slices.Equal(got.needed, near.needed) || got.interp != near.interp {
			t.Fatalf("pieces of %d: %+v, %v; want %+v (%d)", piece, got, err, near, size)
		}
	}
}

func TestShebang(t *testing.T) {
	for text, want := range map[string]shebang{
		"#!/bin/sh\n":                           {interp: "usr/bin/sh", raw: "/bin/sh"},
		"#! /usr/bin/perl -w":                   {interp: "usr/bin/perl", raw: "/usr/bin/perl"},
		"#!/usr/bin/env python3\n":              {interp: "usr/bin/env", raw: "/usr/bin/env", env: "python3"},
		"#!/usr/bin/env -S -u X A=b node --x":   {interp: "usr/bin/env", raw: "/usr/bin/env", env: "node"},
		"#!/usr/bin/env\n":                      {interp: "usr/bin/env", raw: "/usr/bin/env"},
		"#!perl\n":                              {raw: "perl"},
		"#!\n":                                  {},
		"#!/opt/x/bin/tool\targ":                {interp: "opt/x/bin/tool", raw: "/opt/x/bin/tool"},
		"#!/usr/../bin/./sh\r\n":                {interp: "usr/bin/sh", raw: "/usr/../bin/./sh"},
		"#!" + strings.Repeat("/a", 200) + " x": {interp: strings.Repeat("a/", 126) + "a", raw: strings.Repeat("/a", 127)},
	} {
		got, ok := parseShebang([]byte(text))
		if !ok || got != want {
			t.Errorf("%.40q: %+v, want %+v", text, got, want)
		}
	}
	if _, ok := parseShebang([]byte("#/bin/sh")); ok {
		t.Error("no shebang, and taken for one")
	}
}

func TestScanScript(t *testing.T) {
	for text, want := range map[string]string{
		"#!/bin/sh\nset -e\nif command -v py3compile >/dev/null 2>&1; then\n  py3compile -p x\nfi\n": "py3compile",
		"if which py3compile >/dev/null; then :; fi":                                                 "",
		"# py3compile\necho 'py3compile; gcc x'\nldconfig\ndepmod -a\nupdate-mime-database x":        "",
		"dkms add x; dkms build x && dkms install x || true":                                         "dkms",
		"dkms remove x/1 --all\npy3clean -p x\nupdate-initramfs -d -k 1":                             "",
		"update-initramfs -u":                                             "update-initramfs",
		"X=1 LANG=C exec /usr/sbin/update-initramfs -u":                   "update-initramfs",
		"$(curl -fsSL https://x.example/i.sh)":                            "curl",
		"wget -qO- https://x | sh":                                        "wget",
		"python3 -m compileall /usr/lib/x":                                "py3compile",
		"/usr/bin/python3.11 -E -S /usr/lib/python3.11/py_compile.py $f":  "py3compile",
		"cat > /usr/bin/t <<EOF\ngcc inside a document\nEOF\nchmod +x /t": "chmod",
		"chmod 755 /var/lib/x\nchmod u+x /a":                              "chmod",
		"tar xzf /usr/share/x.tgz -C /opt":                                "tar",
		"tar czf /var/backups/x.tgz /etc/x":                               "",
		"apt-get remove x\npip3 install --user x":                         "pip3",
		"setcap cap_net_raw+ep /bin/ping":                                 "setcap",
		"gcc \\\n  -o x x.c":                                              "gcc",
		"make_it() { :; }\nmakefile=1\nno-make":                           "",
	} {
		var got []string
		for _, m := range scanScript([]byte(text)) {
			got = append(got, m.command)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzScanScript(f *testing.F) {
	f.Add([]byte("if x; then py3compile 'a\"b' `gcc`\ncat <<-'E'\n\tE\n\\"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got := scanScript(b); len(got) > len(makers()) {
			t.Fatalf("%d of %d commands", len(got), len(makers()))
		}
		parseShebang(b)
		archiveFormat("x.tar.gz", b)
	})
}

func TestArchiveFormat(t *testing.T) {
	tar := make([]byte, 512)
	copy(tar[257:], "ustar")
	for _, tc := range []struct{ name, head, want string }{
		{"a.zip", "PK\x03\x04", "zip"},
		{"a.docx", "PK\x03\x04", ""},
		{"blob", "PK\x03\x04", "zip"},
		{"a.1.gz", "\x1f\x8b", ""},
		{"a.tar.gz", "\x1f\x8b", "tar"},
		{"a.tgz", "\x1f\x8b", "tar"},
		{"a.tar.gz", "text", ""},
		{"a.cpio.xz", "\xfd7zXZ\x00", "cpio"},
		{"x", "hsqs", "squashfs"},
		{"x", "!<arch>\ndebian-binary", "deb"},
		{"x.a", "!<arch>\n/", ""},
		{"x", string(tar), "tar"},
		{"x", "", ""},
	} {
		if got := archiveFormat(tc.name, []byte(tc.head)); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

func FuzzReadVerdict(f *testing.F) {
	f.Add([]byte(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"a","digest":{"sha256":"` + strings.Repeat("1", 64) + `"}}],` +
		`"predicateType":"https://in-toto.io/attestation/svr/v0.1","predicate":{"verifier":{"id":"x"},"timeCreated":"2031-05-01T12:00:00Z","properties":[],` +
		`"outcome":"note","inventory":"2031-05-01T12:00:00Z","policies":[]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := readVerdict(b)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		if v.Artefact.IsZero() || v.Verifier == "" || v.Outcome.rank() < 0 {
			t.Fatalf("%+v", v)
		}
	})
}

func FuzzReadReport(f *testing.F) {
	f.Add([]byte(`{"version":1,"cells":[{}],"findings":[{"id":"CSV001","cells":[0],"members":[{"paths":["a"]}]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ReadReport(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		var out bytes.Buffer // whatever it says, it can be printed
		r.WriteText(&out, strconv.Quote)
		r.WriteMarkdown(&out)
		if err := errors.Join(r.WriteSARIF(&out, ""), r.WriteJUnit(&out)); err != nil {
			t.Fatal(err)
		}
	})
}
