package transparency

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

const (
	stateVersion  = 1
	maxState      = 64 << 20
	maxUnasked    = 100_000
	maxAskedLines = 10_000_000
)

// Hash is a SHA-256, in hex where it is text.
type Hash [32]byte

// String returns the hash in hex.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements encoding.TextMarshaler.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads 64 hex digits in lower case.
func (h *Hash) UnmarshalText(b []byte) error {
	raw, err := hex.DecodeString(string(b))
	if err != nil || len(raw) != len(h) || hex.EncodeToString(raw) != string(b) {
		return fmt.Errorf("hash %.80q: %w", b, errs.Invalid)
	}
	copy(h[:], raw)
	return nil
}

// Asked is the signatures that were asked for, by whoever knows.
type Asked struct {
	hashes  map[Hash]bool
	bundles []askedBundle
}

type askedBundle struct {
	name  string
	hash  Hash
	proof *pki.LogProof
}

// AddHash says that the signature with that EntryHash was asked for.
func (a *Asked) AddHash(h Hash) {
	if a.hashes == nil {
		a.hashes = map[Hash]bool{}
	}
	a.hashes[h] = true
}

// AddBundle says that a bundle was asked for; it must be in the log, too.
func (a *Asked) AddBundle(name string, bundle []byte) error {
	h, err := EntryHash(bundle)
	if err != nil {
		return fmt.Errorf("bundle %s: %w", name, err)
	}
	p, err := pki.ProofOf(bundle)
	if err != nil {
		return fmt.Errorf("bundle %s: %w", name, err)
	}
	a.AddHash(h)
	a.bundles = append(a.bundles, askedBundle{name, h, p})
	return nil
}

// AddLines reads lines of JSON and takes the hash in their field log_entry; the
// signer's audit log has it for every signature. Lines without are passed over.
func (a *Asked) AddLines(data []byte) error {
	n := 0
	for line := range bytesLines(data) {
		if n++; n > maxAskedLines {
			return fmt.Errorf("more than %d lines: %w", maxAskedLines, errs.Invalid)
		}
		var l struct {
			Entry *Hash `json:"log_entry"`
		}
		if err := json.Unmarshal(line, &l); err != nil {
			return fmt.Errorf("line %d: %w: %w", n, err, errs.Invalid)
		}
		if l.Entry != nil {
			a.AddHash(*l.Entry)
		}
	}
	return nil
}

// bytesLines yields the lines that are not empty.
func bytesLines(data []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(data) > 0 {
			line := data
			if at := slices.Index(data, '\n'); at >= 0 {
				line, data = data[:at], data[at+1:]
			} else {
				data = nil
			}
			if len(line) > 0 && !yield(line) {
				return
			}
		}
	}
}

// Monitor follows one log, from where it stopped the last time.
type Monitor struct {
	reader *Reader
	key    pki.LogKey
	seen   pki.Frontier
	note   []byte // the checkpoint that was seen last
	// unasked are entries that nobody is known to have asked for. They are
	// reported at every run until somebody says that he did.
	unasked []Entry
}

type wireState struct {
	Version    int     `json:"version"`
	Log        string  `json:"log"` // the key
	Size       uint64  `json:"size"`
	Nodes      []Hash  `json:"nodes"`
	Checkpoint string  `json:"checkpoint"`
	Unasked    []Entry `json:"unasked"`
}

// NewMonitor follows a log; state is what State returned after the last run, or
// nil at the first.
func NewMonitor(src Source, key pki.LogKey, state []byte) (*Monitor, error) {
	m := &Monitor{reader: NewReader(src, key), key: key}
	if state == nil {
		return m, nil
	}
	if err := m.load(state); err != nil {
		return nil, fmt.Errorf("state of the monitor: %w", err)
	}
	return m, nil
}

func (m *Monitor) load(state []byte) error {
	var w wireState
	if err := pki.UnmarshalStrict(state, &w, maxState); err != nil {
		return err
	}
	if w.Version != stateVersion || w.Log != m.key.String() {
		return fmt.Errorf("version %d, of log %.100q: %w", w.Version, w.Log, errs.Conflict)
	}
	m.seen = pki.Frontier{Size: w.Size}
	for _, n := range w.Nodes {
		m.seen.Nodes = append(m.seen.Nodes, n)
	}
	if err := m.seen.Check(); err != nil {
		return err
	}
	// The log's signature over what was seen: with it, a second history can be proved to others.
	m.note, m.unasked = []byte(w.Checkpoint), w.Unasked
	c, err := pki.OpenCheckpoint(m.note, &m.key)
	if err != nil {
		return err
	}
	if c.Size != m.seen.Size || c.Root != m.seen.Root() {
		return fmt.Errorf("it is not of its own checkpoint: %w", errs.Invalid)
	}
	return nil
}

