package store_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
	"ringwall/internal/store"
	"ringwall/internal/testkit"
)

const (
	sub   = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group = sub + "/resourceGroups/web"
	vault = group + "/providers/Microsoft.KeyVault/vaults/"
)

func id(s string) resource.ID {
	out, err := resource.ParseID(s)
	if err != nil {
		panic(err)
	}
	return out
}

func doc(s string) resource.Document {
	d := resource.Document{ID: id(s), Properties: json.RawMessage(`{"a":1}`)}
	d.Type = d.ID.Type()
	return d
}

func open(t testing.TB, url string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// engines runs a test on both.
func engines(t *testing.T, test func(t *testing.T, url string)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) { test(t, "sqlite:"+t.TempDir()) })
	t.Run("postgres", func(t *testing.T) { test(t, postgres.Database(t)) })
}

// postgres is of all tests here.
var postgres testkit.Shared

func TestMain(m *testing.M) {
	code := m.Run()
	postgres.Close()
	os.Exit(code)
}

func put(t testing.TB, s *store.Store, d resource.Document, when resource.When) (*resource.Document, error) {
	t.Helper()
	var out *resource.Document
	err := s.Write(t.Context(), func(tx *store.Tx) (err error) {
		out, err = tx.Put(t.Context(), d, "ana", when)
		return err
	})
	return out, err
}

