package artefact_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/klauspost/compress/zstd"

	"ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// item is an entry of a layer: a directory when the name ends in a slash.
type item struct {
	name, body, link string
	kind             byte
}

func layerOf(t testing.TB, items ...item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		h := &tar.Header{Name: i.name, Mode: 0o755, Size: int64(len(i.body)), Linkname: i.link, Typeflag: i.kind}
		switch {
		case i.kind != 0:
		case strings.HasSuffix(i.name, "/"):
			h.Typeflag = tar.TypeDir
		default:
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, i.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// imageMaker writes a layout by hand, so that it can be wrong.
type imageMaker struct {
	t     testing.TB
	dir   string
	index []any
}

func newImage(t testing.TB) *imageMaker {
	t.Helper()
	m := &imageMaker{t: t, dir: t.TempDir()}
	if err := errors.Join(os.MkdirAll(filepath.Join(m.dir, "blobs/sha256"), 0o755), os.WriteFile(filepath.Join(m.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)); err != nil {
		t.Fatal(err)
	}
	return m
}

type object = map[string]any

func (m *imageMaker) blob(media string, b []byte) object {
	m.t.Helper()
	d := fmt.Sprintf("%x", sha256.Sum256(b))
	if err := os.WriteFile(filepath.Join(m.dir, "blobs/sha256", d), b, 0o644); err != nil {
		m.t.Fatal(err)
	}
	return object{"mediaType": media, "digest": "sha256:" + d, "size": len(b)}
}

func (m *imageMaker) json(media string, v any) object {
	m.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		m.t.Fatal(err)
	}
	return m.blob(media, b)
}

// image adds an image of uncompressed layers, each with what it is compressed by.
func (m *imageMaker) image(arch, how string, layers ...[]byte) {
	m.t.Helper()
	var descriptors, diff []any
	for _, l := range layers {
		diff = append(diff, fmt.Sprintf("sha256:%x", sha256.Sum256(l)))
		media := "application/vnd.oci.image.layer.v1.tar"
		var b bytes.Buffer
		var w io.WriteCloser
		switch how {
		case "gzip":
			w = gzip.NewWriter(&b)
		case "zstd":
			w, _ = zstd.NewWriter(&b)
		}
		if w != nil {
			media += "+" + how
			if _, err := w.Write(l); err != nil {
				m.t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				m.t.Fatal(err)
			}
			l = b.Bytes()
		}
		descriptors = append(descriptors, m.blob(media, l))
	}
	config := m.json("application/vnd.oci.image.config.v1+json", object{"os": "linux", "architecture": arch, "rootfs": object{"type": "layers", "diff_ids": diff}})
	d := m.json("application/vnd.oci.image.manifest.v1+json", object{"schemaVersion": 2, "config": config, "layers": descriptors})
	d["platform"] = object{"os": "linux", "architecture": arch}
	m.index = append(m.index, d)
}

func (m *imageMaker) done() string {
	m.t.Helper()
	b, err := json.Marshal(object{"schemaVersion": 2, "manifests": m.index})
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.dir, "index.json"), b, 0o644); err != nil {
		m.t.Fatal(err)
	}
	return m.dir
}

// sampleLayers have every form of replacing and deleting.
func sampleLayers(t testing.TB) [][]byte {
	t.Helper()
	return [][]byte{
		layerOf(t, item{name: "bin", link: "usr/bin", kind: tar.TypeSymlink}, item{name: "usr/"}, item{name: "usr/bin/"},
			item{name: "usr/bin/keep", body: "keep"}, item{name: "usr/bin/old", body: "old"}, item{name: "usr/bin/gone", body: "gone"},
			item{name: "etc/app/a", body: "a"}, item{name: "etc/app/b", body: "b"}, item{name: "opt/x/deep/file", body: "deep"},
			item{name: "srv/becomes-file/f", body: "f"}, item{name: "srv/becomes-dir", body: "was a file"}, item{name: "first", body: "shared"},
			item{name: "second", link: "first", kind: tar.TypeLink}),
		layerOf(t, item{name: "usr/bin/old", body: "new"}, item{name: "usr/bin/.wh.gone"}, item{name: "etc/app/"}, item{name: "etc/app/.wh..wh..opq"},
			item{name: "etc/app/c", body: "c"}, item{name: "opt/.wh.x"}, item{name: "srv/becomes-file", body: "now a file"},
			item{name: "srv/becomes-dir/"}, item{name: "srv/becomes-dir/f", body: "inside"}, item{name: ".wh.first"}),
		layerOf(t, item{name: "opt/x/again", body: "again"}),
	}
}

