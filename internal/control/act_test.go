package control_test

import (
	"errors"
	"testing"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
)

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
