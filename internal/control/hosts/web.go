package hosts

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"ringwall/internal/agentpb"
	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

// Records are what people read of what hosts reported; *store.Events is one.
type Records interface {
	QueryEvents(ctx context.Context, q fleet.EventQuery) ([]fleet.Event, error)
	Inventory(ctx context.Context, hosts []string, since time.Time, limit int) ([]fleet.Item, error)
	Coverage(ctx context.Context, of []string, ofSince time.Time, by []string, bySince time.Time) (fleet.Coverage, error)
}

// Inventory returns what ran on the hosts below a scope since a time (zero: ever),
// on most hosts first; at most limit, 0 for all.
func (s *Service) Inventory(ctx context.Context, below resource.ID, since time.Time, limit int) ([]fleet.Item, error) {
	all, err := s.Hosts(ctx, below)
	if err != nil {
		return nil, err
	}
	return s.Records.Inventory(ctx, ids(all), since, limit)
}

// Coverage says how much of what ran on some hosts ran on others since a time: the
// hosts of a ring that are to get a manifest, and those that have it.
func (s *Service) Coverage(ctx context.Context, of, by []string, since time.Time) (fleet.Coverage, error) {
	return s.Records.Coverage(ctx, of, time.Time{}, by, since)
}

func ids(all []fleet.Host) []string {
	out := make([]string, len(all))
	for i := range all {
		out[i] = all[i].ID
	}
	return out
}

// View is a host as people see it.
type View struct {
	ID         string            `json:"hostId"`
	Resource   resource.ID       `json:"id"`
	Name       string            `json:"name"`
	Labels     map[string]string `json:"labels,omitempty"`
	Critical   bool              `json:"critical,omitempty"`
	Revoked    bool              `json:"revoked,omitempty"`
	Isolated   bool              `json:"isolated,omitempty"` // is meant to be; the report says whether it is
	Joined     time.Time         `json:"joined"`
	Online     bool              `json:"online"`
	Seen       time.Time         `json:"seen,omitzero"`
	Assigned   string            `json:"assigned,omitempty"` // SHA-256 of the manifest meant for it
	AssignedAt time.Time         `json:"assigned_at,omitzero"`
	Report     fleet.Report      `json:"report"`
	Limited    uint64            `json:"limited,omitempty"`   // calls over a bound, of this replica
	Malformed  uint64            `json:"malformed,omitempty"` // records that were not understood, of this replica
}

func (h *host) view() View {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := &h.v
	out := View{
		ID: v.ID, Resource: v.Resource, Name: v.Resource.Name(), Labels: v.Labels, Critical: v.Critical, Revoked: v.Revoked, Isolated: h.props.Isolated,
		Joined: v.Joined, Online: v.Online, Seen: v.Seen, AssignedAt: v.AssignedAt, Report: v.Report,
		Limited: h.use.limited.Load(), Malformed: h.use.malformed.Load(),
	}
	if !v.Assigned.IsZero() {
		out.Assigned = v.Assigned.String()
	}
	return out
}

// may is who may do something at a place; the error is errs.Denied.
func (s *Service) may(ctx context.Context, by control.Actor, action string, at resource.ID) error {
	a, err := s.Door.Access(ctx, by, control.Question{Action: action, Scope: at})
	if err == nil && !a.Allowed {
		err = fmt.Errorf("%s may not %s on %s: %s: %w", by.Name, action, at, a.Reason, errs.Denied)
	}
	return err
}

// scope reads a place in the tree from a request.
func scope(r *http.Request, name string) (resource.ID, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		text = "/"
	}
	return resource.ParseID(text)
}

func number(r *http.Request, name string, otherwise, most int) (int, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > most {
		return 0, fmt.Errorf("%s is %.20q (1 to %d): %w", name, text, most, errs.Invalid)
	}
	return n, nil
}

func moment(r *http.Request, name string) (time.Time, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return t, fmt.Errorf("%s is %.40q, want a time like 2031-05-01T12:00:00Z: %w", name, text, errs.Invalid)
	}
	return t, nil
}

func answer(w http.ResponseWriter, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_, _ = w.Write(append(b, '\n')) // the client may be gone
	return nil
}

// Listing is the answer of ServeHosts.
type Listing struct {
	Hosts    []View   `json:"hosts"`
	Counters Counters `json:"counters"` // of this replica
}

