package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Outbox is the audit log as those read it who tell others of it, with how far
// each of them has come; *store.Store is one.
type Outbox interface {
	AuditAfter(ctx context.Context, after uint64, limit int) ([]audit.Record, error)
	// Outbox returns zero for one that never said.
	Outbox(ctx context.Context, name string) (position uint64, state string, err error)
	// SetOutbox never goes back: errs.Conflict.
	SetOutbox(ctx context.Context, name string, position uint64, state string) error
}

// Sequence is a log whose entries are the chain's records in their order;
// *transparency.Sequence is one.
type Sequence interface {
	// Append hands in the next entries; what the log holds already is compared.
	// The checkpoint is nil while the log holds more.
	Append(ctx context.Context, entries [][]byte) (checkpoint []byte, err error)
	// Missing is how many entries the log holds that were not handed in.
	Missing() uint64
	Seen() pki.Frontier
	Close() error
}

const (
	publishPage = 1024                   // records in one checkpoint, at most
	outboxPage  = 256                    // records in one message to a receiver; syslog.Sender keeps so many
	outboxPoll  = 500 * time.Millisecond // how soon a record is seen
	outboxRetry = 3 * time.Second
)

// Publisher puts the audit log into a log whose checkpoints are signed, so that
// whoever has one of them notices when a record is edited, dropped, moved or cut
// off. What was published is known from the log itself; the database says what
// the log must hold at least. Neither can lose or double a record, whenever a
// process ends.
type Publisher struct {
	Outbox Outbox
	Name   string // of the log, in the outbox
	// Open opens the log, which is known to hold what was seen.
	Open func(ctx context.Context, seen pki.Frontier) (Sequence, error)
	Log  *slog.Logger
	// Published is told every checkpoint, and the last record in it.
	Published func(last audit.Checkpoint, checkpoint []byte)
}

// published is the state that the outbox keeps for a log.
type published struct {
	Hash       audit.Hash   `json:"hash"` // of the last record
	Nodes      []audit.Hash `json:"nodes"`
	Checkpoint string       `json:"checkpoint"`
}

// Run publishes until ctx ends. Whatever fails is tried again: the server goes
// on, as every change is in the chain already, and how far the publication is
// behind is for the metrics to show. While another process writes the log it
// waits.
func (p *Publisher) Run(ctx context.Context) error {
	for {
		err := p.publish(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errs.Untrusted), errors.Is(err, errs.NotFound):
			p.Log.ErrorContext(ctx, "audit_log_does_not_agree", slog.String("log", p.Name), slog.Any("error", err))
		case !errors.Is(err, errs.Conflict):
			p.Log.WarnContext(ctx, "audit_not_published", slog.String("log", p.Name), slog.Any("error", err))
		}
		if !pause(ctx, outboxRetry) {
			return ctx.Err()
		}
	}
}

// pause reports whether the time went by before ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (p *Publisher) publish(ctx context.Context) (err error) {
	last, seen, err := p.load(ctx)
	if err != nil {
		return err
	}
	log, err := p.Open(ctx, seen)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	for {
		records, err := p.Outbox.AuditAfter(ctx, last.Seq, publishPage)
		if err != nil {
			return err
		}
		if len(records) == 0 {
			if n := log.Missing(); n > 0 {
				return fmt.Errorf("the chain ends at record %d, %d more were published: the database lost them: %w", last.Seq, n, errs.Untrusted)
			}
			if !pause(ctx, outboxPoll) {
				return ctx.Err()
			}
			continue
		}
		if last, err = p.step(ctx, log, last, records); err != nil {
			return err
		}
	}
}

// load returns where the publication stands, and holds it against the chain.
func (p *Publisher) load(ctx context.Context) (audit.Checkpoint, pki.Frontier, error) {
	var last audit.Checkpoint
	var seen pki.Frontier
	position, text, err := p.Outbox.Outbox(ctx, p.Name)
	if err != nil || position == 0 {
		return last, seen, err
	}
	var state published
	if err := json.Unmarshal([]byte(text), &state); err != nil {
		return last, seen, fmt.Errorf("outbox %s: %w: %w", p.Name, err, errs.Invalid)
	}
	last, seen.Size = audit.Checkpoint{Seq: position, Hash: state.Hash}, position
	for _, n := range state.Nodes {
		seen.Nodes = append(seen.Nodes, n)
	}
	records, err := p.Outbox.AuditAfter(ctx, position-1, 1)
	if err != nil {
		return last, seen, err
	}
	if len(records) != 1 || records[0].Checkpoint() != last {
		return last, seen, fmt.Errorf("record %d was published and is gone or another one: %w", position, errs.Untrusted)
	}
	return last, seen, nil
}

// step publishes records. The chain is verified before: what does not follow is
// not published.
func (p *Publisher) step(ctx context.Context, log Sequence, last audit.Checkpoint, records []audit.Record) (audit.Checkpoint, error) {
	entries := make([][]byte, len(records))
	for i := range records {
		if err := records[i].Follows(last); err != nil {
			return last, fmt.Errorf("audit: %w", err)
		}
		last = records[i].Checkpoint()
		entries[i] = []byte(last.String())
	}
	checkpoint, err := log.Append(ctx, entries)
	if err != nil || checkpoint == nil {
		return last, err
	}
	p.Published(last, checkpoint)
	state := published{Hash: last.Hash, Checkpoint: string(checkpoint)}
	for _, n := range log.Seen().Nodes {
		state.Nodes = append(state.Nodes, n)
	}
	text, err := json.Marshal(state)
	if err != nil {
		return last, err
	}
	return last, p.Outbox.SetOutbox(ctx, p.Name, last.Seq, string(text))
}

// Forwarder sends audit records to somebody elsewhere, each at least once and in
// order. While the receiver is away they wait in the database.
type Forwarder struct {
	Outbox Outbox
	Name   string // of the receiver, in the outbox
	// Send returns when the receiver has the records.
	Send func(ctx context.Context, records []audit.Record) error
	Log  *slog.Logger
}

// Run forwards until ctx ends or the outbox says that another went on
// (errs.Conflict); run it under a lease. What cannot be sent is tried again.
func (f *Forwarder) Run(ctx context.Context) error {
	position, _, err := f.Outbox.Outbox(ctx, f.Name)
	if err != nil {
		return err
	}
	for {
		records, err := f.Outbox.AuditAfter(ctx, position, outboxPage)
		if err != nil {
			return err
		}
		wait := outboxPoll
		if len(records) > 0 {
			if err := f.Send(ctx, records); err == nil {
				wait, position = 0, records[len(records)-1].Seq
				if err := f.Outbox.SetOutbox(ctx, f.Name, position, ""); err != nil {
					return err
				}
			} else if ctx.Err() == nil {
				wait = outboxRetry
				f.Log.WarnContext(ctx, "audit_not_forwarded", slog.String("to", f.Name), slog.Uint64("after", position), slog.Any("error", err))
			}
		}
		if !pause(ctx, wait) {
			return ctx.Err()
		}
	}
}