// State returns what the next run needs.
func (m *Monitor) State() ([]byte, error) {
	w := wireState{
		Version: stateVersion, Log: m.key.String(), Size: m.seen.Size, Nodes: []Hash{}, Checkpoint: string(m.note), Unasked: m.unasked,
	}
	for _, n := range m.seen.Nodes {
		w.Nodes = append(w.Nodes, n)
	}
	if w.Unasked == nil {
		w.Unasked = []Entry{}
	}
	b, err := json.MarshalIndent(w, "", " ")
	if err != nil {
		return nil, fmt.Errorf("state of the monitor: %w", err)
	}
	return append(b, '\n'), nil
}

// Report is what a monitor found.
type Report struct {
	From    uint64  `json:"from"`    // first entry that was new
	Size    uint64  `json:"size"`    // of the log
	Unasked []Entry `json:"unasked"` // signatures that nobody asked for, old and new
	// Missing are bundles that somebody has and the log lacks: a signature made
	// past the log, or a log that shows different people different things.
	Missing []Missing `json:"missing"`
}

// Missing is a bundle that is not in the log.
type Missing struct {
	Name string `json:"name"`
	Hash Hash   `json:"hash"`
	Why  string `json:"why"`
}

// Found says whether there is anything to look at.
func (r *Report) Found() bool { return len(r.Unasked)+len(r.Missing) > 0 }

// Run reads what is new and compares the log with what was asked for. A log
// that does not continue what was seen before, is not complete or is not signed
// is an error (errs.Untrusted) and changes nothing: the state remains, with the
// last good checkpoint as evidence.
func (m *Monitor) Run(ctx context.Context, asked *Asked) (*Report, error) {
	r, err := m.run(ctx, asked)
	if err != nil {
		return nil, fmt.Errorf("monitor log %s: %w", m.key.Origin, err)
	}
	return r, nil
}

func (m *Monitor) run(ctx context.Context, asked *Asked) (*Report, error) {
	c, note, err := m.reader.Checkpoint(ctx)
	if err != nil {
		return nil, err
	}
	next := pki.Frontier{Size: m.seen.Size, Nodes: slices.Clone(m.seen.Nodes)}
	report := &Report{From: m.seen.Size, Size: c.Size, Unasked: []Entry{}, Missing: []Missing{}}
	for _, e := range m.unasked {
		if !asked.hashes[e.Hash] {
			report.Unasked = append(report.Unasked, e)
		}
	}
	fresh := map[Hash]bool{}
	err = m.reader.follow(ctx, &next, c, func(index uint64, entry []byte, leaf [32]byte) error {
		fresh[leaf] = true
		if asked.hashes[leaf] {
			return nil
		}
		if len(report.Unasked) == maxUnasked { // and none is lost: the state stays where it is
			return fmt.Errorf("more than %d signatures that nobody asked for: %w", maxUnasked, errs.Denied)
		}
		report.Unasked = append(report.Unasked, describe(index, entry, leaf))
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, b := range asked.bundles {
		if err := m.present(ctx, &b, fresh, c); errors.Is(err, errs.Untrusted) || errors.Is(err, errs.NotFound) {
			report.Missing = append(report.Missing, Missing{b.name, b.hash, err.Error()})
		} else if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(report.Unasked, func(a, b Entry) int { return cmp.Compare(a.Index, b.Index) })
	m.seen, m.note, m.unasked = next, note, report.Unasked
	return report, nil
}

// present checks that a bundle is in this log, at the place that it says.
func (m *Monitor) present(ctx context.Context, b *askedBundle, fresh map[Hash]bool, c *pki.Checkpoint) error {
	if b.proof == nil {
		if fresh[b.hash] {
			return nil
		}
		return fmt.Errorf("it has no proof of the log, and is not among the new entries: %w", errs.NotFound)
	}
	if b.proof.LogID != m.key.ID() {
		return fmt.Errorf("its proof is of another log: %w", errs.Untrusted)
	}
	older, err := pki.OpenCheckpoint(b.proof.Checkpoint, &m.key)
	if err != nil {
		return err
	}
	if older.Size > c.Size {
		return fmt.Errorf("its proof is of a log with %d entries, this one has %d: %w", older.Size, c.Size, errs.Untrusted)
	}
	if err := m.reader.Consistent(ctx, older, c); err != nil {
		return fmt.Errorf("its proof is of another history of this log: %w", err)
	}
	_, err = m.reader.Inclusion(ctx, b.hash, b.proof.Index, c)
	return err
}
