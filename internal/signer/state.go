package signer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
)

// WriteFile replaces a file durably, see host.WriteFile.
type WriteFile func(name string, data []byte, mode fs.FileMode) error

const maxEpochs = 1 << 20

// EpochFile keeps epochs in one file. It fails closed: a file that cannot be
// read is an error, not a fresh start.
type EpochFile struct {
	Path  string
	Write WriteFile

	mu sync.Mutex
}

func (f *EpochFile) load() (map[string]uint32, error) {
	data, err := readFile(f.Path, maxEpochs)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]uint32{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("epochs: %w", err)
	}
	out := map[string]uint32{}
	if err := json.Unmarshal(data, &out); err != nil {
		return nil, fmt.Errorf("epochs %s: %w: %w", f.Path, err, errs.Invalid)
	}
	return out, nil
}

// Highest implements Epochs.
func (f *EpochFile) Highest(product string) (uint32, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, err := f.load()
	return m[product], err
}

// Raise implements Epochs.
func (f *EpochFile) Raise(product string, epoch uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, err := f.load()
	if err != nil || m[product] >= epoch {
		return err
	}
	m[product] = epoch
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("epochs: %w", err)
	}
	if err := f.Write(f.Path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("epochs: %w", err)
	}
	return nil
}

// PolicyDir is a directory of release policies. Every file that ends in .yaml
// is one; two for one product, and one that is not valid, are errors. It is
// read for each decision, so that a change counts at once.
type PolicyDir string

// Policy implements Policies.
func (d PolicyDir) Policy(product string) (*gate.Policy, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, fmt.Errorf("release policies: %w", err)
	}
	var found *gate.Policy
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".yaml") {
			continue
		}
		p, err := LoadPolicy(filepath.Join(string(d), e.Name()))
		switch {
		case err != nil:
			return nil, err
		case p.Product != product:
		case found != nil:
			return nil, fmt.Errorf("release policies: %s and %s are both for %s: %w", found.Name, p.Name, product, errs.Invalid)
		default:
			found = p
		}
	}
	if found == nil {
		return nil, fmt.Errorf("release policy of %s in %s: %w", product, string(d), errs.NotFound)
	}
	return found, nil
}

// OnePolicy is a policy for whatever is asked: a release of another product
// than its own fails at its gates, with that reason.
type OnePolicy struct{ Only *gate.Policy }

// Policy implements Policies.
func (p OnePolicy) Policy(string) (*gate.Policy, error) { return p.Only, nil }

// LoadPolicy reads a release policy.
func LoadPolicy(file string) (*gate.Policy, error) {
	doc, err := readFile(file, 1<<20)
	if err != nil {
		return nil, fmt.Errorf("release policy: %w", err)
	}
	return gate.ParsePolicy(file, doc)
}

// readFile reads a file of at most limit bytes.
func readFile(name string, limit int64) ([]byte, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if st.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes (at most %d): %w", name, st.Size(), limit, errs.Invalid)
	}
	return os.ReadFile(name)
}

// Ending of evidence files.
const EvidenceSuffix = ".evidence.json"

// Bounds of the evidence for one release.
const (
	maxEvidence      = 512
	maxEvidenceBytes = 4 << 20
)

// LoadEvidence reads evidence: files, and of directories every file that ends
// in EvidenceSuffix.
func LoadEvidence(paths []string) ([]Evidence, error) {
	var files []string
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		if !st.IsDir() {
			files = append(files, p)
			continue
		}
		entries, err := os.ReadDir(p)
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), EvidenceSuffix) {
				files = append(files, filepath.Join(p, e.Name()))
			}
		}
	}
	if len(files) > maxEvidence {
		return nil, fmt.Errorf("evidence: %d files (at most %d): %w", len(files), maxEvidence, errs.Invalid)
	}
	var out []Evidence
	for _, f := range files {
		b, err := readFile(f, maxEvidenceBytes)
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		out = append(out, Evidence{Label: filepath.Base(f), Bundle: b})
	}
	return out, nil
}