func TestOCI_flattened(t *testing.T) {
	want := map[string]string{}
	for n, body := range map[string]string{
		"usr/bin/keep": "keep", "usr/bin/old": "new", "etc/app/c": "c", "srv/becomes-file": "now a file",
		"srv/becomes-dir/f": "inside", "opt/x/again": "again", "second": "shared",
	} {
		want[n] = "0755 " + sum(body)
	}
	want["bin"] = "-> usr/bin"
	for _, how := range []string{"", "gzip", "zstd"} {
		m := newImage(t)
		m.image("amd64", how, sampleLayers(t)...)
		a := open(t, m.done(), artefact.Options{})
		if a.Format != artefact.FormatOCI || "sha256:"+a.Digest.String() != m.index[0].(object)["digest"] {
			t.Errorf("%q: %s, %v", how, a.Format, a.Digest)
		}
		if d := cmp.Diff(want, members(t, a)); d != "" {
			t.Errorf("%q: %s", how, d)
		}
		// the same as a tar archive
		file := filepath.Join(t.TempDir(), "image.tar")
		run(t, m.dir, "tar", "-cf", file, ".")
		b := open(t, file, artefact.Options{})
		if d := cmp.Diff(want, members(t, b)); d != "" || b.Format != artefact.FormatOCI || b.Digest != a.Digest {
			t.Errorf("%q: tar, %s: %s", how, b.Format, d)
		}
		// and what go-containerregistry flattens it to
		if d := cmp.Diff(extracted(t, m.dir), members(t, a)); d != "" {
			t.Errorf("%q: mutate.Extract differs: %s", how, d)
		}
	}
}

