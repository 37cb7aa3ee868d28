package control

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/identity"
	"ringwall/internal/resource"
)

// Types of the documents that say who people and services are. All of them
// stand right below the root, and take what assigning roles takes: whoever makes
// somebody, or says who is believed about him, can be him.
const (
	TypeUser        = "Ringwall.Identity/users"        // of the built-in issuer
	TypeIssuer      = "Ringwall.Identity/issuers"      // OpenID Connect elsewhere
	TypeCertificate = "Ringwall.Identity/certificates" // of services; named by the serial number in hex

	kindIssuer      = "ringwall.identity/issuers"
	kindCertificate = "ringwall.identity/certificates"
)

// User is what the document of a user of the built-in issuer holds.
type User struct {
	Name string `json:"displayName,omitempty"`
	// Hash is of the password, see identity.HashPassword; without one the user
	// cannot sign on. It is never read.
	Hash     string `json:"passwordHash,omitempty"`
	Disabled bool   `json:"disabled,omitempty"`
}

// Issuer is what the document of an issuer elsewhere holds.
type Issuer struct {
	URL      string `json:"issuer"`
	ClientID string `json:"clientId"` // that people sign on to, and tokens are for
	// Audiences are others that tokens may be for.
	Audiences []string `json:"audiences,omitempty"`
	// NameClaim says what people are called in the audit log, beside their object
	// id; default preferred_username. GroupsClaim holds their groups; default groups.
	NameClaim   string `json:"nameClaim,omitempty"`
	GroupsClaim string `json:"groupsClaim,omitempty"`
	// AllowedGroups are of the claim: who is in none of them does not come in.
	// Empty: everybody whom the issuer knows, and what roles say.
	AllowedGroups []string `json:"allowedGroups,omitempty"`
	CA            string   `json:"certificateAuthority,omitempty"` // PEM; default the system's
	Disabled      bool     `json:"disabled,omitempty"`
}

// Certificate is what the document of a service's certificate holds. Without
// its document a certificate counts for nothing.
type Certificate struct {
	Principal string    `json:"principalId"` // ringwall://services/NAME
	SHA256    string    `json:"sha256"`      // of the certificate, in hex
	NotAfter  time.Time `json:"notAfter"`
}

func identityKinds() []Kind {
	needs := []string{TypeRoleAssignment + "/write"}
	return []Kind{
		{
			Type: TypeUser, Needs: needs, Secret: []string{"passwordHash"}, Check: checkUser,
			About: "Somebody who signs on at the built-in issuer.",
			Schema: json.RawMessage(`{"type":"object","properties":{"displayName":{"type":"string"},` +
				`"passwordHash":{"type":"string","writeOnly":true,"description":"argon2id; never read"},"disabled":{"type":"boolean"}},"additionalProperties":false}`),
		},
		{
			Type: TypeIssuer, Needs: needs, Check: checkIssuer,
			About: "An OpenID Connect issuer whose tokens are believed.",
			Schema: json.RawMessage(`{"type":"object","required":["issuer","clientId"],"properties":{"issuer":{"type":"string","format":"uri"},"clientId":{"type":"string"},` +
				`"audiences":{"type":"array","items":{"type":"string"}},"nameClaim":{"type":"string"},"groupsClaim":{"type":"string"},` +
				`"allowedGroups":{"type":"array","items":{"type":"string"}},"certificateAuthority":{"type":"string","description":"PEM"},"disabled":{"type":"boolean"}},"additionalProperties":false}`),
		},
		{
			Type: TypeCertificate, Needs: needs, Check: checkCertificate,
			About: "A client certificate of a service; deleting it revokes it.",
			Schema: json.RawMessage(`{"type":"object","required":["principalId","sha256","notAfter"],"properties":{"principalId":{"type":"string"},` +
				`"sha256":{"type":"string","pattern":"^[0-9a-f]{64}$"},"notAfter":{"type":"string","format":"date-time"}},"additionalProperties":false}`),
		},
	}
}

// strict reads properties and refuses those that it does not know: a misspelt
// "disabled" would let somebody in.
func strict(d *resource.Document, v any) error {
	dec := json.NewDecoder(strings.NewReader(string(d.Properties)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("properties: %w: %w", err, errs.Invalid)
	}
	return nil
}

func checkUser(_ context.Context, _ Tx, _, d *resource.Document) error {
	var u User
	if err := errors.Join(atRoot(d), strict(d, &u)); err != nil {
		return err
	}
	if u.Hash != "" {
		return identity.CheckHash(u.Hash)
	}
	return nil
}

func checkIssuer(ctx context.Context, tx Tx, _, d *resource.Document) error {
	var i Issuer
	if err := errors.Join(atRoot(d), strict(d, &i)); err != nil {
		return err
	}
	u, err := url.Parse(i.URL)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" ||
		len(i.URL) > 256 || strings.ContainsAny(i.URL, "|# ?\\"):
		return fmt.Errorf("issuer %.80q: want https://HOST/PATH: %w", i.URL, errs.Invalid)
	case i.ClientID == "":
		return fmt.Errorf("without clientId every token of the issuer would do, whomever it is for: %w", errs.Invalid)
	case d.ID.Name() == Local:
		return fmt.Errorf("%s is the built-in issuer: %w", Local, errs.Conflict)
	case len(i.Audiences) > 16 || len(i.AllowedGroups) > 1000:
		return fmt.Errorf("more than 16 audiences or 1000 groups: %w", errs.Invalid)
	}
	if i.CA != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(i.CA)) {
		return fmt.Errorf("certificateAuthority holds no certificate: %w", errs.Invalid)
	}
	return each(ctx, tx, kindIssuer, func(o *resource.Document) error {
		var other Issuer
		if err := properties(o, &other); err != nil || o.ID.Equal(d.ID) || other.URL != i.URL {
			return err
		}
		return fmt.Errorf("%s is about the same issuer: %w", o.ID, errs.Conflict)
	})
}