// ServeHosts lists hosts as they are now: GET ?below=ID[&host=NAME or id].
func (s *Service) ServeHosts(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	below, err := scope(r, "below")
	if err != nil {
		return err
	}
	if err := s.may(r.Context(), by, fleet.TypeHost+"/read", below); err != nil {
		return err
	}
	all, err := s.Hosts(r.Context(), below)
	if err != nil {
		return err
	}
	out := Listing{Hosts: []View{}, Counters: s.Counters()}
	one := r.URL.Query().Get("host")
	for i := range all {
		if one != "" && one != all[i].ID && one != all[i].Resource.Name() && one != all[i].Resource.String() {
			continue
		}
		if h := s.host(all[i].ID); h != nil {
			out.Hosts = append(out.Hosts, h.view())
		}
	}
	return answer(w, out)
}

// ServeInventory lists what ran: GET ?below=ID[&since=TIME][&limit=N].
func (s *Service) ServeInventory(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	below, err := scope(r, "below")
	limit, err2 := number(r, "limit", 1000, 1_000_000)
	since, err3 := moment(r, "since")
	if err := errors.Join(err, err2, err3); err != nil {
		return err
	}
	if err := s.may(r.Context(), by, fleet.TypeHost+"/read", below); err != nil {
		return err
	}
	items, err := s.Inventory(r.Context(), below, since, limit)
	if err != nil {
		return err
	}
	return answer(w, struct {
		Items []fleet.Item `json:"items"`
	}{append([]fleet.Item{}, items...)})
}

// EventView is an event as people see it.
type EventView struct {
	Host     string          `json:"host"`
	Number   uint64          `json:"number"`
	Received time.Time       `json:"received"`
	At       time.Time       `json:"at,omitzero"` // by the host's clock
	What     string          `json:"what"`
	Name     string          `json:"name"`
	SHA256   string          `json:"sha256,omitempty"`
	Path     string          `json:"path,omitempty"`
	Record   json.RawMessage `json:"record"` // as the host sent it
}

// ServeEvents lists events of one host, the newest first:
// GET ?host=ID of the document[&what=block][&sha256=HEX][&since=TIME][&limit=N].
func (s *Service) ServeEvents(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	at, err := scope(r, "host")
	limit, err2 := number(r, "limit", 100, 10_000)
	since, err3 := moment(r, "since")
	if err := errors.Join(err, err2, err3); err != nil {
		return err
	}
	if err := s.may(r.Context(), by, fleet.TypeHost+"/read", at); err != nil {
		return err
	}
	s.mu.RLock()
	id := s.byKey[at.Key()]
	s.mu.RUnlock()
	if id == "" {
		return fmt.Errorf("host %s: %w", at, errs.NotFound)
	}
	q := fleet.EventQuery{Host: id, What: r.URL.Query().Get("what"), Since: since, Limit: limit}
	if text := r.URL.Query().Get("sha256"); text != "" {
		if q.SHA256, err = integrity.ParseDigest(text); err != nil {
			return err
		}
	}
	events, err := s.Records.QueryEvents(r.Context(), q)
	if err != nil {
		return err
	}
	out := struct {
		Events []EventView `json:"events"`
	}{[]EventView{}}
	for i := range events {
		out.Events = append(out.Events, show(&events[i]))
	}
	return answer(w, out)
}

func show(e *fleet.Event) EventView {
	v := EventView{Host: e.Host, Number: e.Number, Received: e.Received, At: e.At, What: e.What, Name: e.Name, Path: e.Path, Record: json.RawMessage("null")}
	if !e.SHA256.IsZero() {
		v.SHA256 = e.SHA256.String()
	}
	var record agentpb.Record
	if proto.Unmarshal(e.Body, &record) == nil {
		if b, err := protojson.Marshal(&record); err == nil {
			v.Record = b
		}
	}
	return v
}

// Bounds of chunks that are pushed.
const (
	MaxChunk   = 512 << 20 // bytes
	maxMissing = 20_000    // digests that are asked about at once
	slowest    = 10 * time.Minute
)

// Question asks which of some chunks are missing.
type Question struct {
	Scope  resource.ID        `json:"scope"` // whose manifests they are for
	Chunks []integrity.Digest `json:"chunks"`
}

// ServeMissing says which chunks must be pushed: POST a Question.
func (s *Service) ServeMissing(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	var q Question
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&q); err != nil {
		return fmt.Errorf("the body is no question: %w: %w", err, errs.Invalid)
	}
	if len(q.Chunks) > maxMissing {
		return fmt.Errorf("%d chunks (at most %d): %w", len(q.Chunks), maxMissing, errs.Invalid)
	}
	if err := s.may(r.Context(), by, fleet.TypeManifest+"/write", q.Scope); err != nil {
		return err
	}
	ctx := r.Context()
	out := Question{Scope: q.Scope, Chunks: []integrity.Digest{}}
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		chunks, err := of[chunkTx](tx)
		if err != nil {
			return err
		}
		missing, err := chunks.MissingChunks(ctx, q.Chunks)
		out.Chunks = append(out.Chunks[:0], missing...)
		return err
	})
	if err != nil {
		return err
	}
	return answer(w, out)
}

