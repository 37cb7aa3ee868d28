package control_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

const lamp = group + "/providers/Ringwall.Test/lamps/one"

// newLamps has a kind whose documents can be switched.
func newLamps(t *testing.T, done func(*resource.Document)) *lab {
	t.Helper()
	s := newStore(t)
	d, err := control.New(shelf{s}, control.Kind{
		Type: "Ringwall.Test/lamps",
		Actions: map[string]control.Action{"switch": {
			Do: func(_ context.Context, _ control.Tx, by control.Actor, d *resource.Document, body json.RawMessage) (any, error) {
				var q struct{ On *bool }
				if err := json.Unmarshal(body, &q); err != nil || q.On == nil {
					return nil, fmt.Errorf("say on: %w", errs.Invalid)
				}
				d.Properties = json.RawMessage(fmt.Sprintf(`{"on":%v,"by":%q}`, *q.On, by.Name))
				return map[string]bool{"on": *q.On}, nil
			},
			Done: func(_ context.Context, d *resource.Document) { done(d) },
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, door: d, store: s}
	l.must(root(), sub, `{}`)
	l.must(root(), group, `{}`)
	l.must(root(), lamp, `{"on":false}`)
	return l
}

func TestInvoke(t *testing.T) {
	var done []string
	l := newLamps(t, func(d *resource.Document) { done = append(done, string(d.Properties)) })
	ctx := t.Context()
	before, err := l.door.Get(ctx, root(), id(lamp))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := l.door.Invoke(ctx, root(), id(lamp), "switch", []byte(`{"on":true}`))
	if err != nil || fmt.Sprint(answer) != "map[on:true]" {
		t.Fatalf("answer %v, error %v", answer, err)
	}
	after, err := l.door.Get(ctx, root(), id(lamp))
	if err != nil || string(after.Properties) != `{"on":true,"by":"admin"}` || after.Revision <= before.Revision {
		t.Errorf("document %s of revision %d, error %v", after.Properties, after.Revision, err)
	}
	if len(done) != 1 {
		t.Errorf("done %q, want once", done)
	}
	nobody := control.Actor{ID: "nobody", Name: "nobody"}
	for _, c := range []struct {
		name, action, body string
		by                 control.Actor
		want               error
	}{
		{"no such action", "burn", `{}`, root(), errs.NotFound},
		{"a body that is none", "switch", `{}`, root(), errs.Invalid},
		{"nobody may", "switch", `{"on":false}`, nobody, errs.Denied},
		{"an engine that may something else", "switch", `{"on":false}`, control.Engine("test", "Ringwall.Test/lamps/write"), errs.Denied},
		{"an engine that may nothing", "switch", `{"on":false}`, control.Engine("test"), errs.Denied},
		{"an engine that may", "switch", `{"on":false}`, control.Engine("test", "Ringwall.Test/lamps/*"), nil},
	} {
		if _, err := l.door.Invoke(ctx, c.by, id(lamp), c.action, []byte(c.body)); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: error %v, want %v", c.name, err, c.want)
		}
	}
	records, err := l.door.Audit(ctx, root(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	outcomes := map[audit.Outcome]int{}
	for _, r := range records {
		if strings.HasSuffix(r.Action, "lamps/switch/action") {
			outcomes[r.Outcome]++
		}
	}
	if outcomes[audit.Done] != 2 || outcomes[audit.Refused] != 3 || outcomes[audit.Failed] != 1 {
		t.Errorf("audit %v, want 2 done, 3 refused, 1 failed", outcomes)
	}
}

// TestAct_several: several documents change together or not at all.
func TestAct_several(t *testing.T) {
	l := newLamps(t, func(*resource.Document) {})
	ctx, two := t.Context(), strings.Replace(lamp, "one", "two", 1)
	both := func(then error) error {
		return l.door.Act(ctx, root(), "Ringwall.Test/lamps", "move/action", id(lamp), func(tx control.Tx, r *audit.Record) error {
			r.Detail = `{"to":"two"}`
			if _, err := tx.Delete(ctx, id(lamp), "admin", resource.When{}); err != nil {
				return err
			}
			_, err := tx.Put(ctx, resource.Document{ID: id(two), Type: "Ringwall.Test/lamps", Properties: []byte(`{}`)}, "admin", resource.When{Absent: true})
			return errors.Join(err, then)
		})
	}
	if err := both(errs.Conflict); !errors.Is(err, errs.Conflict) {
		t.Fatalf("error %v, want conflict", err)
	}
	if _, err := l.door.Get(ctx, root(), id(lamp)); err != nil {
		t.Errorf("half of it happened: %v", err)
	}
	if err := both(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := l.door.Get(ctx, root(), id(two)); err != nil {
		t.Error(err)
	}
}

// What is no document goes through the same door: roles, one transaction, a record.
func TestAct(t *testing.T) {
	l := newLab(t)
	ran := 0
	act := func(by control.Actor, fail error) error {
		return l.door.Act(t.Context(), by, "Ringwall.Test/things", "shake/action", id(thing+"one"), func(_ control.Tx, r *audit.Record) error {
			ran++
			r.Detail = `{"hard":true}`
			return fail
		})
	}
	if err := act(control.Actor{ID: "bob", Name: "bob"}, nil); !errors.Is(err, errs.Denied) || ran != 0 {
		t.Errorf("without a role: %v, ran %d times", err, ran)
	}
	before := len(l.records())
	if err := act(root(), errs.Conflict); !errors.Is(err, errs.Conflict) {
		t.Errorf("failed: %v", err)
	}
	if err := act(root(), nil); err != nil {
		t.Fatal(err)
	}
	got := l.records()[before:]
	if len(got) != 2 || got[0].Outcome != audit.Failed || got[1].Outcome != audit.Done ||
		got[1].Action != "Ringwall.Test/things/shake/action" || got[1].Detail != `{"hard":true}` {
		t.Errorf("%+v", got)
	}
}
