// Package control is what the server does: the one door through which the
// resource tree is read and changed.
//
// A change is: authorise, validate, one transaction, an audit record in it. No
// record, no change. A change that is refused or fails is recorded too. Everything is decided on
// the state that the transaction sees, so that nobody uses a role that was
// taken away meanwhile.
package control

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Actor is who asks, authenticated by whoever hands it in.
type Actor struct {
	ID     string   // object id, which role assignments name
	Name   string   // for people and the audit log
	Groups []string // object ids of all groups, nested ones included

	engine []string // actions of a part of the server, see Engine; nil for everybody else
}

// Tx is a transaction of the store.
type Tx interface {
	Get(ctx context.Context, id resource.ID) (*resource.Document, error)
	Put(ctx context.Context, d resource.Document, by string, when resource.When) (*resource.Document, error)
	Delete(ctx context.Context, id resource.ID, by string, when resource.When) (*resource.Document, error)
	List(ctx context.Context, q resource.Query) ([]resource.Document, error)
	Changes(ctx context.Context, after uint64, limit int) ([]resource.Change, error)
	Revision(ctx context.Context) (uint64, error)
	AppendAudit(ctx context.Context, r *audit.Record) error
	Audit(ctx context.Context, after uint64, limit int) ([]audit.Record, error)
}

// Store keeps the tree. Write runs fn alone with the newest state and may run
// it again; Read shows one state.
type Store interface {
	Write(ctx context.Context, fn func(Tx) error) error
	Read(ctx context.Context, fn func(Tx) error) error
}

// Kind is a type of resource. Whoever manages a type registers it.
type Kind struct {
	Type string // such as "Ringwall.Integrity/policies"
	// Check validates a new or changed document beyond its envelope; old is nil
	// for a new one. The error is errs.Invalid, errs.Conflict or errs.Denied.
	Check func(ctx context.Context, tx Tx, old, d *resource.Document) error
	// Keep refuses the deletion of a document that is needed as it is; the error
	// is errs.Conflict. nil: every one may go.
	Keep func(d *resource.Document) error
	// Actions are what else can be done to such a document, by name.
	Actions map[string]Action
	// Needs are actions that whoever writes or deletes such a document must also
	// be allowed at the root.
	Needs []string
	// Secret are top-level properties that are written and never read: no answer,
	// feed or audit record holds them. A change that leaves one out keeps it.
	Secret []string
	// About and Schema say what it is for, in a sentence, and what properties it
	// has, as JSON Schema (draft 2020-12): for the OpenAPI document.
	About  string
	Schema json.RawMessage
}

// Door is safe for use by several goroutines.
type Door struct {
	store Store
	kinds map[string]*Kind
	roles *roleCache
	wake  *wake
	peers map[string]Peer // by kind; set before the door is used
}

// New returns a door to a store, with the kinds that the door needs itself and
// those given.
func New(s Store, kinds ...Kind) (*Door, error) {
	d := &Door{store: s, kinds: map[string]*Kind{}, roles: &roleCache{}, wake: newWake(), peers: map[string]Peer{PeerService: service}}
	for _, k := range append(ownKinds(), kinds...) {
		key := strings.ToLower(k.Type)
		if _, twice := d.kinds[key]; twice || key == "" {
			return nil, fmt.Errorf("resource type %q is registered twice or has no name: %w", k.Type, errs.Invalid)
		}
		d.kinds[key] = &k
	}
	return d, nil
}

// Kinds lists the registered types, by name.
func (d *Door) Kinds() []Kind {
	var out []Kind
	for _, name := range slices.Sorted(maps.Keys(d.kinds)) {
		out = append(out, *d.kinds[name])
	}
	return out
}

