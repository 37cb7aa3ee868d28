package pki

import (
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"ringwall/internal/errs"
)

// Authority is a fleet's own certificate authority, kept in a directory:
//
//	root.crt  root.key        signs the others; move the key offline
//	build-ca.crt   .key       issues leaves that sign release records
//	policy-ca.crt  .key       issues leaves that sign integrity policies
//	permit-ca.crt  .key       issues leaves that sign break-glass permits
//	tsa.crt        .key       the built-in timestamp authority
//
// Every certificate must be there; a key that is not is simply not usable from
// this copy, so each key can live on a machine of its own.
type Authority struct {
	Root    *Issuer
	Issuers map[Purpose]*Issuer
	TSA     *TSA
}

// AuthorityOptions say how to make an authority.
type AuthorityOptions struct {
	Name       string // appears in every certificate, such as "Example Fleet"
	Passphrase []byte // encrypts every key; empty: in the clear, mode 0600
	Now        func() time.Time
}

func caStem(p Purpose) string { return p.String() + "-ca" }

// CreateAuthority makes a new authority in dir, which must not hold one.
func CreateAuthority(dir string, o AuthorityOptions) (*Authority, error) {
	a, err := createAuthority(dir, o)
	if err != nil {
		return nil, fmt.Errorf("create authority in %s: %w", dir, err)
	}
	return a, nil
}

func createAuthority(dir string, o AuthorityOptions) (*Authority, error) {
	if o.Name == "" || len(o.Name) > 50 || o.Now == nil {
		return nil, fmt.Errorf("name of 1 to 50 bytes and clock wanted: %w", errs.Invalid)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if _, err := os.Lstat(filepath.Join(dir, "root.crt")); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is one already: %w", errs.Conflict)
	}
	now := o.Now()
	save := func(stem string, make func(key crypto.Signer) (*Issuer, error)) (*Issuer, error) {
		key, err := NewKey()
		if err != nil {
			return nil, err
		}
		i, err := make(key)
		if err != nil {
			return nil, err
		}
		data, err := EncodeKey(key, o.Passphrase)
		if err != nil {
			return nil, err
		}
		if err := writeNew(filepath.Join(dir, stem+".key"), data, 0o600); err != nil {
			return nil, err
		}
		return i, writeNew(filepath.Join(dir, stem+".crt"), EncodeCertificate(i.Cert), 0o644)
	}
	a := &Authority{Issuers: make(map[Purpose]*Issuer)}
	var err error
	a.Root, err = save("root", func(k crypto.Signer) (*Issuer, error) { return NewRoot(o.Name+" Root", k, now) })
	if err != nil {
		return nil, err
	}
	for _, p := range Purposes() {
		a.Issuers[p], err = save(caStem(p), func(k crypto.Signer) (*Issuer, error) {
			return a.Root.IssueCA(p, o.Name+" "+p.String()+" CA", k, now)
		})
		if err != nil {
			return nil, err
		}
	}
	t, err := save("tsa", func(k crypto.Signer) (*Issuer, error) {
		c, err := a.Root.IssueTSA(o.Name+" TSA", k, now)
		return &Issuer{Cert: c, Key: k}, err
	})
	if err != nil {
		return nil, err
	}
	a.TSA = &TSA{Cert: t.Cert, Key: t.Key, Now: o.Now}
	return a, nil
}

// writeNew writes a file that must not exist yet, and makes sure that it is on
// the disk.
func writeNew(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// LoadAuthority reads what CreateAuthority wrote, checks every certificate
// against its profile and the root, and every key against its certificate.
func LoadAuthority(dir string, passphrase []byte, now func() time.Time) (*Authority, error) {
	a, err := loadAuthority(dir, func(stem string, i *Issuer) error { return loadKey(dir, stem, passphrase, i) })
	if err != nil {
		return nil, fmt.Errorf("load authority from %s: %w", dir, err)
	}
	a.TSA.Now = now
	return a, nil
}

// LoadCertificates is LoadAuthority without the keys, for whoever only wants to
// know whom to trust: it needs no passphrase and can sign nothing.
func LoadCertificates(dir string) (*Authority, error) {
	a, err := loadAuthority(dir, func(string, *Issuer) error { return nil })
	if err != nil {
		return nil, fmt.Errorf("load certificates from %s: %w", dir, err)
	}
	return a, nil
}

func loadAuthority(dir string, addKey func(stem string, i *Issuer) error) (*Authority, error) {
	a := &Authority{Issuers: make(map[Purpose]*Issuer)}
	var err error
	if a.Root, err = loadIssuer(dir, "root", addKey); err != nil {
		return nil, err
	}
	for _, p := range Purposes() {
		i, err := loadIssuer(dir, caStem(p), addKey)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(checkCA(i.Cert, p), issuedBy(i.Cert, a.Root.Cert, i.Cert.NotBefore)); err != nil {
			return nil, err
		}
		a.Issuers[p] = i
	}
	t, err := loadIssuer(dir, "tsa", addKey)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkTSA(t.Cert), issuedBy(t.Cert, a.Root.Cert, t.Cert.NotBefore)); err != nil {
		return nil, err
	}
	a.TSA = &TSA{Cert: t.Cert, Key: t.Key}
	return a, nil
}

