package store_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

func sum(s string) integrity.Digest { return sha256.Sum256([]byte(s)) }

func hostID(n int) string { return fmt.Sprintf("%032x", n) }

func TestGrants(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s, ctx := open(t, url), t.Context()
		write := func(fn func(tx *store.Tx) error) {
			t.Helper()
			if err := s.Write(ctx, fn); err != nil {
				t.Fatal(err)
			}
		}
		grant := func(n int) *fleet.Grant {
			return &fleet.Grant{Host: hostID(n), Resource: id(fmt.Sprintf("%s/providers/Ringwall.Fleet/hosts/h%d", group, n)), Certificate: []byte{1}, Key: sum("key")}
		}
		write(func(tx *store.Tx) error { return errors.Join(tx.PutGrant(ctx, grant(1)), tx.PutGrant(ctx, grant(2))) })
		all, mark, err := s.GrantsSince(ctx, 0)
		if err != nil || len(all) != 2 || mark == 0 || !all[0].Assigned.IsZero() {
			t.Fatalf("%+v, %d, %v", all, mark, err)
		}
		write(func(tx *store.Tx) error { return tx.Assign(ctx, sum("m1"), []string{hostID(1), hostID(99)}) })
		renewed := grant(1)
		renewed.OldKey, renewed.Key = renewed.Key, sum("key 2")
		write(func(tx *store.Tx) error { return tx.PutGrant(ctx, renewed) })
		err = s.Read(ctx, func(tx *store.Tx) error {
			got, err := tx.Grant(ctx, hostID(1))
			if err != nil {
				return err
			}
			if got.Assigned != sum("m1") || got.AssignedAt.IsZero() || got.Key != sum("key 2") || got.OldKey != sum("key") || !got.Resource.Equal(renewed.Resource) {
				t.Errorf("%+v", got)
			}
			if _, err := tx.Grant(ctx, hostID(99)); !errors.Is(err, errs.NotFound) {
				t.Errorf("a host that there is not: %v", err)
			}
			if err := tx.PutGrant(ctx, grant(3)); err == nil {
				t.Error("a reading transaction wrote")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		write(func(tx *store.Tx) error { return tx.Assign(ctx, integrity.Digest{}, []string{hostID(1)}) })
		if all, _, err := s.GrantsSince(ctx, mark); err != nil || !all[len(all)-1].Assigned.IsZero() || all[len(all)-1].AssignedAt.IsZero() {
			t.Errorf("taken away: %+v, %v", all, err)
		}
	})
}

func TestPresence(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s, ctx := open(t, url), t.Context()
		now := time.Now().UTC().Truncate(time.Microsecond)
		var all []fleet.Presence
		for n := range 1200 { // more than one statement
			all = append(all, fleet.Presence{Host: hostID(n), Seen: now, Report: fleet.Report{Agent: "1"}, Labels: map[string]string{"role": "web"}})
		}
		if err := s.SavePresence(ctx, "a", all); err != nil {
			t.Fatal(err)
		}
		older := all[0]
		older.Seen, older.Report.Agent = now.Add(-time.Minute), "0" // of a replica that is late
		newer := all[1]
		newer.Seen, newer.Report.Agent = now.Add(time.Second), "2"
		if err := s.SavePresence(ctx, "b", []fleet.Presence{older, newer}); err != nil {
			t.Fatal(err)
		}
		got, mark, err := s.PresenceSince(ctx, "", 0)
		if err != nil || len(got) != 1200 || mark == 0 {
			t.Fatalf("%d, %d, %v", len(got), mark, err)
		}
		for _, p := range got {
			want := "1"
			if p.Host == hostID(1) {
				want = "2"
			}
			if p.Report.Agent != want || p.Labels["role"] != "web" {
				t.Fatalf("%+v", p)
			}
		}
		if got, _, err := s.PresenceSince(ctx, "a", 0); err != nil || len(got) != 1 || got[0].Host != hostID(1) || !got[0].Seen.Equal(newer.Seen) {
			t.Errorf("of others: %+v, %v", got, err)
		}
	})
}

