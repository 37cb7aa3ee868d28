package codesign

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"sort"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// The cat1 format: a header and fixed-width records in strictly increasing
// order of digest, little-endian. There is exactly one encoding of a set of
// records.
const (
	catMagic      = "RWCAT1\n\x00"
	catHeader     = 32
	catRecord     = 68
	catVersion    = 1
	MaxRecords    = 4 << 20
	kindMask      = uint16(1<<integrity.KindExec | 1<<integrity.KindLibrary | 1<<integrity.KindScript | 1<<integrity.KindModule | 1<<integrity.KindFirmware | 1<<integrity.KindKexec)
	maxCatalogue  = catHeader + MaxRecords*catRecord
	catClassifier = 10
	catCount      = 12
	catReserved   = 16
)

// Record is one digest of a catalogue.
type Record struct {
	Digest integrity.Digest // SHA-256 of the content
	Verity integrity.Digest // its fs-verity digest; zero when the content is no file of its own
	Kinds  integrity.KindSet
	Flags  Flags
}

// Catalogue is a parsed cat1 blob. It refers to the bytes that it was parsed
// from and copies nothing.
type Catalogue struct {
	raw        []byte
	classifier int
}

// ParseCatalogue checks a cat1 blob: bounds, exact length, strict order, and
// that no bit is set that this version does not know.
func ParseCatalogue(b []byte) (*Catalogue, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("catalogue: %s: %w", fmt.Sprintf(format, a...), errs.Invalid)
	}
	if len(b) < catHeader || string(b[:8]) != catMagic {
		return nil, bad("no cat1 header")
	}
	le := binary.LittleEndian
	if v := le.Uint16(b[8:]); v != catVersion {
		return nil, bad("version %d (this build reads %d)", v, catVersion)
	}
	n := le.Uint32(b[catCount:])
	if n > MaxRecords || len(b) != catHeader+int(n)*catRecord {
		return nil, bad("%d records do not fit %d bytes", n, len(b))
	}
	if !allZero(b[catReserved:catHeader]) {
		return nil, bad("reserved bytes are set")
	}
	c := &Catalogue{raw: b, classifier: int(le.Uint16(b[catClassifier:]))}
	if c.classifier == 0 {
		return nil, bad("no classifier version")
	}
	var before []byte
	for i := range c.Len() {
		r := c.record(i)
		kinds, flags := le.Uint16(r[64:]), Flags(le.Uint16(r[66:]))
		switch {
		case before != nil && bytes.Compare(before, r[:32]) >= 0:
			return nil, bad("record %d is out of order or repeated", i)
		case kinds == 0 || kinds&^kindMask != 0 || flags&^knownFlags != 0:
			return nil, bad("record %d has kinds %#x, flags %#x", i, kinds, uint16(flags))
		}
		before = r[:32]
	}
	return c, nil
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

func (c *Catalogue) record(i int) []byte { return c.raw[catHeader+i*catRecord:][:catRecord] }

// Len returns the number of records.
func (c *Catalogue) Len() int { return (len(c.raw) - catHeader) / catRecord }

// Classifier returns the version of the rules that the catalogue was made by.
func (c *Catalogue) Classifier() int { return c.classifier }

// Digest returns the SHA-256 of the blob: what a release record signs.
func (c *Catalogue) Digest() integrity.Digest { return sha256.Sum256(c.raw) }

// At returns record i.
func (c *Catalogue) At(i int) Record {
	r := c.record(i)
	return Record{
		Digest: integrity.Digest(r[:32]), Verity: integrity.Digest(r[32:64]),
		Kinds: integrity.KindSet(binary.LittleEndian.Uint16(r[64:])), Flags: Flags(binary.LittleEndian.Uint16(r[66:])),
	}
}

// All yields the records in order of digest.
func (c *Catalogue) All() iter.Seq2[int, Record] {
	return func(yield func(int, Record) bool) {
		for i := range c.Len() {
			if !yield(i, c.At(i)) {
				return
			}
		}
	}
}

// Lookup finds the record of a content digest.
func (c *Catalogue) Lookup(d integrity.Digest) (Record, bool) {
	i, found := sort.Find(c.Len(), func(i int) int { return bytes.Compare(d[:], c.record(i)[:32]) })
	if !found {
		return Record{}, false
	}
	return c.At(i), true
}

// EncodeCatalogue returns the cat1 blob of the records. Records of one digest
// are merged: their kinds and flags are united, except that FlagData, FlagInner
// and FlagNested stay only when they are set in all of them.
func EncodeCatalogue(records []Record) ([]byte, error) {
	rs := mergeRecords(records)
	if len(rs) > MaxRecords {
		return nil, fmt.Errorf("catalogue: %d records (at most %d): %w", len(rs), MaxRecords, errs.Invalid)
	}
	b := make([]byte, catHeader, catHeader+len(rs)*catRecord)
	copy(b, catMagic)
	le := binary.LittleEndian
	le.PutUint16(b[8:], catVersion)
	le.PutUint16(b[catClassifier:], ClassifierVersion)
	le.PutUint32(b[catCount:], uint32(len(rs))) //nolint:gosec // bounded above
	for i := range rs {
		r := &rs[i]
		b = append(append(b, r.Digest[:]...), r.Verity[:]...)
		b = le.AppendUint16(le.AppendUint16(b, uint16(r.Kinds)), uint16(r.Flags))
	}
	if _, err := ParseCatalogue(b); err != nil {
		return nil, err
	}
	return b, nil
}

func mergeRecords(records []Record) []Record {
	rs := slices.Clone(records)
	slices.SortFunc(rs, func(a, b Record) int { return bytes.Compare(a.Digest[:], b.Digest[:]) })
	out := rs[:0]
	for _, r := range rs {
		if len(out) == 0 || out[len(out)-1].Digest != r.Digest {
			out = append(out, r)
			continue
		}
		last := &out[len(out)-1]
		const inAll = FlagData | FlagInner | FlagNested
		last.Kinds |= r.Kinds
		last.Flags = (last.Flags|r.Flags)&^inAll | last.Flags&r.Flags&inAll
		if last.Verity.IsZero() {
			last.Verity = r.Verity
		}
	}
	return out
}
