package store_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

// openOld is a database of an earlier schema with what testdata/schema1.json
// holds: rows that the first version wrote.
func openOld(t *testing.T, url string, migration int) {
	t.Helper()
	raw, err := os.ReadFile("testdata/schema1.json")
	if err != nil {
		t.Fatal(err)
	}
	var tables []struct {
		Table   string   `json:"table"`
		Columns []string `json:"columns"`
		Rows    [][]any  `json:"rows"`
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&tables); err != nil {
		t.Fatal(err)
	}
	err = store.OpenAt(t.Context(), url, migration, func(insert func(string, []string, []any) error) error {
		for _, table := range tables {
			for _, row := range table.Rows {
				for i, v := range row {
					switch v := v.(type) {
					case json.Number:
						n, err := v.Int64()
						if err != nil {
							return err
						}
						row[i] = n
					case string:
						if digits, ok := strings.CutPrefix(v, "hex:"); ok {
							if row[i], err = hex.DecodeString(digits); err != nil {
								return err
							}
						}
					}
				}
				if err := insert(table.Table, table.Columns, row); err != nil {
					return fmt.Errorf("%s: %w", table.Table, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A database that the first version wrote is read, and written on, by this one,
// from whichever schema in between it comes.
func TestUpgrade(t *testing.T) {
	numbers, err := store.Migrations()
	if err != nil || len(numbers) < 2 {
		t.Fatalf("%v, %v", numbers, err)
	}
	engines(t, func(t *testing.T, url string) {
		if !strings.HasPrefix(url, "sqlite:") {
			openOld(t, url, 1)
			upgraded(t, url)
			return
		}
		for _, n := range numbers {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				url := "sqlite:" + t.TempDir()
				openOld(t, url, n)
				upgraded(t, url)
			})
		}
	})
}

func upgraded(t *testing.T, url string) {
	t.Helper()
	s := open(t, url)
	ctx := t.Context()
	if _, err := put(t, s, doc(vault+"after"), resource.When{Absent: true}); err != nil {
		t.Fatal(err)
	}
	err := s.Write(ctx, func(tx *store.Tx) error {
		return tx.AppendAudit(ctx, &audit.Record{Actor: "bob", Action: "x/write", Outcome: audit.Done})
	})
	if err != nil {
		t.Fatal(err)
	}
	err = s.Read(ctx, func(tx *store.Tx) error {
		d, err := tx.Get(ctx, id(vault+"KV1"))
		if err != nil || d.Revision != 4 || string(d.Properties) != `{"a":2}` || d.System.CreatedBy != "änä" || d.ID.String() != vault+"Kv1" {
			t.Errorf("%+v, %v", d, err)
		}
		if d, err := tx.Get(ctx, id(group)); err != nil || d.Tags["team"] != "wéb" {
			t.Errorf("%+v, %v", d, err)
		}
		if _, err := tx.Get(ctx, id(vault+"kv2")); !errors.Is(err, errs.NotFound) {
			t.Errorf("what was deleted: %v", err)
		}
		cs, err := tx.Changes(ctx, 0, 100)
		if err != nil || len(cs) != 7 || cs[6].Revision != 7 || !cs[5].Deleted || cs[0].Deleted {
			t.Errorf("%d changes, %v", len(cs), err)
		}
		return verifyChain(ctx, tx, 8)
	})
	if err != nil {
		t.Error(err)
	}
}

// After a restore no revision comes twice, and a watcher from before is told to
// begin anew, wherever it was.
func TestRestored(t *testing.T) {
	dir := t.TempDir()
	s := open(t, "sqlite:"+dir)
	ctx := t.Context()
	for range 3 {
		if _, err := put(t, s, doc(vault+"kv1"), resource.When{}); err != nil {
			t.Fatal(err)
		}
	}
	copied := filepath.Join(t.TempDir(), "control.db")
	if err := s.Backup(ctx, copied); err != nil {
		t.Fatal(err)
	}
	old, err := put(t, s, doc(vault+"kv1"), resource.When{}) // lost by the restore
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, "sqlite:"+filepath.Dir(copied))
	if err := s.CheckFile(ctx); err != nil {
		t.Error(err)
	}
	if err := s.Write(ctx, func(tx *store.Tx) error { return tx.Restored(ctx) }); err != nil {
		t.Fatal(err)
	}
	if err := s.Read(ctx, func(tx *store.Tx) error { return tx.Restored(ctx) }); err == nil {
		t.Error("a reading transaction wrote")
	}
	if _, err := put(t, s, doc(vault+"kv1"), resource.When{Revision: old.Revision}); !errors.Is(err, errs.Conflict) {
		t.Errorf("overwritten with the ETag of what was lost: %v", err)
	}
	if _, err := put(t, s, doc(vault+"kv1"), resource.When{Revision: 3}); err != nil {
		t.Error(err)
	}
	for _, after := range []uint64{3, 4, 5, 1000} {
		err := s.Read(ctx, func(tx *store.Tx) error { _, err := tx.Changes(ctx, after, 10); return err })
		if !errors.Is(err, errs.NotFound) {
			t.Errorf("a watcher at %d: %v", after, err)
		}
	}
}
