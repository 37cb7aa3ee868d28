package control_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"ringwall/internal/resource"
	"ringwall/internal/store"
)

// A secret is written and never read: not by its writer, in a list, in the
// feed, or in the audit log. A change that leaves it out keeps it.
func TestSecrets(t *testing.T) {
	l := newLab(t)
	stored := func() string {
		var out string
		err := l.store.Read(t.Context(), func(tx *store.Tx) error {
			d, err := tx.Get(t.Context(), id(thing+"a"))
			out = string(d.Properties)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for i, tc := range []struct{ put, want string }{
		{`{"password":"s3cret","size":1}`, `"s3cret"`},
		{`{"size":2}`, `"s3cret"`},
		{``, `"s3cret"`},
		{`null`, `"s3cret"`},
		{`{"Password":"s3cret2","size":3}`, `"s3cret2"`},
		{`{"password":"","size":4}`, `""`},
		{`{"PASSWORD":"s3cret3"}`, `"s3cret3"`},
	} {
		d, err := l.door.Put(t.Context(), root(), resource.Document{ID: id(thing + "a"), Properties: json.RawMessage(tc.put)}, resource.When{}, false)
		if err != nil || strings.Contains(string(d.Properties), "s3cret") {
			t.Errorf("%d: %+v, %v", i, d, err)
		}
		if got := stored(); !strings.Contains(got, tc.want) {
			t.Errorf("%s: %s is stored", tc.put, got)
		}
	}
	d, err := l.door.Get(t.Context(), root(), id(thing+"a"))
	if err != nil || strings.Contains(string(d.Properties), "s3cret") {
		t.Errorf("%+v, %v", d, err)
	}
	docs, _, err := l.door.List(t.Context(), root(), resource.Query{Limit: 100})
	if b, _ := json.Marshal(docs); err != nil || strings.Contains(string(b), "s3cret") || !strings.Contains(string(b), "things/a") {
		t.Errorf("%s, %v", b, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	enough, seen := errors.New("enough"), 0
	err = l.door.Watch(ctx, root(), id(thing+"a"), 0, func(c resource.Change) error {
		if strings.Contains(string(c.Document.Properties), "s3cret") {
			t.Errorf("the feed has %s", c.Document.Properties)
		}
		if seen++; seen == 7 {
			return enough
		}
		return nil
	}, func(uint64) error { return nil })
	if !errors.Is(err, enough) {
		t.Error(err)
	}
	if b, _ := json.Marshal(l.records()); strings.Contains(string(b), "s3cret") {
		t.Error("the audit log has it")
	}
}
