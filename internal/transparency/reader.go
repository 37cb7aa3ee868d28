package transparency

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

const (
	checkpointPath = layout.CheckpointPath
	tileWidth      = layout.TileWidth // hashes in a tile, entries in a bundle
	maxLogFile     = 32 << 20         // 256 entries of ours are some 2 MiB
	httpTimeout    = 30 * time.Second
)

// Source is where the files of a log are: its directory, a copy, or what
// serves one by HTTP.
type Source interface {
	// ReadFile returns the file with a path such as "tile/0/000". A file that
	// is not there is fs.ErrNotExist.
	ReadFile(ctx context.Context, path string) ([]byte, error)
}

// Dir is a log, or the copy of one, in a directory.
type Dir string

// ReadFile implements Source.
func (d Dir) ReadFile(_ context.Context, path string) ([]byte, error) {
	f, err := os.Open(filepath.Join(string(d), filepath.FromSlash(path)))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(f, path)
}

func readBounded(r io.Reader, path string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxLogFile+1))
	if err == nil && len(b) > maxLogFile {
		err = fmt.Errorf("more than %d bytes: %w", maxLogFile, errs.Invalid)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

// HTTP is a log served as static files.
type HTTP struct {
	base   string
	client *http.Client
}

// NewHTTP returns the log at a URL.
func NewHTTP(base string) (*HTTP, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("log at %.200q: want an http or https URL: %w", base, errs.Invalid)
	}
	return &HTTP{base: strings.TrimSuffix(base, "/") + "/", client: &http.Client{Timeout: httpTimeout}}, nil
}

// ReadFile implements Source.
func (h *HTTP) ReadFile(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	res, err := h.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer res.Body.Close()
	switch res.StatusCode {
	case http.StatusOK:
		return readBounded(res.Body, path)
	case http.StatusNotFound:
		return nil, fmt.Errorf("read %s: %w", path, fs.ErrNotExist)
	}
	return nil, fmt.Errorf("read %s: HTTP status %s", path, res.Status)
}

// OpenSource returns the log at a URL or in a directory.
func OpenSource(place string) (Source, error) {
	if strings.HasPrefix(place, "http://") || strings.HasPrefix(place, "https://") {
		return NewHTTP(place)
	}
	return Dir(place), nil
}

// Reader reads a log and believes nothing but its key.
type Reader struct {
	src Source
	key pki.LogKey
}

// NewReader reads the log with the key from src.
func NewReader(src Source, key pki.LogKey) *Reader { return &Reader{src: src, key: key} }

// Checkpoint returns the log's newest state, verified, and the signed note.
func (r *Reader) Checkpoint(ctx context.Context) (*pki.Checkpoint, []byte, error) {
	note, err := r.src.ReadFile(ctx, checkpointPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("there is no log: %w", errs.NotFound)
	}
	if err != nil {
		return nil, nil, err
	}
	c, err := pki.OpenCheckpoint(note, &r.key)
	if err != nil {
		return nil, nil, err
	}
	return c, note, nil
}

// resource reads a file that may be there in part (with p entries) or, when the
// log has grown since, whole.
func (r *Reader) resource(ctx context.Context, path func(p uint8) string, p uint8) ([]byte, error) {
	b, err := r.src.ReadFile(ctx, path(p))
	if p == 0 || !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	return r.src.ReadFile(ctx, path(0))
}

func (r *Reader) tile(ctx context.Context, level, index uint64, p uint8) ([]byte, error) {
	return r.resource(ctx, func(p uint8) string { return layout.TilePath(level, index, p) }, p)
}

// Inclusion returns the proof that the leaf with the index is in the log at the
// checkpoint, verified.
func (r *Reader) Inclusion(ctx context.Context, leaf [32]byte, index uint64, c *pki.Checkpoint) ([][32]byte, error) {
	if index >= c.Size {
		return nil, fmt.Errorf("entry %d of a log of %d: %w", index, c.Size, errs.NotFound)
	}
	b, err := client.NewProofBuilder(ctx, c.Size, r.tile)
	if err != nil {
		return nil, fmt.Errorf("inclusion of entry %d: %w", index, err)
	}
	nodes, err := b.InclusionProof(ctx, index)
	if err != nil {
		return nil, damaged(fmt.Errorf("inclusion of entry %d: %w", index, err))
	}
	proof, err := hashes(nodes)
	if err != nil {
		return nil, err
	}
	return proof, pki.VerifyInclusion(leaf, index, c.Size, c.Root, proof)
}

// Consistent checks that the older checkpoint is the beginning of the newer one.
func (r *Reader) Consistent(ctx context.Context, older, newer *pki.Checkpoint) error {
	var proof [][32]byte
	if older.Size > 0 && older.Size < newer.Size {
		b, err := client.NewProofBuilder(ctx, newer.Size, r.tile)
		if err != nil {
			return fmt.Errorf("consistency from %d to %d: %w", older.Size, newer.Size, err)
		}
		nodes, err := b.ConsistencyProof(ctx, older.Size, newer.Size)
		if err != nil {
			return damaged(fmt.Errorf("consistency from %d to %d: %w", older.Size, newer.Size, err))
		}
		if proof, err = hashes(nodes); err != nil {
			return err
		}
	}
	return pki.VerifyConsistency(older.Size, newer.Size, older.Root, newer.Root, proof)
}

// damaged says that a log whose checkpoint promises a file lacks it, or that
// the file is not what it must be. Other errors, such as a network's, stay.
func damaged(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the log is not complete: %w: %w", err, errs.Untrusted)
	}
	return err
}

func hashes(nodes [][]byte) ([][32]byte, error) {
	out := make([][32]byte, len(nodes))
	for i, n := range nodes {
		if copy(out[i][:], n) != len(out[i]) || len(n) != len(out[i]) {
			return nil, fmt.Errorf("hash of %d bytes: %w", len(n), errs.Untrusted)
		}
	}
	return out, nil
}
