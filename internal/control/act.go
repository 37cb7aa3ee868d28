package control

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Action is something other than writing that can be done to a document, such
// as approving it: POST ID/NAME. It takes the permission TYPE/NAME/action.
type Action struct {
	// Do reads the body and changes the document, which the door stores if
	// anything differs, in the same transaction. The answer is for the client.
	// It may run several times, and does nothing but use tx.
	Do func(ctx context.Context, tx Tx, by Actor, d *resource.Document, body json.RawMessage) (answer any, err error)
	// Done is called once after it was stored; nil: nothing to do. What it does
	// must be found to do again by whoever comes later, should it be lost.
	Done func(ctx context.Context, d *resource.Document)
}

// Invoke does a registered action to a document: authorise, one transaction, an
// audit record in it. What the action made of the document is for it to check,
// beyond the envelope.
func (d *Door) Invoke(ctx context.Context, by Actor, id resource.ID, name string, body json.RawMessage) (any, error) {
	kind, ok := d.kinds[id.Type()]
	if !ok {
		return nil, fmt.Errorf("%s %s: there is no resource type %q: %w", name, id, id.Type(), errs.Invalid)
	}
	action, ok := kind.Actions[name]
	if !ok {
		return nil, fmt.Errorf("%s has no action %.40q (it has %s): %w", kind.Type, name, strings.Join(slices.Sorted(maps.Keys(kind.Actions)), ", "), errs.NotFound)
	}
	var answer any
	var stored *resource.Document
	err := d.change(ctx, by, kind, name+"/action", id, false, func(tx Tx, r *audit.Record) error {
		doc, err := tx.Get(ctx, id)
		if err != nil {
			return err
		}
		old := *doc
		if answer, err = action.Do(ctx, tx, by, doc, body); err != nil {
			return err
		}
		stored = doc
		if string(doc.Properties) != string(old.Properties) {
			if err := doc.Check(); err != nil {
				return err
			}
			if stored, err = tx.Put(ctx, *doc, by.Name, resource.When{Revision: old.Revision}); err != nil {
				return err
			}
		}
		r.Detail, err = kind.detail(&old, stored)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", name, id, err)
	}
	if action.Done != nil {
		action.Done(ctx, stored)
	}
	return answer, nil
}

// Act is a change that is no document of the tree, or several at once, such as
// the release of a quarantined host: authorised as the action "KIND/VERB" on the
// target, made and recorded in one transaction like every other. fn may add to
// the record's detail; what else it needs of the store it finds by asserting an
// interface of its own on the transaction. It is for the server's own parts,
// which have checked what they write.
func (d *Door) Act(ctx context.Context, by Actor, kind, verb string, target resource.ID, fn func(Tx, *audit.Record) error) error {
	if err := d.change(ctx, by, &Kind{Type: kind}, verb, target, false, fn); err != nil {
		return fmt.Errorf("%s %s: %w", verb, target, err)
	}
	return nil
}

// Engine is a part of the server that acts by itself. What it may do is said in
// code and nowhere else: no document grants it more or takes it away, and
// nobody can authenticate as one. An action that ends with a star stands for all
// that begin so.
func Engine(name string, actions ...string) Actor {
	return Actor{ID: "ringwall-" + name, Name: "ringwall " + name, engine: append([]string{}, actions...)}
}

func (a *Actor) engineMay(action string) bool {
	return slices.ContainsFunc(a.engine, func(may string) bool {
		prefix, all := strings.CutSuffix(may, "*")
		if all {
			return len(action) >= len(prefix) && strings.EqualFold(action[:len(prefix)], prefix)
		}
		return strings.EqualFold(may, action)
	})
}

// View shows one state of the tree to a part of the server, which cannot change
// it there. Whoever is no Engine is refused.
func (d *Door) View(ctx context.Context, by Actor, fn func(Tx) error) error {
	if by.engine == nil {
		return fmt.Errorf("view the tree as %s: %w", by.Name, errs.Denied)
	}
	return d.store.Read(ctx, fn)
}
