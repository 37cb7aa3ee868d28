package agent

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// realDeb fetches a small package of Debian's with the machine's own apt, and
// returns its path and a policy's trust in the archive.
func realDeb(t *testing.T) (string, integrity.Trust) {
	t.Helper()
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	keys, err := os.ReadFile(keyring)
	if err != nil {
		t.Skipf("SKIPPED, NOT TESTED: %v (install debian-archive-keyring)", err)
	}
	dir := t.TempDir()
	c := exec.Command("apt-get", "download", "hello")
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: apt-get download hello: %v: %s", err, out)
	}
	found, err := filepath.Glob(filepath.Join(dir, "hello_*.deb"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	return found[0], integrity.Trust{Archives: []integrity.Archive{{Name: "debian", Keyring: keys, Origins: []string{"Debian"}}}}
}

func newState(t *testing.T) *State {
	t.Helper()
	l := newLab(t)
	s, err := InitState(l.state(), l.anchor())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTrustPackages_realArchive(t *testing.T) {
	deb, trust := realDeb(t)
	s := newState(t)
	changed := filepath.Join(t.TempDir(), "hello_changed.deb")
	b, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(changed, b, 0o600); err != nil {
		t.Fatal(err)
	}
	files := []string{deb, changed, "/does/not/exist.deb", "/dev/zero"}
	got, added, err := s.trustPackages(t.Context(), "/", files, trust, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if added != 1 || got[0].State != "trusted" || got[0].Package != "hello" || got[0].Records == 0 {
		t.Fatalf("%d added, %+v", added, got)
	}
	for _, r := range got[1:] {
		if r.State != "refused" || r.Why == "" {
			t.Errorf("%+v", r)
		}
	}
	src, err := s.packageSource(mustStem(t, s), trust)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := OpenState(s.dir); err != nil || len(again.anchor.Suites) == 0 {
		t.Errorf("the suites that were seen: %v", err)
	}
	exec := false
	for f := range src.Files {
		for _, n := range f.Names {
			exec = exec || n == "usr/bin/hello" && f.Kinds.Has(integrity.KindExec)
		}
	}
	if !exec || src.Origin.Archive != "debian" {
		t.Errorf("usr/bin/hello is not authorised as a program; origin %+v", src.Origin)
	}
	// again: known, and nothing is added
	if got, added, err = s.trustPackages(t.Context(), "/", files[:1], trust, time.Now()); err != nil || added != 0 || got[0].State != "known" {
		t.Errorf("again: %+v, %d, %v", got, added, err)
	}
	if left, _ := os.ReadDir(s.path(dirIncoming)); len(left) != 0 {
		t.Errorf("%d files are left in %s", len(left), dirIncoming)
	}
	// a policy that does not trust the archive any more
	if _, err := s.packageSource(mustStem(t, s), integrity.Trust{}); !errors.Is(err, errs.Untrusted) {
		t.Errorf("without trust in the archive: %v", err)
	}
}

func mustStem(t *testing.T, s *State) string {
	t.Helper()
	stems, err := s.stored(dirPackages, ".json")
	if err != nil || len(stems) != 1 {
		t.Fatalf("%v, %v", stems, err)
	}
	return stems[0]
}

func TestTrustPackages_untrusted(t *testing.T) {
	deb, trust := realDeb(t)
	other := trust
	other.Archives = []integrity.Archive{{Name: "debian", Keyring: trust.Archives[0].Keyring, Origins: []string{"Somebody"}}}
	for name, tr := range map[string]integrity.Trust{"no archive": {}, "another origin": other} {
		t.Run(name, func(t *testing.T) {
			got, added, err := newState(t).trustPackages(t.Context(), "/", []string{deb}, tr, time.Now())
			if err != nil || added != 0 || got[0].State != "refused" || !strings.Contains(got[0].Why, "no index that a trusted archive signed") {
				t.Errorf("%+v, %d, %v", got, added, err)
			}
		})
	}
}

// An index that is older than one seen before could bring vulnerable packages back.
func TestTrustPackages_replayedIndex(t *testing.T) {
	deb, trust := realDeb(t)
	s := newState(t)
	lists, err := host.ReadAptLists("/")
	if err != nil {
		t.Fatal(err)
	}
	in := &intake{state: s, trust: trust, now: time.Now()}
	future := time.Now().Add(24 * time.Hour)
	for _, x := range lists.Suites {
		signed, err := x.Signed()
		if err != nil {
			t.Fatal(err)
		}
		if suite, name, err := in.verify(signed); err == nil {
			if err := s.seenSuite(name+"/"+suite.Codename+"/"+suite.Suite, future); err != nil {
				t.Fatal(err)
			}
		}
	}
	got, added, err := s.trustPackages(t.Context(), "/", []string{deb}, trust, time.Now())
	if err != nil || added != 0 || !strings.Contains(got[0].Why, "was seen before") {
		t.Errorf("%+v, %d, %v", got, added, err)
	}
}

func TestPackages_damagedOnDisk(t *testing.T) {
	s := newState(t)
	p := &storedPackage{Archive: "debian", Package: "x", Version: "1", Deb: integrity.Digest{1}}
	if err := s.addPackage(p, []byte("cat"), []byte("names")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path(dirPackages, p.Deb.String()+".names"), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	trust := integrity.Trust{Archives: []integrity.Archive{{Name: "debian"}}}
	if _, err := s.packageSource(p.Deb.String(), trust); !errors.Is(err, errs.Untrusted) {
		t.Errorf("%v", err)
	}
}

// The scripts of a package are measured when dpkg writes them, also of one that
// was known before and is installed again.
func TestScriptsOf(t *testing.T) {
	s := newState(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tool"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := codesign.Build(codesign.DirSource(os.DirFS(dir)), codesign.Options{AllFiles: true})
	if err != nil {
		t.Fatal(err)
	}
	p := &storedPackage{Archive: "debian", Package: "x", Version: "1", Deb: integrity.Digest{1}}
	if err := s.addPackage(p, b.Catalogue, b.Names); err != nil {
		t.Fatal(err)
	}
	trust := integrity.Trust{Archives: []integrity.Archive{{Name: "debian"}}}
	for state, want := range map[string]int{"trusted": 1, "known": 1, "refused": 0} {
		got := s.scriptsOf([]PackageResult{{State: state, deb: p.Deb}}, trust)
		if len(got) != want || want == 1 && got[0] != "/tool" {
			t.Errorf("%s: %q", state, got)
		}
	}
	if got := s.scriptsOf([]PackageResult{{State: "known", deb: p.Deb}}, integrity.Trust{}); len(got) != 0 {
		t.Errorf("without trust in the archive: %q", got)
	}
}
