package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"ringwall/internal/rbac"
	"ringwall/internal/resource"
)

// plain is a subject as it stands in an object id. Object ids are compared
// without regard to case and subjects are not, so what is not plain is hashed.
func plain(subject string) string {
	if subject != "" && len(subject) <= 128 && !strings.ContainsFunc(subject, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("._-@", r)
	}) {
		return subject
	}
	sum := sha256.Sum256([]byte(subject))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Question is what Access answers.
type Question struct {
	Principal string   // object id; "" for whoever asks
	Groups    []string // that come with a sign-on elsewhere: the server does not know them
	Action    string
	Data      bool
	Scope     resource.ID
}

// Answer is what may be done and why.
type Answer struct {
	rbac.Decision
	Principal string   `json:"principal"`
	Groups    []string `json:"groups"` // that count, nested ones included
}

// Access tells whether somebody may do something. Everybody may ask about
// himself; about others, who may read role assignments there.
func (d *Door) Access(ctx context.Context, by Actor, q Question) (*Answer, error) {
	who := Actor{ID: q.Principal, Groups: q.Groups}
	if q.Principal == "" || strings.EqualFold(q.Principal, by.ID) {
		who = by
	}
	var out *Answer
	err := d.store.Read(ctx, func(tx Tx) error {
		if !strings.EqualFold(who.ID, by.ID) {
			may, err := d.can(ctx, tx, by, TypeRoleAssignment+"/read", q.Scope)
			if err != nil || may.err != nil {
				return errors.Join(err, may.err)
			}
		}
		all, err := d.roles.at(ctx, tx)
		if err != nil {
			return err
		}
		groups := all.groups.of(who)
		out = &Answer{Principal: who.ID, Groups: append([]string{}, groups...)}
		out.Decision = all.Can(&rbac.Request{Principal: who.ID, Groups: groups, Action: q.Action, Data: q.Data, Scope: q.Scope})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("whether %s may %s on %s: %w", who.ID, q.Action, q.Scope, err)
	}
	return out, nil
}