func checkCertificate(_ context.Context, _ Tx, old, d *resource.Document) error {
	var c Certificate
	if err := errors.Join(atRoot(d), strict(d, &c)); err != nil {
		return err
	}
	name, ok := strings.CutPrefix(c.Principal, PeerID(PeerService, ""))
	switch sum, err := hex.DecodeString(c.SHA256); {
	case !ok || !ValidName(name) || err != nil || len(sum) != sha256.Size || c.NotAfter.IsZero():
		return fmt.Errorf("want principalId ringwall://services/NAME, sha256 and notAfter: %w", errs.Invalid)
	case old != nil:
		return fmt.Errorf("a certificate is revoked by deleting it, and not changed: %w", errs.Conflict)
	}
	return nil
}

// certificateID is the document of a certificate.
func certificateID(c *x509.Certificate) resource.ID {
	id, _ := resource.ParseID("/providers/" + TypeCertificate + "/" + hex.EncodeToString(c.SerialNumber.Bytes())) // well formed
	return id
}

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// service is the Peer of services: the certificate counts as long as its
// document is there.
func service(ctx context.Context, tx Tx, name string, cert *x509.Certificate) (*Actor, error) {
	d, err := tx.Get(ctx, certificateID(cert))
	if err != nil {
		return nil, err
	}
	var c Certificate
	if err := properties(d, &c); err != nil {
		return nil, err
	}
	who := PeerID(PeerService, name)
	if c.Principal != who || c.SHA256 != fingerprint(cert) {
		return nil, fmt.Errorf("the certificate is not the one of its number: %w", errs.Untrusted)
	}
	return &Actor{ID: who, Name: who}, nil
}

// MaxServiceLife is how long a service's certificate may last.
const MaxServiceLife = 30 * 24 * time.Hour

// ClientAuthority certifies clients; *pki.TLSAuthority is one.
type ClientAuthority interface {
	CertifyClient(csr []byte, identity string, life time.Duration, now time.Time) (*x509.Certificate, error)
}

// CertifyService gives a service a certificate for the key of a request. It
// takes what assigning roles takes; a service may renew its own before it ends.
func (d *Door) CertifyService(ctx context.Context, by Actor, ca ClientAuthority, name string, csr []byte, life time.Duration, now time.Time) (*x509.Certificate, error) {
	who := PeerID(PeerService, name)
	if !ValidName(name) || strings.ToLower(name) != name || life > MaxServiceLife {
		return nil, fmt.Errorf("certify service %.80q for %v: want a name of lower-case letters, digits, dots, dashes and underlines, for at most %v: %w", name, life, MaxServiceLife, errs.Invalid)
	}
	cert, err := ca.CertifyClient(csr, who, life, now)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(Certificate{Principal: who, SHA256: fingerprint(cert), NotAfter: cert.NotAfter})
	if err != nil {
		return nil, err
	}
	if by.ID == who { // what nobody else can have authenticated as
		by.engine = []string{TypeCertificate + "/write", TypeRoleAssignment + "/write"}
	}
	if _, err := d.Put(ctx, by, resource.Document{ID: certificateID(cert), Properties: b}, resource.When{Absent: true}, false); err != nil {
		return nil, err // the certificate never leaves
	}
	return cert, nil
}

// ForgetCertificates deletes the documents of certificates that are over for a
// day, as nobody can use them any more; at most a page of them.
func (d *Door) ForgetCertificates(ctx context.Context, now time.Time) error {
	by := Engine("certificates", TypeCertificate+"/delete", TypeRoleAssignment+"/write")
	var over []resource.ID
	err := d.store.Read(ctx, func(tx Tx) error {
		over = nil
		return each(ctx, tx, kindCertificate, func(doc *resource.Document) error {
			var c Certificate
			if properties(doc, &c) == nil && now.After(c.NotAfter.Add(24*time.Hour)) && len(over) < resource.MaxPage {
				over = append(over, doc.ID)
			}
			return nil
		})
	})
	for _, id := range over {
		if err == nil {
			err = d.Delete(ctx, by, id, resource.When{}, false)
		}
	}
	return err
}
