package artefact

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"strings"
	"syscall"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// OCI images (image-spec v1.1): an index names manifests, one for each platform,
// and a manifest names layers. Every blob is held against its digest.

const (
	maxJSON       = 4 << 20 // what registries accept for a manifest
	maxImages     = 256
	maxLayers     = 512 // overlayfs takes fewer
	maxIndexDepth = 4
)

type ociDescriptor struct {
	MediaType string       `json:"mediaType"`
	Digest    string       `json:"digest"`
	Size      int64        `json:"size"`
	Platform  *ociPlatform `json:"platform"`
}

type ociPlatform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
}

func (p *ociPlatform) String() string {
	if p == nil || p.OS == "" {
		return ""
	}
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// ociDocument is an index or a manifest.
type ociDocument struct {
	MediaType string          `json:"mediaType"`
	Manifests []ociDescriptor `json:"manifests"`
	Config    ociDescriptor   `json:"config"`
	Layers    []ociDescriptor `json:"layers"`
}

type ociConfig struct {
	ociPlatform
	RootFS struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// ociImage is one image, or another artefact that is stored as one.
type ociImage struct {
	platform string
	image    bool // it has a file system
	layers   []ociLayer
}

type ociLayer struct {
	name   string // digest, or a path in a docker archive
	size   int64  // -1: unknown
	diffID string // of the uncompressed content; empty: unknown
	media  string
}

// ociStore finds blobs.
type ociStore interface {
	// open returns a file of the layout by its path; errs.NotFound if there is none.
	open(name string) (*io.SectionReader, func(), error)
}

// ociDir is a layout in a directory.
type ociDir struct{ root *os.Root }

func (d ociDir) open(name string) (*io.SectionReader, func(), error) {
	f, err := d.root.Open(name)
	if err != nil {
		var system syscall.Errno
		switch {
		case errors.Is(err, os.ErrNotExist):
			err = fmt.Errorf("%s: %w", name, errs.NotFound)
		case !errors.As(err, &system): // os.Root's own: a link that leaves the layout
			err = fmt.Errorf("%w: %w", err, errs.Invalid)
		}
		return nil, nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file: %w", name, errs.Invalid)
	}
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return io.NewSectionReader(f, 0, st.Size()), func() { _ = f.Close() }, nil
}

// ociTar is a layout in a tar archive that is not compressed.
type ociTar struct {
	src   *io.SectionReader
	files map[string][2]int64 // place and size
}

func (t ociTar) open(name string) (*io.SectionReader, func(), error) {
	f, ok := t.files[name]
	if !ok {
		return nil, nil, fmt.Errorf("%s: %w", name, errs.NotFound)
	}
	return io.NewSectionReader(t.src, f[0], f[1]), func() {}, nil
}

// indexTar lists the files of an archive; nil when it is no image.
func indexTar(src *io.SectionReader) (*ociTar, error) {
	t := &ociTar{src: src, files: make(map[string][2]int64)}
	at := io.NewSectionReader(src, 0, src.Size())
	tr := tar.NewReader(at)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil //nolint:nilerr // whoever reads it as an archive says what is wrong
		}
		p, err := codesign.CleanPath(h.Name)
		if err != nil || len(t.files) > maxMembers {
			return nil, nil //nolint:nilerr // the same
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if _, twice := t.files[p]; twice {
			return nil, nil
		}
		pos, err := at.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		t.files[p] = [2]int64{pos, h.Size}
	}
	_, layout := t.files["oci-layout"]
	_, index := t.files["index.json"]
	_, docker := t.files["manifest.json"]
	if layout && index || docker && t.isDocker() {
		return t, nil
	}
	return nil, nil
}

// isDocker tells `docker save` from any archive with a manifest.json.
func (t *ociTar) isDocker() bool {
	_, err := dockerManifests(t)
	return err == nil
}

// ociReader walks the images of a store.
type ociReader struct {
	store    ociStore
	platform string
	images   []ociImage
}

// readOCI opens a layout and says what it is called: the digest of its one
// manifest or index, or of index.json.
func readOCI(store ociStore, platform string) (*ociReader, integrity.Digest, error) {
	o := &ociReader{store: store, platform: platform}
	raw, err := o.json("index.json", nil)
	if errors.Is(err, errs.NotFound) {
		return o, integrity.Digest{}, o.docker()
	}
	if err != nil {
		return nil, integrity.Digest{}, err
	}
	var index ociDocument
	if err := unmarshal(raw, &index); err != nil {
		return nil, integrity.Digest{}, fmt.Errorf("index.json: %w", err)
	}
	name := integrity.Digest(sha256.Sum256(raw))
	if len(index.Manifests) == 1 {
		if name, err = parseBlobDigest(index.Manifests[0].Digest); err != nil {
			return nil, name, err
		}
	}
	if err := o.index(&index, 0); err != nil {
		return nil, name, err
	}
	if len(o.images) == 0 {
		return nil, name, fmt.Errorf("it holds no image for %q: %w", platform, errs.NotFound)
	}
	return o, name, nil
}

func unmarshal(raw []byte, v any) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	return nil
}