func TestDocuments(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		d := doc(vault + "Kv1")
		d.Tags, d.Location = map[string]string{"team": "ünï"}, "here"
		made, err := put(t, s, d, resource.When{Absent: true})
		if err != nil || made.Revision != 1 || made.System.CreatedBy != "ana" {
			t.Fatalf("%+v, %v", made, err)
		}
		for name, tc := range map[string]resource.When{"exists": {Absent: true}, "another revision": {Revision: 9}} {
			if _, err := put(t, s, d, tc); !errors.Is(err, errs.Conflict) {
				t.Errorf("%s: %v", name, err)
			}
		}
		// In another case it is the same document, and keeps its spelling.
		again := doc(strings.ToUpper(vault + "Kv1"))
		again.Properties = json.RawMessage(`{"b":[2]}`)
		if _, err := put(t, s, again, resource.When{Revision: 1}); err != nil {
			t.Fatal(err)
		}
		err = s.Read(ctx, func(tx *store.Tx) error {
			got, err := tx.Get(ctx, id(strings.ToLower(vault+"kv1")))
			if err != nil {
				return err
			}
			if got.ID.String() != vault+"Kv1" || got.Revision != 2 || string(got.Properties) != `{"b":[2]}` || got.Tags != nil ||
				!got.System.CreatedAt.Equal(made.System.CreatedAt) || got.System.ModifiedAt.Before(made.System.ModifiedAt) {
				t.Errorf("%+v", got)
			}
			if _, err := tx.Get(ctx, id(vault+"other")); !errors.Is(err, errs.NotFound) {
				t.Errorf("no such document: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Read(ctx, func(tx *store.Tx) error { _, err := tx.Put(ctx, d, "x", resource.When{}); return err }); err == nil {
			t.Error("a reading transaction wrote")
		}
		remove := func(what string, when resource.When) error {
			return s.Write(ctx, func(tx *store.Tx) error { _, err := tx.Delete(ctx, id(what), "bob", when); return err })
		}
		if _, err := put(t, s, doc(vault+"Kv1/secrets/s"), resource.When{}); err != nil {
			t.Fatal(err)
		}
		if err := remove(vault+"kv1", resource.When{}); !errors.Is(err, errs.Conflict) {
			t.Errorf("deleted although something is below it: %v", err)
		}
		if err := remove(vault+"kv1/secrets/s", resource.When{Revision: 1}); !errors.Is(err, errs.Conflict) {
			t.Errorf("deleted another revision: %v", err)
		}
		if err := errors.Join(remove(vault+"kv1/secrets/s", resource.When{}), remove(vault+"kv1", resource.When{Revision: 2})); err != nil {
			t.Error(err)
		}
		if err := remove(vault+"kv1", resource.When{}); !errors.Is(err, errs.NotFound) {
			t.Errorf("deleted twice: %v", err)
		}
	})
}

func TestList(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		var want []string
		for i := range 25 {
			d := doc(fmt.Sprintf("%skv_%02d", vault, i))
			want = append(want, d.ID.Key())
			if _, err := put(t, s, d, resource.When{}); err != nil {
				t.Fatal(err)
			}
		}
		for _, other := range []string{group, sub, sub + "/resourceGroups/web2", vault + "kv_03/secrets/s", sub + "/resourceGroups/web-2/providers/Microsoft.KeyVault/vaults/x"} {
			if _, err := put(t, s, doc(other), resource.When{}); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		q := resource.Query{Below: id(group), Type: "Microsoft.KeyVault/Vaults", Limit: 10}
		for {
			var page []resource.Document
			if err := s.Read(ctx, func(tx *store.Tx) (err error) { page, err = tx.List(ctx, q); return err }); err != nil {
				t.Fatal(err)
			}
			for i := range page {
				got = append(got, page[i].ID.Key())
			}
			if len(page) < q.Limit {
				break
			}
			q.After = got[len(got)-1]
		}
		if !slices.Equal(got, want) {
			t.Errorf("%v\nwant %v", got, want)
		}
		err := s.Read(ctx, func(tx *store.Tx) error {
			all, err := tx.List(ctx, resource.Query{Below: id(group), Limit: 1000})
			if err == nil && len(all) != 27 { // the group, its vaults, a secret
				t.Errorf("%d documents below the group", len(all))
			}
			if _, err := tx.List(ctx, resource.Query{Limit: 1001}); !errors.Is(err, errs.Invalid) {
				t.Errorf("a page too long: %v", err)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// Many writers: no revision is lost or skipped, the chain holds, and a counter
// in a document is exact.
func TestWriters(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		stores := []*store.Store{open(t, url), open(t, url)} // two replicas
		ctx := t.Context()
		const writers, each = 8, 25
		count := doc(vault + "counter")
		count.Properties = json.RawMessage(`0`)
		if _, err := put(t, stores[0], count, resource.When{}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					err := stores[w%2].Write(ctx, func(tx *store.Tx) error {
						d, err := tx.Get(ctx, count.ID)
						if err != nil {
							return err
						}
						var n int
						if err := json.Unmarshal(d.Properties, &n); err != nil {
							return err
						}
						d.Properties = json.RawMessage(fmt.Sprint(n + 1))
						if _, err := tx.Put(ctx, *d, fmt.Sprint("writer ", w), resource.When{Revision: d.Revision}); err != nil {
							return err
						}
						if i%5 == 4 {
							return errGaveUp // leaves no gap
						}
						return tx.AppendAudit(ctx, &audit.Record{Actor: fmt.Sprint(w), Action: "x/write", Target: d.ID.String(), Outcome: audit.Done})
					})
					if i%5 == 4 && !errors.Is(err, errGaveUp) || i%5 != 4 && err != nil {
						t.Errorf("writer %d: %v", w, err)
						return
					}
				}
			})
		}
		wg.Wait()
		const done = writers * each * 4 / 5
		err := stores[1].Read(ctx, func(tx *store.Tx) error {
			d, err := tx.Get(ctx, count.ID)
			if err != nil {
				return err
			}
			if string(d.Properties) != fmt.Sprint(done) || d.Revision != done+1 {
				t.Errorf("counter %s at revision %d, want %d", d.Properties, d.Revision, done)
			}
			changes, err := tx.Changes(ctx, 0, 1000)
			if err != nil {
				return err
			}
			for i, c := range changes {
				if c.Revision != uint64(i+1) {
					t.Fatalf("change %d has revision %d", i, c.Revision)
				}
			}
			if len(changes) != done+1 {
				t.Errorf("%d changes", len(changes))
			}
			return verifyChain(ctx, tx, done)
		})
		if err != nil {
			t.Error(err)
		}
	})
}

var errGaveUp = errors.New("gave up")

func verifyChain(ctx context.Context, tx *store.Tx, want int) error {
	rs, err := tx.Audit(ctx, 0, 1000)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for i := range rs {
		line, err := json.Marshal(&rs[i])
		if err != nil {
			return err
		}
		b.Write(append(line, '\n'))
	}
	end, err := tx.AuditEnd(ctx)
	if err != nil {
		return err
	}
	rep, err := audit.Verify(&b, audit.Checkpoint{}, end)
	if err == nil && rep.Records != want {
		err = fmt.Errorf("%d audit records, want %d", rep.Records, want)
	}
	return err
}

func TestChanges(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		for i := range 4 {
			d := doc(vault + "kv1")
			d.Properties = json.RawMessage(fmt.Sprint(i))
			if _, err := put(t, s, d, resource.When{}); err != nil {
				t.Fatal(err)
			}
		}
		err := s.Write(ctx, func(tx *store.Tx) error {
			_, err := tx.Delete(ctx, id(vault+"kv1"), "bob", resource.When{})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		err = s.Write(ctx, func(tx *store.Tx) error {
			cs, err := tx.Changes(ctx, 2, 2)
			if err != nil || len(cs) != 2 || cs[0].Revision != 3 || string(cs[0].Document.Properties) != "2" || cs[0].Deleted {
				t.Errorf("%+v, %v", cs, err)
			}
			cs, err = tx.Changes(ctx, 4, 10)
			if err != nil || len(cs) != 1 || !cs[0].Deleted || cs[0].Document.System.ModifiedBy != "bob" {
				t.Errorf("%+v, %v", cs, err)
			}
			if cs, err := tx.Changes(ctx, 5, 10); err != nil || len(cs) != 0 {
				t.Errorf("%+v, %v", cs, err)
			}
			return tx.Compact(ctx, 3)
		})
		if err != nil {
			t.Fatal(err)
		}
		err = s.Read(ctx, func(tx *store.Tx) error {
			if _, err := tx.Changes(ctx, 2, 10); !errors.Is(err, errs.NotFound) {
				t.Errorf("changes that were forgotten: %v", err)
			}
			cs, err := tx.Changes(ctx, 3, 10)
			if len(cs) != 2 {
				t.Errorf("%d changes are left", len(cs))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestOpen_again(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		if _, err := put(t, s, doc(vault+"kv1"), resource.When{}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, url)
		err := s.Read(t.Context(), func(tx *store.Tx) error { _, err := tx.Get(t.Context(), id(vault+"kv1")); return err })
		if err != nil {
			t.Error(err)
		}
		if err := s.MakeLater(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Open(t.Context(), url); !errors.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "schema 99") {
			t.Errorf("a database of a later version: %v", err)
		}
	})
}

func TestOpen_refuses(t *testing.T) {
	for url, want := range map[string]error{"": errs.Invalid, "mysql://x": errs.Invalid, "sqlite:": errs.Invalid} {
		if _, err := store.Open(t.Context(), url); !errors.Is(err, want) {
			t.Errorf("%q: %v", url, err)
		}
	}
	if _, err := store.Open(t.Context(), "postgres://ana:s3cret@127.0.0.1:1/x"); err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("no server there: %v", err)
	}
	for magic, want := range map[int64]string{0x6969: "NFS", 0xff534d42: "SMB", 0xef53: ""} {
		if got := store.NetworkFS(magic); got != want {
			t.Errorf("%x: %q", magic, got)
		}
	}
}

func TestBackup(t *testing.T) {
	dir := t.TempDir()
	s := open(t, "sqlite:"+dir)
	if _, err := put(t, s, doc(vault+"kv1"), resource.When{}); err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "control.db")
	if err := s.Backup(t.Context(), copied); err != nil {
		t.Fatal(err)
	}
	if err := s.Backup(t.Context(), copied); !errors.Is(err, errs.Conflict) {
		t.Errorf("onto a file that exists: %v", err)
	}
	restored := open(t, "sqlite:"+filepath.Dir(copied))
	err := restored.Read(t.Context(), func(tx *store.Tx) error { _, err := tx.Get(t.Context(), id(vault+"kv1")); return err })
	if err != nil {
		t.Error(err)
	}
}

func BenchmarkPut(b *testing.B) {
	s := open(b, "sqlite:"+b.TempDir())
	d := doc(vault + "kv1")
	for b.Loop() {
		err := s.Write(b.Context(), func(tx *store.Tx) error {
			if _, err := tx.Put(b.Context(), d, "ana", resource.When{}); err != nil {
				return err
			}
			return tx.AppendAudit(b.Context(), &audit.Record{Actor: "ana", Action: "x/write", Outcome: audit.Done})
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}