func loadIssuer(dir, stem string, addKey func(stem string, i *Issuer) error) (*Issuer, error) {
	data, err := os.ReadFile(filepath.Join(dir, stem+".crt"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%s.crt: %w", stem, errs.NotFound)
		}
		return nil, err
	}
	i := &Issuer{}
	if i.Cert, err = DecodeCertificate(data); err != nil {
		return nil, fmt.Errorf("%s.crt: %w", stem, err)
	}
	return i, addKey(stem, i)
}

// loadKey adds the key to an issuer, if it is there.
func loadKey(dir, stem string, passphrase []byte, i *Issuer) error {
	path := filepath.Join(dir, stem+".key")
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s.key: mode %04o lets others read it (want 0600): %w", stem, st.Mode().Perm(), errs.Denied)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	key, err := DecodeKey(data, passphrase)
	if err != nil {
		return fmt.Errorf("%s.key: %w", stem, err)
	}
	if !key.PublicKey.Equal(i.Cert.PublicKey) {
		return fmt.Errorf("%s.key does not belong to %s.crt: %w", stem, stem, errs.Invalid)
	}
	i.Key = key
	return nil
}

// Roots returns what a verifier of one purpose needs to trust this authority:
// the issuing CA and the TSA themselves, each under its subject's name. The
// root is not in it; a CA that it issues tomorrow is trusted when a policy
// says so, not before.
func (a *Authority) Roots(p Purpose) TrustRoots {
	return TrustRoots{
		CAs:  []Anchor{{Name: a.Issuers[p].Cert.Subject.CommonName, Cert: a.Issuers[p].Cert}},
		TSAs: []Anchor{{Name: a.TSA.Cert.Subject.CommonName, Cert: a.TSA.Cert}},
	}
}

// NewSigner issues a leaf for a key that exists only in memory.
func (a *Authority) NewSigner(r LeafRequest) (*Signer, error) {
	i := a.Issuers[r.Purpose]
	if i == nil || i.Key == nil {
		return nil, fmt.Errorf("new signer: the key of the %v CA is not here: %w", r.Purpose, errs.NotFound)
	}
	if a.TSA.Key == nil {
		return nil, fmt.Errorf("new signer: the key of the TSA is not here: %w", errs.NotFound)
	}
	key, err := NewKey()
	if err != nil {
		return nil, fmt.Errorf("new signer: %w", err)
	}
	leaf, err := i.IssueLeaf(r, key.Public())
	if err != nil {
		return nil, fmt.Errorf("new signer: %w", err)
	}
	return &Signer{Purpose: r.Purpose, Leaf: leaf, Key: key, Stamper: a.TSA}, nil
}

// SigstoreRoot returns what a verifier of one purpose needs as a Sigstore
// trusted_root.json, so that cosign and sigstore-go can verify Ringwall's
// bundles without Ringwall. Those know nothing of purposes: never put two of
// them into one file.
func (a *Authority) SigstoreRoot(p Purpose) ([]byte, error) {
	r := a.Roots(p)
	type cert struct {
		Raw []byte `json:"rawBytes"`
	}
	type authority struct {
		Subject map[string]string `json:"subject"`
		URI     string            `json:"uri"`
		Chain   map[string][]cert `json:"certChain"`
		Valid   map[string]string `json:"validFor"`
	}
	list := func(anchors []Anchor) []authority {
		var out []authority
		for _, anchor := range anchors {
			out = append(out, authority{
				Subject: map[string]string{"commonName": anchor.Name, "organization": anchor.Name},
				URI:     "urn:ringwall:anchor",
				Chain:   map[string][]cert{"certificates": {{anchor.Cert.Raw}, {a.Root.Cert.Raw}}},
				Valid: map[string]string{
					"start": anchor.Cert.NotBefore.UTC().Format(time.RFC3339), "end": anchor.Cert.NotAfter.UTC().Format(time.RFC3339),
				},
			})
		}
		return out
	}
	b, err := json.MarshalIndent(map[string]any{
		"mediaType":              "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
		"certificateAuthorities": list(r.CAs),
		"timestampAuthorities":   list(r.TSAs),
	}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode trusted root: %w", err)
	}
	return b, nil
}
