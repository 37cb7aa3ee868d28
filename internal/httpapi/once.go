package httpapi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
)

// Answers is what Idempotency-Key needs; *control.Answers is one.
type Answers interface {
	Begin(ctx context.Context, by control.Actor, key, request string, now time.Time) (*control.Answered, error)
	Finish(ctx context.Context, by control.Actor, key string, answer *control.Answered, now time.Time) error
}

// Remember makes requests with the header Idempotency-Key happen once: for a day
// the same request with the same key gets the same answer. What fails changed
// nothing, and is not remembered. If the server dies between a change and its
// note, the request is done again after two minutes: what must not happen twice
// even then also has an If-Match.
func Remember(answers Answers) Option { return func(a *API) { a.answers = answers } }

const (
	maxKey    = 128      // bytes of a key
	maxAnswer = 64 << 10 // bytes of an answer that is kept
)

// once runs a handler unless it was run already.
func (a *API) once(w http.ResponseWriter, r *http.Request, by control.Actor, key string, serve Handler) error {
	if len(key) > maxKey || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("Idempotency-Key: want 1 to %d printable ASCII characters: %w", maxKey, errs.Invalid)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return fmt.Errorf("the body: %w: %w", err, errs.Invalid)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%q %q\n%s", r.Method, r.URL.RequestURI(), r.Header.Get("If-Match"), r.Header.Get("If-None-Match"), body))
	done, err := a.answers.Begin(r.Context(), by, key, hex.EncodeToString(sum[:]), a.now())
	if errors.Is(err, errs.Conflict) {
		return &statusError{status: http.StatusConflict, code: "IdempotencyKeyInUse", err: err}
	}
	if err != nil {
		return err
	}
	if done != nil {
		return replay(w, done)
	}
	keep := &recorder{ResponseWriter: w, sum: sha256.New(), status: http.StatusOK}
	err = serve(keep, r, by)
	var answer *control.Answered
	if err == nil && keep.status < 300 {
		answer = &control.Answered{
			Request: hex.EncodeToString(sum[:]), Started: a.now().Unix(), Status: keep.status, Header: map[string]string{},
			SHA256: hex.EncodeToString(keep.sum.Sum(nil)), Length: keep.length,
		}
		for _, h := range []string{"Content-Type", "ETag"} {
			if v := w.Header().Get(h); v != "" {
				answer.Header[h] = v
			}
		}
		if keep.length <= maxAnswer {
			answer.Body = keep.body.Bytes()
		}
	}
	// the client may be gone: what was done is noted all the same
	if err := a.answers.Finish(context.WithoutCancel(r.Context()), by, key, answer, a.now()); err != nil {
		a.log.ErrorContext(r.Context(), "answer_not_kept", slog.Any("error", err))
	}
	return err
}

// replay gives an answer again.
func replay(w http.ResponseWriter, done *control.Answered) error {
	if done.Length > int64(len(done.Body)) {
		return &statusError{
			status: http.StatusConflict, code: "AnswerNotKept",
			err: fmt.Errorf("the request was done, with status %d; its answer of %d bytes (SHA-256 %s) was too long to keep: read it again: %w", done.Status, done.Length, done.SHA256, errs.Conflict),
		}
	}
	for h, v := range done.Header {
		w.Header().Set(h, v)
	}
	w.Header().Set("Idempotency-Replayed", "true")
	w.WriteHeader(done.Status)
	_, _ = w.Write(done.Body) //nolint:gosec // with the type that it had; the client may be gone
	return nil
}

// recorder passes an answer on and keeps its beginning.
type recorder struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
	length int64
	sum    hash.Hash
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (r *recorder) Write(b []byte) (int, error) {
	r.length += int64(len(b))
	_, _ = r.sum.Write(b) // never fails
	if r.length <= maxAnswer {
		_, _ = r.body.Write(b) // never fails
	}
	return r.ResponseWriter.Write(b)
}
