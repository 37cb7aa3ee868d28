package control

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// TypeToken is a bearer token for a person or a service, until a sign-on is set
// up. The document's name is the token's SHA-256: the server never holds the
// token itself, and whoever reads the tree learns nothing.
const TypeToken = "Ringwall.Identity/tokens"

const tokenPrefix = "rwt_"

// NewToken makes a token of 160 random bits.
func NewToken() string {
	var b [20]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return tokenPrefix + strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}

// TokenID is the document of a token.
func TokenID(token string) resource.ID {
	sum := sha256.Sum256([]byte(token))
	id, _ := resource.ParseID("/providers/" + TypeToken + "/" + hex.EncodeToString(sum[:])) // well formed
	return id
}

// Token is what the document of a token holds.
type Token struct {
	Principal string    `json:"principalId"`
	Name      string    `json:"displayName"`
	Groups    []string  `json:"groups,omitempty"`
	Expires   time.Time `json:"expires"`
}

// maxTokenLife is how long a token may last.
const maxTokenLife = 366 * 24 * time.Hour

func tokenOf(d *resource.Document) (*Token, error) {
	var t Token
	return &t, properties(d, &t)
}

// tokenKind needs what assigning roles needs, since a token is as good as all
// roles of its principal.
func tokenKind() Kind {
	return Kind{
		Type: TypeToken, Needs: []string{TypeRoleAssignment + "/write"}, Check: checkToken, About: "A bearer token, named by its SHA-256.",
		Schema: json.RawMessage(`{"type":"object","required":["principalId","displayName","expires"],"properties":{"principalId":{"type":"string"},` +
			`"displayName":{"type":"string"},"groups":{"type":"array","items":{"type":"string"}},"expires":{"type":"string","format":"date-time"}}}`),
	}
}

func checkToken(_ context.Context, _ Tx, _, d *resource.Document) error {
	t, err := tokenOf(d)
	if err != nil {
		return err
	}
	name := d.ID.Name()
	switch b, err := hex.DecodeString(name); {
	case err != nil || len(b) != sha256.Size || strings.ToLower(name) != name:
		return fmt.Errorf("the name of a token is its SHA-256 in lower-case hex: %w", errs.Invalid)
	case t.Principal == "" || t.Name == "":
		return fmt.Errorf("a token needs principalId and displayName: %w", errs.Invalid)
	case reserved(t.Principal) || slices.ContainsFunc(t.Groups, reserved):
		return fmt.Errorf("the server's own principals have no tokens, and the local administrator that of the first start only: %w", errs.Denied)
	case t.Expires.IsZero() || time.Until(t.Expires) > maxTokenLife:
		return fmt.Errorf("a token expires, within a year: %w", errs.Invalid)
	}
	return nil
}

// Authenticate tells whose token it is. The error is errs.Untrusted and the same
// for every token that is none.
func (d *Door) Authenticate(ctx context.Context, token string, now time.Time) (*Actor, error) {
	var t *Token
	err := d.store.Read(ctx, func(tx Tx) error {
		doc, err := tx.Get(ctx, TokenID(token))
		if err != nil {
			return err
		}
		t, err = tokenOf(doc)
		return err
	})
	if err != nil && !errors.Is(err, errs.NotFound) {
		return nil, fmt.Errorf("authenticate: %w", err)
	}
	if err != nil || !t.Expires.IsZero() && !now.Before(t.Expires) {
		return nil, fmt.Errorf("authenticate: the token is unknown or over: %w", errs.Untrusted)
	}
	return &Actor{ID: t.Principal, Name: t.Name, Groups: t.Groups}, nil
}

// Bootstrap makes the local administrator at the first start and returns the
// token, once; "" if there is one already.
func (d *Door) Bootstrap(ctx context.Context) (string, error) {
	token := ""
	err := d.store.Write(ctx, func(tx Tx) error {
		token = ""
		n, err := tx.Revision(ctx)
		if err != nil || n > 0 {
			return err
		}
		token = NewToken()
		holder, err := json.Marshal(Token{Principal: BreakGlass, Name: "break-glass"})
		if err != nil {
			return err
		}
		doc := resource.Document{ID: TokenID(token), Type: TypeToken, Properties: holder}
		if _, err := tx.Put(ctx, doc, "first start", resource.When{Absent: true}); err != nil {
			return err
		}
		return tx.AppendAudit(ctx, &audit.Record{
			Actor: "first start", Action: TypeToken + "/write", Target: doc.ID.String(), Outcome: audit.Done, Reason: "the local administrator is made",
		})
	})
	if err != nil {
		return "", fmt.Errorf("make the local administrator: %w", err)
	}
	return token, nil
}
