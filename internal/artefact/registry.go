package artefact

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// parseReference says whether a path is the name of an image in a registry. The
// registry and the tag or digest must be spelt out, so that a misspelt file
// name never asks a server somewhere.
func parseReference(path string) (name.Reference, bool) {
	host, _, found := strings.Cut(path, "/")
	if !found || strings.HasPrefix(path, ".") || host != "localhost" && !strings.ContainsAny(host, ".:") {
		return nil, false
	}
	ref, err := name.ParseReference(path, name.StrictValidation)
	return ref, err == nil
}

// pull copies an image, or an index with all its images, from a registry into a
// layout in a directory of its own, which done removes. Credentials are those
// of `docker login`.
func pull(o Options, ref name.Reference) (dir string, done func(), err error) {
	dir, err = os.MkdirTemp("", "ringwall-image-")
	if err != nil {
		return "", nil, err
	}
	p := &puller{
		repository: ref.Context(), dir: dir, platform: o.Platform, seen: make(map[string]bool),
		options: []remote.Option{remote.WithContext(o.Context), remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithUserAgent("ringwall")},
	}
	if err := p.all(ref); err != nil {
		return "", nil, errors.Join(fmt.Errorf("pull %s: %w", ref, err), os.RemoveAll(dir))
	}
	return dir, func() { _ = os.RemoveAll(dir) }, nil
}

type puller struct {
	repository name.Repository
	dir        string
	platform   string
	options    []remote.Option
	seen       map[string]bool
	total      int64
}

func (p *puller) all(ref name.Reference) error {
	if err := os.MkdirAll(filepath.Join(p.dir, "blobs/sha256"), 0o700); err != nil {
		return err
	}
	top, err := p.document(ref, 0)
	if err != nil {
		return err
	}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{top}})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(p.dir, "index.json"), index, 0o600),
		os.WriteFile(filepath.Join(p.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600))
}

// document stores a manifest or an index and what it names.
func (p *puller) document(ref name.Reference, depth int) (*ociDescriptor, error) {
	if depth > maxIndexDepth {
		return nil, fmt.Errorf("more than %d indices within each other: %w", maxIndexDepth, errs.Invalid)
	}
	got, err := remote.Get(ref, p.options...)
	if err != nil {
		return nil, registryError(err)
	}
	var m ociDocument
	if len(got.Manifest) > maxJSON {
		return nil, fmt.Errorf("a manifest of %d bytes: %w", len(got.Manifest), errs.Invalid)
	}
	if err := unmarshal(got.Manifest, &m); err != nil {
		return nil, err
	}
	// The library holds what it got against a digest, where one was asked for.
	digest := sha256.Sum256(got.Manifest)
	d := &ociDescriptor{MediaType: string(got.MediaType), Digest: fmt.Sprintf("sha256:%x", digest), Size: int64(len(got.Manifest))}
	if err := os.WriteFile(p.path(d.Digest), got.Manifest, 0o600); err != nil {
		return nil, err
	}
	if got.MediaType == types.DockerManifestSchema1 || got.MediaType == types.DockerManifestSchema1Signed {
		return nil, fmt.Errorf("a manifest of version 1: %w", errs.Unsupported)
	}
	for i := range m.Manifests {
		c := &m.Manifests[i]
		if s := c.Platform.String(); p.platform != "" && s != "" && s != p.platform {
			continue
		}
		if _, err := parseBlobDigest(c.Digest); err != nil {
			return nil, err
		}
		if p.seen[c.Digest] {
			continue
		}
		p.seen[c.Digest] = true
		if len(p.seen) > maxImages*maxLayers {
			return nil, fmt.Errorf("more than %d blobs: %w", maxImages*maxLayers, errs.Invalid)
		}
		if _, err := p.document(p.repository.Digest(c.Digest), depth+1); err != nil {
			return nil, err
		}
	}
	if m.Config.Digest != "" {
		m.Layers = append(m.Layers, m.Config)
	}
	for i := range m.Layers {
		if err := p.blob(&m.Layers[i]); err != nil {
			return nil, fmt.Errorf("blob %.80q: %w", m.Layers[i].Digest, err)
		}
	}
	return d, nil
}

func (p *puller) path(digest string) string {
	return filepath.Join(p.dir, "blobs/sha256", strings.TrimPrefix(digest, "sha256:"))
}

func (p *puller) blob(d *ociDescriptor) error {
	if _, err := parseBlobDigest(d.Digest); err != nil || p.seen[d.Digest] {
		return err
	}
	p.seen[d.Digest] = true
	if p.total += d.Size; d.Size < 0 || d.Size > codesign.MaxTotal || p.total > codesign.MaxTotal {
		return fmt.Errorf("%d bytes: %w", d.Size, errs.Invalid)
	}
	l, err := remote.Layer(p.repository.Digest(d.Digest), p.options...)
	if err != nil {
		return registryError(err)
	}
	r, err := l.Compressed() // checks the digest as it is read
	if err != nil {
		return registryError(err)
	}
	defer r.Close()
	f, err := os.OpenFile(p.path(d.Digest), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(r, d.Size+1))
	if err := errors.Join(registryError(err), f.Close()); err != nil {
		return err
	}
	if n != d.Size {
		return fmt.Errorf("%d bytes, %d were announced: %w", n, d.Size, errs.Untrusted)
	}
	return nil
}

// registryError turns a registry's answer into a kind.
func registryError(err error) error {
	if err == nil {
		return nil
	}
	if t, ok := errors.AsType[*transport.Error](err); ok {
		switch t.StatusCode {
		case http.StatusNotFound:
			return fmt.Errorf("%w: %w", err, errs.NotFound)
		case http.StatusUnauthorized, http.StatusForbidden:
			return fmt.Errorf("%w: %w", err, errs.Denied)
		}
	}
	return err
}