// chunkRequest is which chunk a request is about and for whose manifests, if the
// actor may do that to manifests there.
func (s *Service) chunkRequest(r *http.Request, by control.Actor, verb string) (want integrity.Digest, at resource.ID, err error) {
	if want, err = integrity.ParseDigest(r.PathValue("sha256")); err != nil {
		return want, at, err
	}
	if at, err = scope(r, "scope"); err != nil {
		return want, at, err
	}
	return want, at, s.may(r.Context(), by, fleet.TypeManifest+"/"+verb, at)
}

// ServeChunk takes a chunk: PUT …/{sha256}?scope=ID with its bytes. What does not
// have the digest is refused, so that a chunk can be pushed by anybody who may
// and means the same to everybody.
func (s *Service) ServeChunk(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	want, at, err := s.chunkRequest(r, by, "write") // before anything is read
	if err != nil {
		return err
	}
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(slowest)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	f, err := os.CreateTemp(s.Spool, "ringwall-chunk-*")
	if err != nil {
		return fmt.Errorf("receive a chunk: %w", err)
	}
	defer func() {
		_ = f.Close() // it is removed
		_ = os.Remove(f.Name())
	}()
	sum := sha256.New()
	size, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(r.Body, MaxChunk+1))
	if err != nil {
		return fmt.Errorf("receive a chunk: %w: %w", err, errs.Invalid)
	}
	got := integrity.Digest(sum.Sum(nil))
	switch {
	case size > MaxChunk:
		return fmt.Errorf("a chunk of more than %d bytes: %w", MaxChunk, errs.Invalid)
	case got != want:
		return fmt.Errorf("the bytes have the digest %v, not %v: %w", got, want, errs.Untrusted)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := s.putChunk(r.Context(), by, at, want, size, f); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// ServeContent gives a chunk: GET …/{sha256}?scope=ID. It takes reading the
// manifests of the scope, which name chunks; whoever knows a digest of another's
// has read it.
func (s *Service) ServeContent(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	want, _, err := s.chunkRequest(r, by, "read")
	if err != nil {
		return err
	}
	ctx := r.Context()
	for offset, size := int64(0), int64(1); offset < size; {
		var data []byte
		err := s.Store.Read(ctx, func(tx control.Tx) error {
			chunks, err := of[chunkTx](tx)
			if err == nil {
				data, size, err = chunks.Chunk(ctx, want, offset, maxChunkAnswer)
			}
			return err
		})
		if err != nil {
			return err // only the first part can fail in a way that the client sees
		}
		if offset == 0 {
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		}
		if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(slowest)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if _, err := w.Write(data); err != nil || len(data) == 0 {
			return nil //nolint:nilerr // the client is gone, and sees that bytes are missing
		}
		offset += int64(len(data))
	}
	return nil
}

// chunkPart is the size of what is written in one transaction, in bytes: the
// store's.
const chunkPart = 1 << 20

// putChunk stores parts, each in a transaction of its own, so that a large file
// holds nobody up; the last makes it a chunk, with a record.
func (s *Service) putChunk(ctx context.Context, by control.Actor, at resource.ID, sum integrity.Digest, size int64, from io.Reader) error {
	buf := make([]byte, min(size, chunkPart))
	for part, left := 0, size; ; part++ {
		n := int(min(left, chunkPart))
		if _, err := io.ReadFull(from, buf[:n]); err != nil {
			return err
		}
		left -= int64(n)
		store := func(tx control.Tx) (chunkTx, error) {
			chunks, err := of[chunkTx](tx)
			if err != nil || n == 0 {
				return chunks, err
			}
			return chunks, chunks.PutChunkPart(ctx, sum, part, buf[:n])
		}
		if left > 0 {
			if err := s.Store.Write(ctx, func(tx control.Tx) error { _, err := store(tx); return err }); err != nil {
				return err
			}
			continue
		}
		return s.Door.Act(ctx, by, fleet.TypeManifest, "write", at, func(tx control.Tx, rec *audit.Record) error {
			chunks, err := store(tx)
			if err != nil {
				return err
			}
			rec.Detail = fmt.Sprintf(`{"chunk":%q,"size":%d}`, sum, size)
			return chunks.PutChunk(ctx, sum, size)
		})
	}
}
