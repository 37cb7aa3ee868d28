package transparency

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/transparency-dev/tessera"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Sequence is a log whose entries are those of a list that is kept elsewhere, in
// its order: the entry with index n is the list's n-th. So it can be told after
// any crash what is in it already, and nothing is skipped or doubled. One
// process at a time has it open. Its methods are for one goroutine.
type Sequence struct {
	log  *Log
	lock *os.File
	have uint64       // entries that the log holds
	seen pki.Frontier // those that were handed in, here or before
}

// OpenSequence opens the log in dir, and makes an empty one if nothing was seen
// of it. seen is what the log is known to hold from before; a log that has less
// is errs.Untrusted, one that is gone errs.NotFound. While another process has it
// open, it is errs.Conflict.
func OpenSequence(ctx context.Context, dir string, key pki.LogKey, signer crypto.Signer, seen pki.Frontier) (*Sequence, error) {
	s := &Sequence{seen: pki.Frontier{Size: seen.Size, Nodes: slices.Clone(seen.Nodes)}}
	err := s.seen.Check()
	if err == nil {
		err = s.open(ctx, dir, key, signer)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open log in %s: %w", dir, err), s.Close())
	}
	return s, nil
}

func (s *Sequence) open(ctx context.Context, dir string, key pki.LogKey, signer crypto.Signer) error {
	_, _, err := NewReader(Dir(dir), key).Checkpoint(ctx)
	switch {
	case errors.Is(err, errs.NotFound) && s.seen.Size > 0:
		return fmt.Errorf("%d entries were in it: %w", s.seen.Size, err)
	case err != nil && !errors.Is(err, errs.NotFound):
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // what is published
		return err
	}
	if s.lock, err = os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("another process writes it: %w", errs.Conflict)
	} else if err != nil {
		return err
	}
	if s.log, err = open(dir, key, signer); err != nil { //nolint:contextcheck // the log outlives this call
		return err
	}
	// What a crash left in the tree without a checkpoint gets one now.
	if s.have, err = s.log.integrated(ctx); err != nil {
		return err
	}
	if _, _, err := s.published(ctx); err != nil {
		return err
	}
	if s.have < s.seen.Size {
		return fmt.Errorf("it had %d entries and now has %d: it was cut off: %w", s.seen.Size, s.have, errs.Untrusted)
	}
	return nil
}

// Missing is how many entries the log holds that were not handed in yet.
func (s *Sequence) Missing() uint64 { return s.have - s.seen.Size }

// Seen is what was handed in: what OpenSequence takes.
func (s *Sequence) Seen() pki.Frontier {
	return pki.Frontier{Size: s.seen.Size, Nodes: slices.Clone(s.seen.Nodes)}
}

// Append hands in the next entries. Those that the log holds already are only
// compared. It returns the checkpoint that has all of them; nil while the log
// holds more. After an error the sequence must be closed: what the log holds is
// then to be found out anew. A log that holds something else is errs.Untrusted.
func (s *Sequence) Append(ctx context.Context, entries [][]byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	note, err := s.append(ctx, entries)
	if err != nil {
		return nil, fmt.Errorf("append to log %s: %w", s.log.key.Origin, err)
	}
	return note, nil
}

func (s *Sequence) append(ctx context.Context, entries [][]byte) ([]byte, error) {
	var futures []tessera.IndexFuture
	first := max(s.have, s.seen.Size)
	for _, e := range entries {
		if s.seen.Size >= s.have {
			futures = append(futures, s.log.appender.Add(ctx, tessera.NewEntry(e)))
		}
		s.seen.Add(pki.LeafHash(e))
	}
	// All of them, also after an error: nothing may be under way when the log is opened again.
	var failed error
	for i, f := range futures {
		at, err := f()
		if err == nil && at.Index != first+uint64(i) {
			err = fmt.Errorf("entry %d became %d: something else writes the log: %w", first+uint64(i), at.Index, errs.Untrusted)
		}
		failed = errors.Join(failed, err)
	}
	if failed != nil {
		return nil, failed
	}
	s.have = max(s.have, s.seen.Size)
	if s.seen.Size < s.have {
		return nil, nil
	}
	c, note, err := s.published(ctx)
	if err != nil {
		return nil, err
	}
	if c.Size != s.seen.Size || c.Root != s.seen.Root() {
		return nil, fmt.Errorf("the log's %d entries are not the %d that were handed in: %w", c.Size, s.seen.Size, errs.Untrusted)
	}
	return note, nil
}

// published waits for the checkpoint over all that the log holds.
func (s *Sequence) published(ctx context.Context) (*pki.Checkpoint, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	for {
		c, note, err := s.log.reader.Checkpoint(ctx)
		if err != nil && !errors.Is(err, errs.NotFound) {
			return nil, nil, err
		}
		if err == nil && c.Size >= s.have {
			return c, note, nil
		}
		select {
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("wait for a checkpoint over %d entries: %w", s.have, ctx.Err())
		case <-time.After(checkpointPoll):
		}
	}
}

// Close lets others open it.
func (s *Sequence) Close() error {
	var err error
	if s.log != nil {
		err = s.log.Close()
	}
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}