// parseBlobDigest accepts sha256 only: what others mean, nobody here computes.
func parseBlobDigest(s string) (integrity.Digest, error) {
	d, err := integrity.ParseDigest(s)
	if err != nil || "sha256:"+d.String() != s {
		return d, fmt.Errorf("digest %.80q (want sha256 in lower case): %w", s, errs.Invalid)
	}
	return d, nil
}

// json reads a small file of the layout, whole, and checks its digest.
func (o *ociReader) json(name string, d *ociDescriptor) ([]byte, error) {
	src, done, err := o.store.open(name)
	if err != nil {
		return nil, err
	}
	defer done()
	if src.Size() > maxJSON || d != nil && d.Size != src.Size() {
		return nil, fmt.Errorf("%s has %d bytes: %w", name, src.Size(), errs.Invalid)
	}
	b, err := io.ReadAll(src)
	if err != nil {
		return nil, err
	}
	if d == nil {
		return b, nil
	}
	want, err := parseBlobDigest(d.Digest)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != want {
		return nil, fmt.Errorf("%s holds something else: %w", name, errs.Untrusted)
	}
	return b, nil
}

func (o *ociReader) blob(d *ociDescriptor) ([]byte, error) {
	name, err := blobPath(d.Digest)
	if err != nil {
		return nil, err
	}
	return o.json(name, d)
}

func blobPath(digest string) (string, error) {
	d, err := parseBlobDigest(digest)
	return path.Join("blobs/sha256", d.String()), err
}

