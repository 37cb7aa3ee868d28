// Package audit is the record of every change, made, failed or refused: rows that are
// chained by SHA-256, so that none can be edited, dropped, moved or inserted
// without every later hash being wrong. The row is written in the transaction
// of the change itself: no record, no change.
//
// A chain proves its own order, not that it is whole: whoever holds the
// database can cut its end off or write another from the start. A Checkpoint
// that was kept elsewhere shows that.
package audit

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Outcome is what became of a request.
type Outcome string

// The outcomes.
const (
	Done    Outcome = "done"    // the change was made
	Refused Outcome = "refused" // the actor may not
	Failed  Outcome = "failed"  // it was allowed and did not succeed
)

// Hash is the SHA-256 that chains a record to the one before it.
type Hash [sha256.Size]byte

// String is the hash in hex.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements encoding.TextMarshaler.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hash) UnmarshalText(b []byte) error {
	if n, err := hex.Decode(h[:], b[:min(len(b), 2*len(h))]); err != nil || n != len(h) || len(b) != 2*len(h) {
		return fmt.Errorf("hash %.80q: %w", b, errs.Invalid)
	}
	return nil
}

// Record is one row. Its detail is a text that holds JSON, and not JSON itself,
// so that tools which write the record again do not change what was hashed.
type Record struct {
	Seq     uint64    `json:"seq"` // from 1, without gaps
	At      time.Time `json:"at"`  // the server's clock, UTC, to the microsecond
	Actor   string    `json:"actor"`
	Action  string    `json:"action"` // as role definitions name it
	Target  string    `json:"target"` // a resource's id
	Outcome Outcome   `json:"outcome"`
	Reason  string    `json:"reason,omitempty"` // the assignment that allowed it, or why it was refused
	Detail  string    `json:"detail,omitempty"` // what changed, as JSON text; never a secret
	Prev    Hash      `json:"prev"`
	Hash    Hash      `json:"hash"`
}

const (
	maxText   = 4096    // bytes of a text
	maxDetail = 1 << 20 // bytes
	maxLine   = 2 << 20 // bytes of a record as JSON
)

// Seal makes a record the one after a checkpoint.
func (r *Record) Seal(after Checkpoint) error {
	r.Seq, r.Prev, r.At = after.Seq+1, after.Hash, r.At.UTC().Truncate(time.Microsecond)
	if err := r.check(); err != nil {
		return fmt.Errorf("audit record of %.80q by %.80q: %w", r.Action, r.Actor, err)
	}
	r.Hash = r.sum()
	return nil
}

func (r *Record) check() error {
	for _, s := range []string{r.Actor, r.Action, r.Target, r.Reason} {
		if len(s) > maxText || !utf8.ValidString(s) {
			return fmt.Errorf("a text is too long or not UTF-8: %w", errs.Invalid)
		}
	}
	switch {
	case r.Actor == "" || r.Action == "":
		return fmt.Errorf("no actor or no action: %w", errs.Invalid)
	case r.Outcome != Done && r.Outcome != Refused && r.Outcome != Failed:
		return fmt.Errorf("outcome %.20q: %w", r.Outcome, errs.Invalid)
	case len(r.Detail) > maxDetail || r.Detail != "" && !json.Valid([]byte(r.Detail)):
		return fmt.Errorf("detail is too long or not JSON: %w", errs.Invalid)
	}
	return nil
}

// sum hashes every field with its length, so that no two records have one sum.
func (r *Record) sum() Hash {
	h := sha256.New()
	var n [8]byte
	number := func(v uint64) {
		binary.BigEndian.PutUint64(n[:], v)
		h.Write(n[:])
	}
	text := func(s string) {
		number(uint64(len(s)))
		h.Write([]byte(s))
	}
	text("ringwall audit 1")
	h.Write(r.Prev[:])
	number(r.Seq)
	number(uint64(r.At.UnixMicro()))
	for _, s := range []string{r.Actor, r.Action, r.Target, string(r.Outcome), r.Reason, r.Detail} {
		text(s)
	}
	return Hash(h.Sum(nil))
}

// Checkpoint is the end of a chain at some time. The zero value is before the
// first record.
type Checkpoint struct {
	Seq  uint64 `json:"seq"`
	Hash Hash   `json:"hash"`
}

// String is the form that people keep: NUMBER:HASH. It is also the record's
// leaf in the published log: the hash stands for all that the record says and
// for every record before it, so that the log can be shown to anybody.
func (c Checkpoint) String() string { return strconv.FormatUint(c.Seq, 10) + ":" + c.Hash.String() }

// ParseCheckpoint reads what String gives.
func ParseCheckpoint(s string) (Checkpoint, error) {
	var c Checkpoint
	number, hash, ok := strings.Cut(s, ":")
	n, err := strconv.ParseUint(number, 10, 63)
	if !ok || err != nil || c.Hash.UnmarshalText([]byte(hash)) != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint %.100q: want NUMBER:HASH: %w", s, errs.Invalid)
	}
	if c.Seq = n; c.String() != s {
		return Checkpoint{}, fmt.Errorf("checkpoint %.100q: not in its one spelling: %w", s, errs.Invalid)
	}
	return c, nil
}

// Checkpoint is the chain's end after r.
func (r *Record) Checkpoint() Checkpoint { return Checkpoint{r.Seq, r.Hash} }

