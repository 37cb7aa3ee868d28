package control

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// TypeUserGroup is a group of principals, for roles that many hold. Its members
// are object ids, those of other groups included.
const (
	TypeUserGroup = "Ringwall.Identity/groups"
	kindGroup     = "ringwall.identity/groups"
)

// Local is what stands in front of the names of users and groups that the
// server itself keeps.
const Local = "local"

// UserID is the object id of somebody whom an issuer knows by a subject, and
// GroupID that of a group that the issuer names. An issuer's name holds neither
// a bar nor a hash sign, so that no user passes for a group, or for a user of
// another issuer.
func UserID(issuer, subject string) string { return issuer + "|" + plain(subject) }

// GroupID is described at UserID.
func GroupID(issuer, name string) string { return issuer + "#" + plain(name) }

// Group is what the document of a group holds.
type Group struct {
	Name    string   `json:"displayName,omitempty"`
	Members []string `json:"members"`
}

// Bounds of groups.
const (
	maxMembers   = 10_000 // of a group
	maxGroupsOf  = 1000   // that somebody is in, nested ones included
	maxObjectID  = 512    // bytes
	maxGroupTree = 10_000 // groups of a server
)

// groupKind needs what assigning roles needs: a member has all roles of the group.
func groupKind() Kind {
	return Kind{
		Type: TypeUserGroup, Needs: []string{TypeRoleAssignment + "/write"}, Check: checkGroup, About: "A group of principals.",
		Schema: json.RawMessage(`{"type":"object","required":["members"],"properties":{"displayName":{"type":"string"},"members":{"type":"array","items":{"type":"string"},"maxItems":10000}}}`),
	}
}

func groupOf(d *resource.Document) (*Group, error) {
	var g Group
	return &g, properties(d, &g)
}

// atRoot refuses a document that is not right below the root, and names that
// are hard to tell apart.
func atRoot(d *resource.Document) error {
	if name := d.ID.Name(); d.ID.Parent().Key() != "" || !ValidName(name) || strings.ToLower(name) != name {
		return fmt.Errorf("want /providers/%s/NAME, the name of lower-case letters, digits, dots, dashes and underlines: %w", d.Type, errs.Invalid)
	}
	return nil
}

func checkGroup(ctx context.Context, tx Tx, _, d *resource.Document) error {
	g, err := groupOf(d)
	if err != nil {
		return err
	}
	if err := atRoot(d); err != nil {
		return err
	}
	if len(g.Members) > maxMembers {
		return fmt.Errorf("%d members (at most %d): %w", len(g.Members), maxMembers, errs.Invalid)
	}
	for _, m := range g.Members {
		if m == "" || len(m) > maxObjectID || reserved(m) {
			return fmt.Errorf("%.80q is nobody who can be in a group: %w", m, errs.Invalid)
		}
	}
	all, err := readGroups(ctx, tx)
	if err != nil {
		return err
	}
	own := GroupID(Local, d.ID.Name())
	if len(all.members) >= maxGroupTree {
		return fmt.Errorf("%d groups (at most %d): %w", len(all.members), maxGroupTree, errs.Invalid)
	}
	all.members[key(own)] = g.Members
	if all.reaches(g.Members, own) {
		return fmt.Errorf("%s would be a member of itself: %w", own, errs.Invalid)
	}
	return nil
}

// membership is who is in which group, by object ids in lower case.
type membership struct {
	members map[string][]string // of a group
	in      map[string][]string // groups that somebody is directly in
}

func key(id string) string { return strings.ToLower(id) }

func readGroups(ctx context.Context, tx Tx) (membership, error) {
	m := membership{map[string][]string{}, map[string][]string{}}
	err := each(ctx, tx, kindGroup, func(d *resource.Document) error {
		g, err := groupOf(d)
		if err != nil {
			return err
		}
		own := GroupID(Local, d.ID.Name())
		m.members[key(own)] = g.Members
		for _, x := range g.Members {
			m.in[key(x)] = append(m.in[key(x)], own)
		}
		return nil
	})
	return m, err
}

// reaches reports whether a group is among members, nested ones included.
func (m *membership) reaches(members []string, group string) bool {
	seen := map[string]bool{}
	for todo := slices.Clone(members); len(todo) > 0; {
		id := key(todo[len(todo)-1])
		todo = todo[:len(todo)-1]
		if id == key(group) {
			return true
		}
		if seen[id] {
			continue
		}
		seen[id] = true
		todo = append(todo, m.members[id]...)
	}
	return false
}

// of lists every group of an actor: those that came with the sign-on, and those
// that he, or one of them, is a member of. Beyond maxGroupsOf they count no
// more, which grants less.
func (m *membership) of(by Actor) []string {
	if len(m.in) == 0 {
		return by.Groups
	}
	out := slices.Clone(by.Groups)
	seen := map[string]bool{}
	for _, g := range out {
		seen[key(g)] = true
	}
	add := func(id string) {
		for _, g := range m.in[key(id)] {
			if !seen[key(g)] && len(out) < maxGroupsOf {
				seen[key(g)] = true
				out = append(out, g)
			}
		}
	}
	add(by.ID)
	for i := 0; i < len(out); i++ {
		add(out[i])
	}
	return out
}