func (o *ociReader) index(doc *ociDocument, depth int) error {
	if depth > maxIndexDepth {
		return fmt.Errorf("more than %d indices within each other: %w", maxIndexDepth, errs.Invalid)
	}
	for i := range doc.Manifests {
		d := &doc.Manifests[i]
		if p := d.Platform.String(); o.platform != "" && p != "" && p != o.platform {
			continue
		}
		raw, err := o.blob(d)
		if err != nil {
			return fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
		var m ociDocument
		if err := unmarshal(raw, &m); err != nil {
			return fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
		if (len(m.Manifests) > 0) == (m.Config.Digest != "" || len(m.Layers) > 0) {
			return fmt.Errorf("manifest %s is both or neither of an index and an image: %w", d.Digest, errs.Invalid)
		}
		if len(m.Manifests) > 0 {
			err = o.index(&m, depth+1)
		} else {
			err = o.manifest(&m)
		}
		if err != nil {
			return err
		}
		if len(o.images) > maxImages {
			return fmt.Errorf("more than %d images: %w", maxImages, errs.Invalid)
		}
	}
	return nil
}

func (o *ociReader) manifest(m *ociDocument) error {
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%d layers, at most %d: %w", len(m.Layers), maxLayers, errs.Invalid)
	}
	var img ociImage
	switch m.Config.MediaType {
	case "application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json":
		img.image = true
	}
	var config ociConfig
	if img.image {
		raw, err := o.blob(&m.Config)
		if err != nil {
			return fmt.Errorf("config: %w", err)
		}
		if err := unmarshal(raw, &config); err != nil {
			return fmt.Errorf("config: %w", err)
		}
		img.platform = config.ociPlatform.String()
		if o.platform != "" && img.platform != o.platform {
			return nil
		}
		// build attestations come as images that are for no platform
		if strings.HasPrefix(img.platform, "unknown/") || !areLayers(m.Layers) {
			img.image = false
		} else if len(config.RootFS.DiffIDs) != len(m.Layers) {
			return fmt.Errorf("%d layers, the config has %d: %w", len(m.Layers), len(config.RootFS.DiffIDs), errs.Invalid)
		}
	}
	for i, l := range m.Layers {
		layer := ociLayer{name: l.Digest, size: l.Size, media: l.MediaType}
		if img.image {
			layer.diffID = config.RootFS.DiffIDs[i]
		}
		img.layers = append(img.layers, layer)
	}
	o.images = append(o.images, img)
	return nil
}

// areLayers says whether any of the blobs is a file system layer. An image is
// not mixed.
func areLayers(ls []ociDescriptor) bool {
	for _, l := range ls {
		if layerCompression(l.MediaType) == "?" {
			return false
		}
	}
	return true
}

// layerCompression says what a layer's media type promises; "?" is no layer.
func layerCompression(media string) string {
	switch media {
	case "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar":
		return ""
	case "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		return "gz"
	case "application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd":
		return "zst"
	}
	return "?"
}

// dockerManifest is an entry of manifest.json, which older `docker save` writes.
type dockerManifest struct {
	Config string
	Layers []string
}

func dockerManifests(store ociStore) ([]dockerManifest, error) {
	raw, err := (&ociReader{store: store}).json("manifest.json", nil)
	if err != nil {
		return nil, err
	}
	var ms []dockerManifest
	if err := unmarshal(raw, &ms); err != nil {
		return nil, err
	}
	for _, m := range ms {
		if m.Config == "" || len(m.Layers) > maxLayers {
			return nil, fmt.Errorf("manifest.json: no config, or %d layers: %w", len(m.Layers), errs.Invalid)
		}
	}
	if len(ms) == 0 || len(ms) > maxImages {
		return nil, fmt.Errorf("manifest.json: %d images: %w", len(ms), errs.Invalid)
	}
	return ms, nil
}

func (o *ociReader) docker() error {
	ms, err := dockerManifests(o.store)
	if err != nil {
		return err
	}
	for _, m := range ms {
		raw, err := o.json(m.Config, nil)
		if err != nil {
			return fmt.Errorf("config: %w", err)
		}
		var config ociConfig
		if err := unmarshal(raw, &config); err != nil {
			return fmt.Errorf("config: %w", err)
		}
		img := ociImage{platform: config.ociPlatform.String(), image: true}
		if o.platform != "" && img.platform != o.platform {
			continue
		}
		if len(config.RootFS.DiffIDs) != len(m.Layers) {
			return fmt.Errorf("%d layers, the config has %d: %w", len(m.Layers), len(config.RootFS.DiffIDs), errs.Invalid)
		}
		for i, l := range m.Layers {
			img.layers = append(img.layers, ociLayer{name: l, size: -1, diffID: config.RootFS.DiffIDs[i], media: "docker"})
		}
		o.images = append(o.images, img)
	}
	return nil
}

// layer hands the uncompressed content of a layer to use and checks afterwards
// that it was what the manifest and the config name. An error of use comes first.
func (o *ociReader) layer(l *ociLayer, use func(io.Reader) error) error {
	src, done, err := o.openLayer(l)
	if err != nil {
		return err
	}
	defer done()
	head := make([]byte, 6)
	n, _ := src.ReadAt(head, 0)
	if how := codesign.Compression(head[:n]); l.media != "docker" && how != layerCompression(l.media) {
		return fmt.Errorf("%s holds %q: %w", l.media, how, errs.Invalid)
	}
	compressed, plain := sha256.New(), sha256.New()
	raw := io.TeeReader(src, compressed)
	d, err := codesign.Decompress(raw)
	if err != nil {
		return err
	}
	defer d.Close()
	content := io.TeeReader(d, plain)
	if err := use(content); err != nil {
		return err
	}
	for _, r := range []io.Reader{content, raw} {
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
	}
	if err := sameDigest(l.diffID, plain, "its content"); err != nil {
		return err
	}
	if l.media == "docker" {
		return nil
	}
	return sameDigest(l.name, compressed, "it")
}

func (o *ociReader) openLayer(l *ociLayer) (*io.SectionReader, func(), error) {
	name := l.name
	if l.media != "docker" {
		var err error
		if name, err = blobPath(l.name); err != nil {
			return nil, nil, err
		}
	}
	src, done, err := o.store.open(name)
	if err != nil {
		return nil, nil, err
	}
	if l.size >= 0 && l.size != src.Size() {
		done()
		return nil, nil, fmt.Errorf("%d bytes, the manifest says %d: %w", src.Size(), l.size, errs.Invalid)
	}
	return src, done, nil
}

func sameDigest(want string, h hash.Hash, what string) error {
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); want != "" && got != want {
		return fmt.Errorf("%s is %s, %s was announced: %w", what, got, want, errs.Untrusted)
	}
	return nil
}

