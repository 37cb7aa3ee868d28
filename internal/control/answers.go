package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/errs"
)

// Answers are what requests with an Idempotency-Key were answered, so that one
// that is repeated, because its answer was lost, is not done again.
type Answers struct{ door *Door }

// NewAnswers keeps them in a door's store.
func NewAnswers(d *Door) *Answers { return &Answers{d} }

const (
	answersKept = 24 * time.Hour
	// startedFor is how long a request that began may go on: after that it is
	// taken for lost with its process, and may be done again.
	startedFor = 2 * time.Minute
)

// Answered is what a request was answered.
type Answered struct {
	Request string            `json:"request"` // SHA-256 in hex of all that it said
	Started int64             `json:"started"` // seconds since 1970
	Status  int               `json:"status,omitempty"`
	Header  map[string]string `json:"header,omitempty"`
	// SHA256 and Length are of the body, which is here if it is short.
	SHA256 string `json:"sha256,omitempty"`
	Length int64  `json:"length,omitempty"`
	Body   []byte `json:"body,omitempty"`
}

func answerKey(by *Actor, key string) string {
	sum := sha256.Sum256([]byte(by.ID + "\x00" + key))
	return "answer/" + hex.EncodeToString(sum[:])
}

// Begin notes that an actor's request with a key begins; nil: do it. If it was
// done already, it is what was answered. errs.Conflict: the key was used for
// another request, or its request goes on at this moment.
func (a *Answers) Begin(ctx context.Context, by Actor, key, request string, now time.Time) (*Answered, error) {
	var out *Answered
	at := answerKey(&by, key)
	err := a.door.store.Write(ctx, func(tx Tx) error {
		out = nil
		k, err := keeperOf(tx)
		if err != nil {
			return err
		}
		var old Answered
		err = recall(ctx, k, at, &old)
		switch {
		case errors.Is(err, errs.NotFound):
		case err != nil:
			return err
		case old.Request != request:
			return fmt.Errorf("the key was used for another request: %w", errs.Conflict)
		case old.Status != 0:
			out = &old
			return nil
		case now.Sub(time.Unix(old.Started, 0)) < startedFor:
			return fmt.Errorf("the request goes on at this moment: %w", errs.Conflict)
		}
		return keep(ctx, k, at, Answered{Request: request, Started: now.Unix()}, now.Add(answersKept))
	})
	if err != nil {
		return nil, fmt.Errorf("idempotency key: %w", err)
	}
	return out, nil
}

// Finish notes the answer; nil: it failed, and may be tried again.
func (a *Answers) Finish(ctx context.Context, by Actor, key string, answer *Answered, now time.Time) error {
	at := answerKey(&by, key)
	return a.door.store.Write(ctx, func(tx Tx) error {
		k, err := keeperOf(tx)
		if err != nil {
			return err
		}
		if answer == nil {
			return k.Forget(ctx, at)
		}
		return keep(ctx, k, at, answer, now.Add(answersKept))
	})
}