// Follows checks that r is the record after a checkpoint, and unchanged. The
// error is errs.Untrusted and says what is wrong.
func (r *Record) Follows(c Checkpoint) error {
	switch {
	case r.Seq > c.Seq+1:
		return fmt.Errorf("records %d to %d are missing: %w", c.Seq+1, r.Seq-1, errs.Untrusted)
	case r.Seq != c.Seq+1:
		return fmt.Errorf("record %d comes after %d: out of order or repeated: %w", r.Seq, c.Seq, errs.Untrusted)
	case r.Prev != c.Hash:
		return fmt.Errorf("record %d does not follow the one before it: one of them was changed: %w", r.Seq, errs.Untrusted)
	case r.check() != nil || r.Hash != r.sum():
		return fmt.Errorf("record %d was changed: %w", r.Seq, errs.Untrusted)
	}
	return nil
}

// Report is what Verify found.
type Report struct {
	Records int        `json:"records"`
	From    uint64     `json:"from"` // first record; 0: there is none
	To      Checkpoint `json:"to"`
	Refused int        `json:"refused"` // how many of them are refusals
	Signed  uint64     `json:"signed"`  // how many a signed checkpoint is about
}

// Verify reads records, a JSON object a line as an export has them, and checks
// that they are an unbroken chain that begins after from. kept are checkpoints
// that were kept elsewhere: each must be a place in the chain, so that a chain
// that was cut off or written anew is found. The error is errs.Untrusted for a
// chain that is broken, errs.Invalid for lines that are none.
func Verify(in io.Reader, from Checkpoint, kept ...Checkpoint) (*Report, error) {
	v := verification{rep: &Report{To: from}, open: map[uint64]Hash{}}
	err := v.expect(kept)
	if err == nil {
		err = v.meet(from)
	}
	return v.finish(in, err)
}

// VerifySigned is Verify of a whole chain, from its first record on, against
// checkpoints of the log that it was published in: the records must be what the
// log's key signed, all of them, in their order. That the signatures are good is
// for the caller to have checked. Records that are newer than the checkpoints
// may follow.
func VerifySigned(in io.Reader, signed []pki.Checkpoint, kept ...Checkpoint) (*Report, error) {
	v := verification{rep: &Report{}, open: map[uint64]Hash{}, signed: slices.Clone(signed), tree: &pki.Frontier{}}
	slices.SortFunc(v.signed, func(a, b pki.Checkpoint) int { return cmp.Compare(a.Size, b.Size) })
	err := v.expect(kept)
	if err == nil {
		err = v.compare()
	}
	return v.finish(in, err)
}

// verification is one under way.
type verification struct {
	rep    *Report
	open   map[uint64]Hash  // checkpoints that were not met yet
	tree   *pki.Frontier    // of the published log, if that is asked
	signed []pki.Checkpoint // by size; those that were not reached yet
}

func (v *verification) expect(kept []Checkpoint) error {
	for _, k := range kept {
		if h, ok := v.open[k.Seq]; ok && h != k.Hash {
			return fmt.Errorf("two checkpoints of record %d differ: the chain was written twice: %w", k.Seq, errs.Untrusted)
		}
		v.open[k.Seq] = k.Hash
	}
	return nil
}

func (v *verification) meet(c Checkpoint) error {
	h, ok := v.open[c.Seq]
	delete(v.open, c.Seq)
	if ok && h != c.Hash {
		return fmt.Errorf("record %d is not the one of the checkpoint: the chain was written anew: %w", c.Seq, errs.Untrusted)
	}
	return nil
}

// compare holds the tree so far against the signed checkpoints of its size.
func (v *verification) compare() error {
	for len(v.signed) > 0 && v.signed[0].Size == v.tree.Size {
		if v.signed[0].Root != v.tree.Root() {
			return fmt.Errorf("the first %d records are not those that were published: %w", v.tree.Size, errs.Untrusted)
		}
		v.rep.Signed, v.signed = v.tree.Size, v.signed[1:]
	}
	return nil
}

func (v *verification) record(line []byte) error {
	rep := v.rep
	var r Record
	if err := pki.UnmarshalStrict(line, &r, maxLine); err != nil {
		return fmt.Errorf("the line after record %d: %w", rep.To.Seq, err)
	}
	if err := errors.Join(r.Follows(rep.To), v.meet(r.Checkpoint())); err != nil {
		return err
	}
	if rep.Records == 0 {
		rep.From = r.Seq
	}
	rep.Records, rep.To = rep.Records+1, r.Checkpoint()
	if r.Outcome == Refused {
		rep.Refused++
	}
	if v.tree == nil {
		return nil
	}
	v.tree.Add(pki.LeafHash([]byte(rep.To.String())))
	return v.compare()
}

func (v *verification) finish(in io.Reader, err error) (*Report, error) {
	if err == nil {
		err = v.run(in)
	}
	if err != nil {
		err = fmt.Errorf("audit: %w", err)
	}
	return v.rep, err
}

func (v *verification) run(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		if err := v.record(lines.Bytes()); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("longer than %d bytes: %w", maxLine, errs.Invalid)
		}
		return fmt.Errorf("the line after record %d: %w", v.rep.To.Seq, err)
	}
	for seq := range v.open {
		if seq > v.rep.To.Seq {
			return fmt.Errorf("a checkpoint knows record %d, the chain ends at %d: it was cut off: %w", seq, v.rep.To.Seq, errs.Untrusted)
		}
	}
	if n := len(v.signed); n > 0 {
		return fmt.Errorf("%d records were published, the chain ends at %d: it was cut off: %w", v.signed[n-1].Size, v.rep.To.Seq, errs.Untrusted)
	}
	return nil
}