// walk visits all images, flattened, or each layer for itself.
func (o *ociReader) walk(layers bool, visit func(codesign.Member, io.Reader) error) error {
	for i := range o.images {
		img := &o.images[i]
		prefix := ""
		if len(o.images) > 1 {
			prefix = img.platform + "@"
		}
		var err error
		switch {
		case !img.image:
			err = o.files(img, visit)
		case layers:
			err = o.layers(img, prefix, visit)
		default:
			err = o.flatten(img, prefix, visit)
		}
		if err != nil {
			return fmt.Errorf("read image: %w", err)
		}
	}
	return nil
}

// files visits the blobs of what is no file system: signatures, attestations,
// charts.
func (o *ociReader) files(img *ociImage, visit func(codesign.Member, io.Reader) error) error {
	for i := range img.layers {
		l := &img.layers[i]
		src, done, err := o.openLayer(l)
		if err != nil {
			return fmt.Errorf("blob %s: %w", l.name, err)
		}
		h := sha256.New()
		r := io.TeeReader(src, h)
		err = visit(codesign.Member{Path: "blobs/" + strings.Replace(l.name, ":", "/", 1), Mode: 0o644, Size: src.Size(), Origin: "blob"}, r)
		if err == nil {
			_, err = io.Copy(io.Discard, r)
		}
		if err == nil {
			err = sameDigest(l.name, h, "it")
		}
		done()
		if err != nil {
			return fmt.Errorf("blob %s: %w", l.name, err)
		}
	}
	return nil
}

// layers visits every file of every layer, also what upper layers hide.
func (o *ociReader) layers(img *ociImage, prefix string, visit func(codesign.Member, io.Reader) error) error {
	for i := range img.layers {
		l := &img.layers[i]
		here := make(map[string]bool)
		err := o.layer(l, func(r io.Reader) error {
			return codesign.LayerSource(r).Walk(func(m codesign.Member, r io.Reader) error {
				if m.Mode.IsDir() || strings.HasPrefix(path.Base(m.Path), whiteout) {
					return nil
				}
				if m.Hard && !here[m.Link] {
					return fmt.Errorf("%q is a link into a lower layer; walk the flattened image: %w", m.Path, errs.Unsupported)
				}
				here[m.Path] = true
				m.Origin = prefix + l.name
				return visit(m, r)
			})
		})
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.name, err)
		}
	}
	return nil
}
