package host

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

func TestReadAptLists(t *testing.T) {
	root := t.TempDir()
	const d = "var/lib/apt/lists/"
	writeTree(t, root, map[string]string{
		d + "deb.example_debian_dists_stable_InRelease":                          "signed",
		d + "deb.example_debian_dists_stable_main_binary-amd64_Packages":         "plain",
		d + "deb.example_debian_dists_stable_non%5ffree_binary-all_Packages.lz4": "",
		d + "deb.example_debian_dists_stable_updates_InRelease":                  "signed",
		d + "deb.example_debian_dists_stable_updates_main_binary-i386_Packages":  "",
		d + "deb.example_debian_dists_stable_main_i18n_Translation-en":           "",
		d + "flat.example_repo_InRelease":                                        "signed",
		d + "flat.example_repo_Packages.gz":                                      "",
		d + "old.example_dists_x_Release":                                        "",
		d + "old.example_dists_x_Release.gpg":                                    "",
		d + "old.example_dists_x_main_binary-amd64_Packages":                     "",
		d + "deb.example_debian_dists_stable_main_binary-amd64_Packages.lzma":    "",
		d + "deb.example_debian_dists_stable_%2e%2e_%2e%2e_etc_Packages":         "",
		d + "partial/deb.example_debian_dists_stable_main_binary-amd64_Packages": "",
		d + "lock": "",
	})
	l, err := ReadAptLists(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range l.Suites {
		got = append(got, filepath.Base(s.InRelease))
		for _, p := range s.Packages {
			got = append(got, "  "+p.Name+" "+p.Arch)
		}
	}
	for _, s := range l.Skipped {
		got = append(got, "skipped "+filepath.Base(s.Path)+": "+s.Why)
	}
	want := []string{
		"deb.example_debian_dists_stable_InRelease",
		"  main/binary-amd64/Packages amd64",
		"  non_free/binary-all/Packages all",
		"  updates/main/binary-i386/Packages i386",
		"deb.example_debian_dists_stable_updates_InRelease",
		"  main/binary-i386/Packages i386",
		"flat.example_repo_InRelease",
		"  Packages ",
		"skipped deb.example_debian_dists_stable_%2e%2e_%2e%2e_etc_Packages: no InRelease beside it",
		"skipped deb.example_debian_dists_stable_main_binary-amd64_Packages.lzma: unknown compression",
		"skipped old.example_dists_x_Release.gpg: the archive has a detached signature only, no InRelease",
		"skipped old.example_dists_x_main_binary-amd64_Packages: no InRelease beside it",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if b, err := l.Suites[0].Signed(); err != nil || string(b) != "signed" {
		t.Errorf("%q, %v", b, err)
	}
	if err := os.Remove(l.Suites[0].Packages[0].Path); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Suites[0].Packages[0].Open(); !errors.Is(err, errs.NotFound) {
		t.Errorf("vanished: %v", err)
	}
	if _, err := ReadAptLists(t.TempDir()); !errors.Is(err, errs.NotFound) {
		t.Errorf("no lists: %v", err)
	}
}

// TestAptListsHere takes what apt fetched on this machine and compares each
// index with the digest that its InRelease gives, and the set with apt's own.
func TestAptListsHere(t *testing.T) {
	l, err := ReadAptLists("/")
	if err != nil {
		t.Skip("SKIP: no apt lists here:", err)
	}
	var mine []string
	for _, s := range l.Suites {
		b, err := s.Signed()
		if err != nil {
			t.Error(err)
		}
		for _, p := range s.Packages {
			r, err := p.Open()
			if err != nil {
				t.Error(err)
				continue
			}
			h := sha256.New()
			n, err := io.Copy(h, r)
			if e := r.Close(); err != nil || e != nil {
				t.Errorf("%s: %v, %v", p.Path, err, e)
			}
			sum := hex.EncodeToString(h.Sum(nil))
			i := strings.Index(string(b), "\n "+sum+" ")
			if i < 0 || !strings.HasSuffix(strings.SplitN(string(b[i+1:]), "\n", 2)[0], " "+p.Name) {
				t.Errorf("%s: %s is not listed for %s", p.Path, sum, p.Name)
			}
			t.Logf("%s %s: %d bytes", p.Arch, p.Name, n)
			mine = append(mine, p.Path)
		}
	}
	out, err := exec.CommandContext(t.Context(), "apt-get", "indextargets", "--format", "$(FILENAME)", "Created-By: Packages").Output()
	if err != nil {
		t.Skip("SKIP: apt-get indextargets:", err)
	}
	for theirs := range strings.FieldsSeq(string(out)) {
		if !slices.ContainsFunc(mine, func(m string) bool { stem, _ := cutCompression(m); return stem == theirs || m == theirs }) {
			t.Errorf("apt has %s, we do not", theirs)
		}
	}
	if len(mine) == 0 {
		t.Skip("SKIP: apt has fetched no index here")
	}
}

func TestOpenIndex(t *testing.T) {
	text := bytes.Repeat([]byte("Package: hello\nVersion: 2.10-3\nFilename: pool/h.deb\n\n"), 40_000)
	text = append(text, randomish(300_000)...) // a stored block, too
	for ext, command := range map[string][]string{
		".lz4": {"lz4", "-c"}, ".lz4 dependent, small blocks": {"lz4", "-c", "-B4", "-BD", "--content-size", "-BX"},
		".xz": {"xz", "-c"}, ".zst": {"zstd", "-c"}, ".bz2": {"bzip2", "-c"}, ".gz": {"gzip", "-c"},
	} {
		t.Run(ext, func(t *testing.T) {
			ext, _, _ = strings.Cut(ext, " ")
			if _, err := exec.LookPath(command[0]); err != nil {
				t.Skip("SKIP: no", command[0])
			}
			c := exec.CommandContext(t.Context(), command[0], command[1:]...)
			c.Stdin = bytes.NewReader(text)
			packed, err := c.Output()
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(t.TempDir(), "Packages"+ext)
			if err := os.WriteFile(name, packed, 0o600); err != nil {
				t.Fatal(err)
			}
			r, err := AptPackages{Path: name}.Open()
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if e := r.Close(); err != nil || e != nil || !bytes.Equal(got, text) {
				t.Errorf("%d bytes of %d, %v, %v", len(got), len(text), err, e)
			}
			// Cut short: never quietly less.
			r2, err := openIndex(bytes.NewReader(packed[:len(packed)/2]), ext)
			if err == nil {
				_, err = io.ReadAll(r2)
			}
			if err == nil {
				t.Error("half of the file was read without an error")
			}
		})
	}
	if _, err := openIndex(nil, ".lzma"); !errors.Is(err, errs.Unsupported) {
		t.Errorf("lzma: %v", err)
	}
	if _, err := openIndex(strings.NewReader("x"), ".gz"); !errors.Is(err, errs.Invalid) {
		t.Errorf("no gzip: %v", err)
	}
}

func TestLZ4Refuses(t *testing.T) {
	head := "\x04\x22\x4d\x18\x60\x40\x82"
	block := func(b string) string { return head + string([]byte{byte(len(b)), 0, 0, 0}) + b }
	for name, in := range map[string]string{
		"magic":             "\x05\x22\x4d\x18\x60\x40\x82",
		"version":           "\x04\x22\x4d\x18\xa0\x40\x82",
		"dictionary":        "\x04\x22\x4d\x18\x61\x40\x82\x00\x00\x00\x00",
		"half head":         head[:5],
		"no blocks":         head,
		"big block":         head + "\xff\xff\x7f\x00",
		"half block":        head + "\x09\x00\x00\x00x",
		"literals beyond":   block("\x50ab"),
		"offset zero":       block("\x11a\x00\x00"),
		"offset beyond":     block("\x11a\x02\x00"),
		"half offset":       block("\x11a\x02"),
		"ends with match":   block("\x11a\x01\x00"),
		"more than a block": block("\x1fa\x01\x00" + strings.Repeat("\xff", 300)),
		"unending length":   block("\xf0\xff\xff"),
	} {
		if b, err := io.ReadAll(newLZ4Reader(strings.NewReader(in))); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
	if b, err := io.ReadAll(newLZ4Reader(strings.NewReader(block("\x14a\x01\x00\x10b") + "\x00\x00\x00\x00"))); err != nil || string(b) != "aaaaaaaaab" {
		t.Errorf("%q, %v", b, err)
	}
}

func FuzzLZ4(f *testing.F) {
	f.Add([]byte("\x04\x22\x4d\x18\x60\x40\x82\x06\x00\x00\x00\x14a\x01\x00\x10b\x00\x00\x00\x00"))
	f.Add([]byte("\x04\x22\x4d\x18\x44\x40\x82\x01\x00\x00\x80a\x00\x00\x00\x00\x01\x02\x03\x04"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := io.Copy(io.Discard, newLZ4Reader(bytes.NewReader(b)))
		if err == nil && n > int64(len(b))*256+64 {
			t.Errorf("%d bytes from %d", n, len(b))
		}
	})
}

func FuzzOpenIndex(f *testing.F) {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write([]byte("Package: a\n"))
	_ = w.Close()
	f.Add(z.Bytes(), "deb.example_dists_x_main_binary-amd64_Packages.gz")
	f.Fuzz(func(t *testing.T, b []byte, name string) {
		stem, ext := cutCompression(name)
		if n, err := aptName(stem); err == nil && (strings.HasPrefix(n, "/") || strings.Contains("/"+n+"/", "/../")) {
			t.Errorf("%q became %q", stem, n)
		}
		if ext == ".xz" || ext == ".zst" {
			return // other people's decoders, with their own fuzzing
		}
		if r, err := openIndex(bytes.NewReader(b), ext); err == nil {
			_, _ = io.Copy(io.Discard, io.LimitReader(r, 1<<20))
		}
	})
}

// randomish is bytes that do not compress.
func randomish(n int) []byte {
	var out []byte
	for h := sha256.Sum256([]byte("seed")); len(out) < n; h = sha256.Sum256(h[:]) {
		out = append(out, h[:]...)
	}
	return out[:n]
}