// extracted flattens by somebody else's code.
func extracted(t testing.TB, dir string) map[string]string {
	t.Helper()
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	im, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(im.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	r := mutate.Extract(img)
	defer r.Close()
	got, err := walk(codesign.TarSource(r))
	if err != nil {
		// it writes a hard link without the file that it is a link to
		t.Fatal(err)
	}
	for n, w := range got {
		if n == "second" && w == "0755 " { // which is what its tar holds: a link to nothing
			got[n] = "0755 " + sum("shared")
		}
	}
	return got
}

func TestOCI_layersAndPlatforms(t *testing.T) {
	m := newImage(t)
	m.image("amd64", "gzip", sampleLayers(t)...)
	m.image("arm64", "gzip", layerOf(t, item{name: "usr/bin/arm", body: "arm"}))
	a := open(t, m.done(), artefact.Options{})
	got := members(t, a)
	if len(got) != 9 || got["usr/bin/arm"] == "" {
		t.Errorf("%d members of two platforms: %v", len(got), got)
	}
	if got := members(t, open(t, m.dir, artefact.Options{Platform: "linux/arm64"})); len(got) != 1 {
		t.Errorf("one platform: %v", got)
	}
	if _, err := artefact.Open(m.dir, artefact.Options{Platform: "linux/s390x"}); !errors.Is(err, errs.NotFound) {
		t.Errorf("no such platform: %v", err)
	}
	// each layer for itself: what upper layers hide is there
	n := 0
	seen := map[string]int{}
	l := open(t, m.dir, artefact.Options{Platform: "linux/amd64", Layers: true})
	if err := l.Walk(func(m codesign.Member, r io.Reader) error {
		n++
		seen[m.Path]++
		if !strings.HasPrefix(m.Origin, "sha256:") {
			t.Errorf("%s: origin %q", m.Path, m.Origin)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if n != 16 || seen["usr/bin/old"] != 2 || seen["usr/bin/gone"] != 1 || seen["first"] != 1 {
		t.Errorf("%d members, %v", n, seen)
	}
}

// Debian's base images have links where older layers had directories.
func TestOCI_throughLinks(t *testing.T) {
	m := newImage(t)
	m.image("amd64", "", layerOf(t, item{name: "usr/bin/"}, item{name: "usr/bin/a", body: "a"}, item{name: "bin", link: "usr/bin", kind: tar.TypeSymlink},
		item{name: "loop", link: "loop", kind: tar.TypeSymlink}, item{name: "abs", link: "/usr/../../bin", kind: tar.TypeSymlink}),
		layerOf(t, item{name: "bin/b", body: "b"}, item{name: "abs/c", body: "c"}, item{name: "bin/.wh.a"}))
	got := members(t, open(t, m.done(), artefact.Options{}))
	if got["usr/bin/b"] == "" || got["usr/bin/c"] == "" || got["usr/bin/a"] != "" || got["bin"] != "-> usr/bin" {
		t.Errorf("%v", got)
	}
}

func TestOCI_refuses(t *testing.T) {
	file := item{name: "a", body: "x"}
	for name, layers := range map[string][][]byte{
		"whiteout of its own layer":        {layerOf(t, file, item{name: ".wh.a"})},
		"whiteout before its own layer's":  {layerOf(t, item{name: ".wh.a"}, file)},
		"whiteout with content":            {layerOf(t, file), layerOf(t, item{name: ".wh.a", body: "code"})},
		"whiteout that is a link":          {layerOf(t, file), layerOf(t, item{name: ".wh.a", link: "b", kind: tar.TypeSymlink})},
		"whiteout of ..":                   {layerOf(t, file), layerOf(t, item{name: "d/.wh..."})},
		"unknown whiteout":                 {layerOf(t, item{name: ".wh..wh.plnk"})},
		"twice":                            {layerOf(t, file, file)},
		"twice through a link":             {layerOf(t, item{name: "l", link: "d", kind: tar.TypeSymlink}, item{name: "d/a", body: "1"}, item{name: "l/a", body: "2"})},
		"file and directory":               {layerOf(t, item{name: "d/a", body: "1"}, item{name: "d", body: "2"})},
		"below a file":                     {layerOf(t, file, item{name: "a/b", body: "2"})},
		"link to nothing":                  {layerOf(t, item{name: "b", link: "a", kind: tar.TypeLink})},
		"link to a directory":              {layerOf(t, item{name: "d/"}, item{name: "b", link: "d", kind: tar.TypeLink})},
		"link to what is deleted":          {layerOf(t, file), layerOf(t, item{name: ".wh.a"}, item{name: "b", link: "a", kind: tar.TypeLink})},
		"through a loop":                   {layerOf(t, item{name: "l", link: "l", kind: tar.TypeSymlink}), layerOf(t, item{name: "l/a", body: "x"})},
		"climbs":                           {layerOf(t, item{name: "../a", body: "x"})},
		"not a tar archive":                {[]byte(strings.Repeat("words ", 1000))},
		"whiteout of a directory it fills": {layerOf(t, item{name: "d/a", body: "1"}), layerOf(t, item{name: "d/b", body: "2"}, item{name: ".wh.d"})},
	} {
		m := newImage(t)
		m.image("amd64", "", layers...)
		a, err := artefact.Open(m.done(), artefact.Options{})
		if err == nil {
			_, err = walk(a)
			_ = a.Close()
		}
		if !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every way in which a layout can say one thing and hold another.
func TestOCI_refusesLayouts(t *testing.T) {
	good := layerOf(t, item{name: "a", body: "x"})
	for name, c := range map[string]struct {
		spoil func(m *imageMaker)
		want  error
	}{
		"layer changed":           {func(m *imageMaker) { m.change(good, append(bytes.Clone(good[:len(good)-1]), 1)) }, errs.Invalid},
		"layer's content changed": {func(m *imageMaker) { m.change(good, layerOf(m.t, item{name: "a", body: "y"})) }, errs.Untrusted},
		"layer cut":               {func(m *imageMaker) { m.change(good, good[:512]) }, errs.Invalid},
		"layer missing":           {func(m *imageMaker) { m.remove(good) }, errs.NotFound},
		"layer is a link": {func(m *imageMaker) {
			m.remove(good)
			_ = os.Symlink("/etc/passwd", filepath.Join(m.dir, "blobs/sha256", fmt.Sprintf("%x", sha256.Sum256(good))))
		}, errs.Invalid},
		"manifest elsewhere": {func(m *imageMaker) { m.index[0].(object)["digest"] = "sha256:../../../etc/passwd" }, errs.Invalid},
		"sha512":             {func(m *imageMaker) { m.index[0].(object)["digest"] = "sha512:" + strings.Repeat("0", 128) }, errs.Invalid},
		"size":               {func(m *imageMaker) { m.index[0].(object)["size"] = 1 }, errs.Invalid},
		"huge size":          {func(m *imageMaker) { m.index[0].(object)["size"] = int64(1) << 62 }, errs.Invalid},
		"no manifest":        {func(m *imageMaker) { m.index = []any{} }, errs.NotFound},
		"neither":            {func(m *imageMaker) { m.index[0] = m.json("x", object{}) }, errs.Invalid},
		"both": {func(m *imageMaker) {
			d := m.index[0]
			m.index[0] = m.json("x", object{"manifests": []any{d}, "layers": []any{d}})
		}, errs.Invalid},
		"index in an index, and so on": {func(m *imageMaker) {
			for range 7 {
				m.index[0] = m.json("application/vnd.oci.image.index.v1+json", object{"manifests": []any{m.index[0]}})
			}
		}, errs.Invalid},
		"layers without config": {func(m *imageMaker) {
			config := m.json("application/vnd.oci.image.config.v1+json", object{"os": "linux", "architecture": "amd64"})
			l := m.blob("application/vnd.oci.image.layer.v1.tar", good)
			m.index[0] = m.json("x", object{"config": config, "layers": []any{l}})
		}, errs.Invalid},
		"diff id": {func(m *imageMaker) {
			config := m.json("application/vnd.oci.image.config.v1+json", object{"os": "linux", "architecture": "amd64", "rootfs": object{"diff_ids": []any{"sha256:" + strings.Repeat("0", 64)}}})
			l := m.blob("application/vnd.oci.image.layer.v1.tar", good)
			m.index[0] = m.json("x", object{"config": config, "layers": []any{l}})
		}, errs.Untrusted},
		"media type lies": {func(m *imageMaker) {
			config := m.json("application/vnd.oci.image.config.v1+json", object{"os": "linux", "architecture": "amd64", "rootfs": object{"diff_ids": []any{"sha256:" + sum(string(good))}}})
			l := m.blob("application/vnd.oci.image.layer.v1.tar+gzip", good)
			m.index[0] = m.json("x", object{"config": config, "layers": []any{l}})
		}, errs.Invalid},
	} {
		m := newImage(t)
		m.image("amd64", "", good)
		c.spoil(m)
		a, err := artefact.Open(m.done(), artefact.Options{})
		if err == nil {
			_, err = walk(a)
			_ = a.Close()
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func (m *imageMaker) path(b []byte) string {
	return filepath.Join(m.dir, "blobs/sha256", fmt.Sprintf("%x", sha256.Sum256(b)))
}

func (m *imageMaker) change(old, is []byte) {
	if err := os.WriteFile(m.path(old), is, 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *imageMaker) remove(b []byte) {
	if err := os.Remove(m.path(b)); err != nil {
		m.t.Fatal(err)
	}
}

// What is no file system, such as a signature or a chart, is a file.
func TestOCI_otherArtefacts(t *testing.T) {
	m := newImage(t)
	chart := layerOf(t, item{name: "chart/run.sh", body: "#!/bin/sh\n"})
	l := m.blob("application/vnd.cncf.helm.chart.content.v1.tar", chart)
	m.index = append(m.index, m.json("application/vnd.oci.image.manifest.v1+json", object{"config": m.json("application/vnd.cncf.helm.config.v1+json", object{}), "layers": []any{l}}))
	got := members(t, open(t, m.done(), artefact.Options{}))
	if want := "blobs/sha256/" + sum(string(chart)) + "!/chart/run.sh"; got[want] != "0755 "+sum("#!/bin/sh\n")+" nested" {
		t.Errorf("%v", got)
	}
}

func TestOpen_registry(t *testing.T) {
	m := newImage(t)
	m.image("amd64", "gzip", sampleLayers(t)...)
	m.image("arm64", "gzip", layerOf(t, item{name: "usr/bin/arm", body: "arm"}))
	want := members(t, open(t, m.done(), artefact.Options{}))

	server := httptest.NewServer(registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	ref, err := name.ParseReference(host + "/team/edged:4.7.0")
	if err != nil {
		t.Fatal(err)
	}
	index, err := layout.ImageIndexFromPath(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	before := temporaries(t)
	a := open(t, host+"/team/edged:4.7.0", artefact.Options{})
	if d := cmp.Diff(want, members(t, a)); d != "" || a.Name != "team/edged" || a.Digest.IsZero() {
		t.Errorf("%s %v: %s", a.Name, a.Digest, d)
	}
	digest := host + "/team/edged@sha256:" + a.Digest.String()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if now := temporaries(t); now != before {
		t.Errorf("%d temporary directories, %d before", now, before)
	}
	one := open(t, digest, artefact.Options{Platform: "linux/arm64"})
	if got := members(t, one); len(got) != 1 {
		t.Errorf("%v", got)
	}
	for name, want := range map[string]error{
		host + "/team/edged:5": errs.NotFound, host + "/nobody/nothing:1": errs.NotFound,
		host + "/team/edged@sha256:" + strings.Repeat("0", 64): errs.NotFound,
		host + "/team/edged": fs.ErrNotExist, "edged.d/nothing": fs.ErrNotExist, "./edged.d/nothing:1": fs.ErrNotExist, // no tag, no reference
	} {
		if _, err := artefact.Open(name, artefact.Options{}); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := artefact.Open(digest, artefact.Options{Context: ctx}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if now := temporaries(t); now != before+1 { // that of "one", which is open
		t.Errorf("%d temporary directories left", now-before-1)
	}
}

func temporaries(t testing.TB) int {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(os.TempDir(), "ringwall-image-*"))
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}
