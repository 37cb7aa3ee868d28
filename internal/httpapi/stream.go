package httpapi

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// writeTime is how long one write to a slow client may take.
const writeTime = 30 * time.Second

// keepAlive is how often a stream says where it is although nothing happened.
const keepAlive = 15 * time.Second

// number reads a parameter of digits; 0 if it is not there.
func number(s, name string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("%s is %.20q, no number: %w", name, s, errs.Invalid)
	}
	return n, nil
}

// watch streams changes as server-sent events. Each has the revision as its id,
// so that a client that was cut off goes on with Last-Event-ID; "passed" says
// how far the stream is when nothing was to be seen.
func (a *API) watch(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	q := r.URL.Query()
	below, err := resource.ParseID(cmp.Or(q.Get("below"), "/"))
	if err != nil {
		return err
	}
	after, err := number(cmp.Or(r.Header.Get("Last-Event-ID"), q.Get("after")), "after")
	if err != nil {
		return err
	}
	s := &stream{w: w, control: http.NewResponseController(w)}
	last, said := after, a.now()
	err = a.door.Watch(r.Context(), by, below, after, func(c resource.Change) error {
		b, err := json.Marshal(struct {
			Revision uint64            `json:"revision"`
			Deleted  bool              `json:"deleted,omitempty"`
			Document resource.Document `json:"document"`
		}{c.Revision, c.Deleted, c.Document})
		if err != nil {
			return err
		}
		said, last = a.now(), c.Revision
		return s.send("change", c.Revision, b)
	}, func(revision uint64) error {
		if s.begun && revision == last && a.now().Sub(said) < keepAlive {
			return nil
		}
		said, last = a.now(), revision
		return s.send("passed", revision, []byte("{}"))
	})
	if s.begun {
		return nil // the status is out; the client sees the stream end
	}
	return err
}

// stream writes server-sent events (WHATWG HTML, section 9.2).
type stream struct {
	w       http.ResponseWriter
	control *http.ResponseController
	begun   bool
}

func (s *stream) send(event string, id uint64, data []byte) error {
	if !s.begun {
		s.w.Header().Set("Content-Type", "text/event-stream")
		s.w.WriteHeader(http.StatusOK)
		s.begun = true
	}
	if err := s.control.SetWriteDeadline(time.Now().Add(writeTime)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	if _, err := fmt.Fprintf(s.w, "event: %s\nid: %d\ndata: %s\n\n", event, id, strings.ReplaceAll(string(data), "\n", " ")); err != nil {
		return err
	}
	return s.control.Flush()
}

// audit writes the records after a number as JSON lines, to the end of the log.
func (a *API) audit(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	after, err := number(r.URL.Query().Get("after"), "after")
	if err != nil {
		return err
	}
	c := http.NewResponseController(w)
	for first := true; ; first = false {
		page, err := a.door.Audit(r.Context(), by, after, auditPage)
		if err != nil && first {
			return err
		}
		if err != nil { // the status is out: end without the last chunk, so that nobody takes it for whole
			panic(http.ErrAbortHandler)
		}
		if first {
			w.Header().Set("Content-Type", "application/jsonl")
		}
		if err := c.SetWriteDeadline(time.Now().Add(writeTime)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		enc := json.NewEncoder(w)
		for i := range page {
			if err := enc.Encode(&page[i]); err != nil {
				return nil //nolint:nilerr // the client is gone
			}
			after = page[i].Seq
		}
		if len(page) < auditPage {
			return nil
		}
	}
}