// Put creates or changes a document. With dryRun everything is checked and
// nothing is stored or recorded; the answer is what would be stored.
func (d *Door) Put(ctx context.Context, by Actor, doc resource.Document, when resource.When, dryRun bool) (*resource.Document, error) {
	kind, ok := d.kinds[doc.ID.Type()]
	if !ok {
		return nil, fmt.Errorf("put %s: there is no resource type %q: %w", doc.ID, doc.ID.Type(), errs.Invalid)
	}
	doc.Type = kind.Type
	var out *resource.Document
	err := d.change(ctx, by, kind, "write", doc.ID, dryRun, func(tx Tx, r *audit.Record) error {
		old, err := tx.Get(ctx, doc.ID)
		if errors.Is(err, errs.NotFound) {
			old, err = nil, parentExists(ctx, tx, doc.ID)
		}
		if err != nil {
			return err
		}
		doc := doc
		if err := errors.Join(doc.Check(), kind.keepSecrets(old, &doc)); err != nil {
			return err
		}
		if kind.Check != nil {
			if err := kind.Check(ctx, tx, old, &doc); err != nil {
				return err
			}
		}
		if r.Detail, err = kind.detail(old, &doc); err != nil {
			return err
		}
		out, err = tx.Put(ctx, doc, by.Name, when)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("put %s: %w", doc.ID, err)
	}
	return d.shown(out), nil
}

// parentExists refuses a document that would hang in the air.
func parentExists(ctx context.Context, tx Tx, id resource.ID) error {
	p := id.Parent()
	if p.Key() == "" {
		return nil
	}
	if _, err := tx.Get(ctx, p); errors.Is(err, errs.NotFound) {
		return fmt.Errorf("%s does not exist, make it first: %w", p, errs.NotFound)
	} else if err != nil {
		return err
	}
	return nil
}

// detail is what a record says of a change: the document before and after.
func (k *Kind) detail(old, d *resource.Document) (string, error) {
	show := func(d *resource.Document) any {
		if d == nil {
			return nil
		}
		return map[string]any{"location": d.Location, "tags": d.Tags, "properties": k.withoutSecrets(d.Properties)}
	}
	b, err := json.Marshal(map[string]any{"before": show(old), "after": show(d)})
	if len(b) > maxDetail {
		b, err = json.Marshal(map[string]any{"size": len(b), "sha256": fmt.Sprintf("%x", sha256.Sum256(b))})
	}
	return string(b), err
}

// maxDetail is the longest detail in bytes; of a longer one its digest is kept,
// the feed has the rest.
const maxDetail = 256 << 10

func (k *Kind) isSecret(property string) bool {
	return slices.ContainsFunc(k.Secret, func(s string) bool { return strings.EqualFold(s, property) })
}

// withoutSecrets is what audit records say: that a secret is there, and not which.
func (k *Kind) withoutSecrets(properties json.RawMessage) any {
	if len(k.Secret) == 0 || len(properties) == 0 {
		return properties
	}
	var m map[string]json.RawMessage
	if json.Unmarshal(properties, &m) != nil {
		return "not shown"
	}
	for key := range m {
		if k.isSecret(key) {
			m[key] = json.RawMessage(`"not shown"`)
		}
	}
	return m
}

// keepSecrets takes over what a change leaves out: who reads a document to
// change it never saw them.
func (k *Kind) keepSecrets(old, d *resource.Document) error {
	if len(k.Secret) == 0 || old == nil {
		return nil
	}
	var have, kept map[string]json.RawMessage
	if json.Unmarshal(old.Properties, &kept) != nil {
		return nil // it held none
	}
	if len(d.Properties) > 0 && json.Unmarshal(d.Properties, &have) != nil {
		return nil // it is no object: its kind's Check may say so
	}
	for key := range have {
		if k.isSecret(key) {
			return nil
		}
	}
	maps.DeleteFunc(kept, func(key string, _ json.RawMessage) bool { return !k.isSecret(key) })
	if len(kept) == 0 {
		return nil
	}
	maps.Copy(kept, have)
	b, err := json.Marshal(kept)
	d.Properties = b
	return err
}

// shown is a document as it is given out. An object that cannot be read is not
// shown at all.
func (d *Door) shown(doc *resource.Document) *resource.Document {
	k := d.kinds[doc.ID.Type()]
	if k == nil || len(k.Secret) == 0 || !strings.HasPrefix(strings.TrimSpace(string(doc.Properties)), "{") {
		return doc
	}
	out := *doc
	var m map[string]json.RawMessage
	if json.Unmarshal(doc.Properties, &m) != nil {
		out.Properties = nil
		return &out
	}
	for key := range m {
		if k.isSecret(key) {
			delete(m, key)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		b = nil
	}
	out.Properties = b
	return &out
}

// Delete removes a document.
func (d *Door) Delete(ctx context.Context, by Actor, id resource.ID, when resource.When, dryRun bool) error {
	kind, ok := d.kinds[id.Type()]
	if !ok {
		return fmt.Errorf("delete %s: there is no resource type %q: %w", id, id.Type(), errs.Invalid)
	}
	err := d.change(ctx, by, kind, "delete", id, dryRun, func(tx Tx, r *audit.Record) error {
		old, err := tx.Delete(ctx, id, by.Name, when)
		if err != nil {
			return err
		}
		if kind.Keep != nil {
			if err := kind.Keep(old); err != nil {
				return err
			}
		}
		r.Detail, err = kind.detail(old, nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	return nil
}

// errDryRun undoes a transaction that went well.
var errDryRun = errors.New("dry run")

// change is the door: authorise, change, record, in one transaction. If it
// fails, what failed is recorded in one of its own.
func (d *Door) change(ctx context.Context, by Actor, kind *Kind, verb string, target resource.ID, dryRun bool, fn func(Tx, *audit.Record) error) error {
	r := audit.Record{Actor: by.Name, Action: kind.Type + "/" + verb, Target: target.String(), Outcome: audit.Done}
	err := d.store.Write(ctx, func(tx Tx) error {
		for _, a := range kind.Needs {
			if also, err := d.can(ctx, tx, by, a, resource.ID{}); errors.Join(err, also.err) != nil {
				return errors.Join(err, also.err)
			}
		}
		decision, err := d.can(ctx, tx, by, r.Action, target)
		if err != nil {
			return err
		}
		r.Detail, r.Reason = "", decision.Reason
		if err := decision.err; err != nil {
			return err
		}
		if err := fn(tx, &r); err != nil {
			return err
		}
		if dryRun {
			return errDryRun
		}
		return tx.AppendAudit(ctx, &r)
	})
	switch {
	case errors.Is(err, errDryRun):
		return nil
	case err == nil:
		d.wake.all()
		return nil
	case dryRun:
		return err
	}
	return errors.Join(err, d.recordFailure(ctx, &r, err))
}

// recordFailure records a refusal or a failure. What a request said is not
// repeated: it was not accepted.
func (d *Door) recordFailure(ctx context.Context, r *audit.Record, why error) error {
	f := audit.Record{Actor: r.Actor, Action: r.Action, Target: r.Target, Outcome: audit.Failed, Reason: clip(why.Error())}
	if errors.Is(why, errs.Denied) {
		f.Outcome = audit.Refused
	}
	return d.store.Write(ctx, func(tx Tx) error { return tx.AppendAudit(ctx, &f) })
}

func clip(s string) string {
	const most = 1000
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.ToValidUTF8(s, "?")
}

// Get reads a document. Whoever may not read it is told so, and not whether it
// exists.
func (d *Door) Get(ctx context.Context, by Actor, id resource.ID) (*resource.Document, error) {
	var out *resource.Document
	err := d.store.Read(ctx, func(tx Tx) error {
		decision, err := d.can(ctx, tx, by, id.Type()+"/read", id)
		if err = errors.Join(err, decision.err); err != nil {
			return err
		}
		out, err = tx.Get(ctx, id)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", id, err)
	}
	return d.shown(out), nil
}

// List reads a page of what the actor may read below an id, and the key to go on
// after; "" when there is no more.
func (d *Door) List(ctx context.Context, by Actor, q resource.Query) ([]resource.Document, string, error) {
	var out []resource.Document
	next := ""
	err := d.store.Read(ctx, func(tx Tx) error {
		out, next = nil, ""
		page, err := tx.List(ctx, q)
		if err != nil {
			return err
		}
		if len(page) == q.Limit {
			next = page[len(page)-1].ID.Key()
		}
		for i := range page {
			decision, err := d.can(ctx, tx, by, page[i].Type+"/read", page[i].ID)
			if err != nil {
				return err
			}
			if decision.err == nil {
				out = append(out, *d.shown(&page[i]))
			}
		}
		return nil
	})
	if err != nil {
		return nil, "", fmt.Errorf("list %s: %w", q.Below, err)
	}
	return out, next, nil
}

// ActionReadAudit is what reading the audit log takes, at the root.
const ActionReadAudit = "Ringwall.Audit/records/read"

// Audit reads records of the audit log after a number, at most limit.
func (d *Door) Audit(ctx context.Context, by Actor, after uint64, limit int) ([]audit.Record, error) {
	var out []audit.Record
	err := d.store.Read(ctx, func(tx Tx) error {
		decision, err := d.can(ctx, tx, by, ActionReadAudit, resource.ID{})
		if err = errors.Join(err, decision.err); err != nil {
			return err
		}
		out, err = tx.Audit(ctx, after, limit)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the audit log: %w", err)
	}
	return out, nil
}