func TestChunks(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s, ctx := open(t, url), t.Context()
		data := bytes.Repeat([]byte("ringwall"), store.ChunkPart*5/16) // 2.5 parts
		d := integrity.Digest(sha256.Sum256(data))
		put := func(part int, last bool) {
			t.Helper()
			err := s.Write(ctx, func(tx *store.Tx) error {
				from := part * store.ChunkPart
				if err := tx.PutChunkPart(ctx, d, part, data[from:min(len(data), from+store.ChunkPart)]); err != nil || !last {
					return err
				}
				return tx.PutChunk(ctx, d, int64(len(data)))
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		read := func(offset int64, limit int) (out []byte, size int64, err error) {
			err = s.Read(ctx, func(tx *store.Tx) (err error) { out, size, err = tx.Chunk(ctx, d, offset, limit); return err })
			return out, size, err
		}
		put(0, false)
		put(0, false)
		put(1, false)
		if _, _, err := read(0, 1); !errors.Is(err, errs.NotFound) {
			t.Errorf("half a chunk: %v", err)
		}
		put(2, true)
		for _, tc := range []struct {
			offset int64
			limit  int
		}{{0, 4 << 20}, {1, 10}, {store.ChunkPart - 3, 7}, {store.ChunkPart, store.ChunkPart}, {int64(len(data)) - 1, 100}, {int64(len(data)), 1}, {1 << 40, 1}} {
			got, size, err := read(tc.offset, tc.limit)
			want := data[min(tc.offset, int64(len(data))):min(tc.offset+int64(tc.limit), int64(len(data)))]
			if err != nil || size != int64(len(data)) || !bytes.Equal(got, want) {
				t.Errorf("%+v: %d bytes of %d, want %d; %v", tc, len(got), size, len(want), err)
			}
		}
		many := []integrity.Digest{d}
		for i := range 1100 {
			many = append(many, sum(fmt.Sprint(i)))
		}
		err := s.Read(ctx, func(tx *store.Tx) error {
			missing, err := tx.MissingChunks(ctx, append(many, many[1]))
			if len(missing) != 1100 {
				t.Errorf("%d chunks are missing, want 1100", len(missing))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

func TestFindByName(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s, ctx := open(t, url), t.Context()
		for _, where := range []string{group + "/providers/Ringwall.Fleet/manifests/abc", group + "/providers/Ringwall.Fleet/manifests/xabc", group + "/providers/Ringwall.Fleet/others/abc"} {
			if _, err := put(t, s, doc(where), resource.When{}); err != nil {
				t.Fatal(err)
			}
		}
		err := s.Read(ctx, func(tx *store.Tx) error {
			got, err := tx.FindByName(ctx, "Ringwall.Fleet/manifests", "abc")
			if err != nil || got.ID.String() != group+"/providers/Ringwall.Fleet/manifests/abc" {
				t.Errorf("%+v, %v", got, err)
			}
			for _, bad := range []string{"", "%", "ab_", "bc", "x/abc"} {
				if _, err := tx.FindByName(ctx, "Ringwall.Fleet/manifests", bad); !errors.Is(err, errs.NotFound) {
					t.Errorf("%q: %v", bad, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

func openEvents(t testing.TB, url string) *store.Events {
	t.Helper()
	open(t, url)
	e, err := store.OpenEvents(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func TestEvents(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		e, ctx := openEvents(t, url), t.Context()
		stream := bytes.Repeat([]byte{7}, 16)
		day := time.Date(2031, 5, 1, 23, 59, 0, 0, time.UTC)
		batch := func(at time.Time, first, n int, outbox string) error {
			var all []fleet.Event
			for i := range n {
				all = append(all, fleet.Event{
					Host: hostID(1), Stream: stream, Number: uint64(first + i), Received: at, At: at, What: "block", Name: "not-listed", SHA256: sum("x"), Path: "/tmp/x", Body: []byte("body"),
				})
			}
			return e.AppendEvents(ctx, at, all, []fleet.Position{{Host: hostID(1), Lane: fleet.LaneBlocks, Stream: stream, UpTo: uint64(first + n - 1)}}, "a", []byte(outbox))
		}
		if _, err := e.Position(ctx, hostID(1), fleet.LaneBlocks); !errors.Is(err, errs.NotFound) {
			t.Errorf("before: %v", err)
		}
		next := day.Add(2 * time.Minute)
		if err := errors.Join(batch(day, 1, 1200, "first"), batch(day, 1000, 300, "second"), batch(day, 5, 3, ""), batch(next, 1300, 1, "third")); err != nil {
			t.Fatal(err)
		}
		if p, err := e.Position(ctx, hostID(1), fleet.LaneBlocks); err != nil || p.UpTo != 1300 || !bytes.Equal(p.Stream, stream) {
			t.Errorf("%+v, %v", p, err)
		}
		got, err := e.QueryEvents(ctx, fleet.EventQuery{Host: hostID(1), SHA256: sum("x"), What: "block", Until: next.Add(time.Hour), Limit: 5000})
		if err != nil || len(got) != 1300 || got[0].Number != 1300 || got[0].Path != "/tmp/x" || string(got[0].Body) != "body" || !got[0].Received.Equal(next) {
			t.Errorf("%d events, %v", len(got), err)
		}
		if got, err := e.QueryEvents(ctx, fleet.EventQuery{What: "notice", Until: next, Limit: 10}); err != nil || len(got) != 0 {
			t.Errorf("of another sort: %d, %v", len(got), err)
		}
		ids, bodies, err := e.Undelivered(ctx, "a", time.Time{}, 10)
		if err != nil || string(bytes.Join(bodies, []byte(","))) != "first,second,third" {
			t.Fatalf("%q, %v", bodies, err)
		}
		if _, others, err := e.Undelivered(ctx, "b", day, 10); err != nil || len(others) != 0 {
			t.Errorf("another's, and new: %q, %v", others, err)
		}
		if _, others, err := e.Undelivered(ctx, "b", next.Add(time.Minute), 2); err != nil || len(others) != 2 {
			t.Errorf("another's, and old: %q, %v", others, err)
		}
		if err := errors.Join(e.Delivered(ctx, ids[0]), e.Delivered(ctx, ids[2]), e.Delivered(ctx, "never")); err != nil {
			t.Fatal(err)
		}
		if _, bodies, err := e.Undelivered(ctx, "a", time.Time{}, 10); err != nil || len(bodies) != 1 || string(bodies[0]) != "second" {
			t.Errorf("%q, %v", bodies, err)
		}
		// A day is forgotten whole.
		if err := e.PruneEvents(ctx, next); err != nil {
			t.Fatal(err)
		}
		if got, err := e.QueryEvents(ctx, fleet.EventQuery{Until: next.Add(time.Hour), Limit: 5000}); err != nil || len(got) != 1 {
			t.Errorf("after the day was forgotten: %d events, %v", len(got), err)
		}
		if dir, ok := strings.CutPrefix(url, "sqlite:"); ok {
			files, _ := filepath.Glob(filepath.Join(dir, "events-*"))
			for _, f := range files {
				if strings.Contains(f, "20310501") {
					t.Errorf("%s is still there", f)
				}
				if st, err := os.Stat(f); err != nil || st.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s: %v, %v", f, st.Mode(), err)
				}
			}
		}
	})
}

func TestInventory(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		e, ctx := openEvents(t, url), t.Context()
		hour := time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)
		ran := func(host int, at time.Time, upTo uint64, paths ...string) int {
			t.Helper()
			var all []fleet.Execution
			for _, p := range paths {
				all = append(all, fleet.Execution{Host: hostID(host), Kind: "exec", SHA256: sum(p), Path: p, Signer: "debian", At: at})
			}
			fresh, err := e.RecordRuns(ctx, all, fleet.Position{Host: hostID(host), Lane: fleet.LaneInventory, Stream: bytes.Repeat([]byte{1}, 16), UpTo: upTo})
			if err != nil {
				t.Fatal(err)
			}
			return fresh
		}
		if n := ran(1, hour, 3, "/bin/a", "/bin/b", "/bin/a"); n != 2 {
			t.Errorf("%d were new, want 2", n)
		}
		if n := ran(2, hour.Add(2*time.Hour), 2, "/bin/a", "/bin/c"); n != 1 {
			t.Errorf("%d were new, want 1", n)
		}
		ran(1, hour.Add(3*time.Hour), 4, "/bin/a")
		got, err := e.Inventory(ctx, []string{hostID(1), hostID(2), hostID(3)}, time.Time{}, 0)
		if err != nil || len(got) != 3 || got[0].Path != "/bin/a" || got[0].Hosts != 2 || !got[0].First.Equal(hour) || !got[0].Last.Equal(hour.Add(3*time.Hour)) || got[0].SHA256 != sum("/bin/a") {
			t.Errorf("%+v, %v", got, err)
		}
		if got, err := e.Inventory(ctx, []string{hostID(1)}, hour.Add(2*time.Hour), 10); err != nil || len(got) != 1 || got[0].Path != "/bin/a" {
			t.Errorf("since: %+v, %v", got, err)
		}
		c, err := e.Coverage(ctx, []string{hostID(1), hostID(2)}, time.Time{}, []string{hostID(2)}, time.Time{})
		if err != nil || c != (fleet.Coverage{Items: 3, Covered: 2, Uses: 4, UsesCovered: 3}) {
			t.Errorf("%+v, %v", c, err)
		}
		if c, err := e.Coverage(ctx, nil, time.Time{}, []string{hostID(2)}, time.Time{}); err != nil || c != (fleet.Coverage{}) {
			t.Errorf("of nothing: %+v, %v", c, err)
		}
		if p, err := e.Position(ctx, hostID(1), fleet.LaneInventory); err != nil || p.UpTo != 4 {
			t.Errorf("%+v, %v", p, err)
		}
		if _, err := e.RecordRuns(ctx, nil, fleet.Position{Host: "x"}); !errors.Is(err, errs.Invalid) {
			t.Errorf("no host: %v", err)
		}
		signals := []fleet.Signal{{Host: hostID(1), Name: "lost", At: hour}, {Host: hostID(2), Name: "gap", Text: "3", At: hour.Add(time.Second)}}
		if err := e.RecordSignals(ctx, signals); err != nil {
			t.Fatal(err)
		}
		if got, err := e.SignalsSince(ctx, hour.Add(time.Millisecond)); err != nil || len(got) != 1 || got[0] != signals[1] {
			t.Errorf("%+v, %v", got, err)
		}
	})
}
