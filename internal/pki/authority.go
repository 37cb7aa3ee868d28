package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"ringwall/internal/errs"
)

// Authority is a fleet's own certificate authority, kept in a directory:
//
//	root.crt  root.key           signs the others; move the key offline
//	build-ca.crt  .key           issues leaves that sign release records
//	policy-ca.crt  .key          issues leaves that sign integrity policies
//	permit-ca.crt  .key          issues leaves that sign break-glass permits
//	attest-ca.crt  .key          issues leaves that sign evidence of gates
//	breakglass-ca.crt  .key      issues leaves that sign builds past their gates
//	appraisal-ca.crt  .key       issues leaves that sign results of host attestation
//	tsa.crt  .key                the built-in timestamp authority
//	tsa-NAME.crt                 timestamp authorities elsewhere, if any
//	log.pub  .key                the transparency log, if there is one
//
// A key that is not there is simply not usable from this copy, so each key can
// live on a machine of its own. A key in a token has STEM.uri in the place of
// STEM.key: one line that says where it is. The certificates must be there,
// but for those of the last three purposes, which authorities made by an earlier
// version lack; ExtendAuthority adds them.
type Authority struct {
	Root    *Issuer
	Issuers map[Purpose]*Issuer // none for a purpose: nobody signs it
	TSA     *TSA
	// OtherTSAs are believed for the time as well as TSA is.
	OtherTSAs []Anchor
	// Log is believed, and then required, for every signature; nil: no log.
	Log *LogAnchor
	// LogKey signs the log's checkpoints; nil where it is not.
	LogKey crypto.Signer
}

// AuthorityOptions say how to make an authority.
type AuthorityOptions struct {
	Name       string // appears in every certificate, such as "Example Fleet"
	Passphrase []byte // encrypts every key file; empty: in the clear, mode 0600
	Now        func() time.Time
	// NewKey, if set, makes the key of a file stem elsewhere than in a file and
	// returns its URI too, which is kept; with an empty URI the key becomes a file.
	NewKey func(stem string) (key crypto.Signer, uri string, err error)
	// OpenKey opens such a key again; ExtendAuthority needs it for the root's.
	OpenKey KeyOpener
}

// KeyOpener opens a key that is not a file of the authority.
type KeyOpener func(uri string) (crypto.Signer, error)

func caStem(p Purpose) string { return p.String() + "-ca" }

// stemLog is the stem of the log's files.
const stemLog = "log"

// maxKeyURI bounds what is read as the place of a key.
const maxKeyURI = 1 << 10

// firstPurposes are those that every authority has had from the beginning.
func firstPurposes() []Purpose { return []Purpose{PurposeBuild, PurposePolicy, PurposePermit} }

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
	a := &Authority{Issuers: make(map[Purpose]*Issuer)}
	var err error
	a.Root, err = o.save(dir, "root", func(k crypto.Signer) (*Issuer, error) { return NewRoot(o.Name+" Root", k, o.Now()) })
	if err != nil {
		return nil, err
	}
	for _, p := range Purposes() {
		if a.Issuers[p], err = o.saveCA(dir, a.Root, p, o.Name); err != nil {
			return nil, err
		}
	}
	t, err := o.saveTSA(dir, a.Root, o.Name)
	if err != nil {
		return nil, err
	}
	a.TSA = &TSA{Cert: t.Cert, Key: t.Key, Now: o.Now}
	return a, nil
}

// saveCA makes the CA of a purpose.
func (o *AuthorityOptions) saveCA(dir string, root *Issuer, p Purpose, name string) (*Issuer, error) {
	return o.save(dir, caStem(p), func(k crypto.Signer) (*Issuer, error) {
		return root.IssueCA(p, name+" "+p.String()+" CA", k, o.Now())
	})
}

func (o *AuthorityOptions) saveTSA(dir string, root *Issuer, name string) (*Issuer, error) {
	return o.save(dir, "tsa", func(k crypto.Signer) (*Issuer, error) {
		c, err := root.IssueTSA(name+" TSA", k, o.Now())
		return &Issuer{Cert: c, Key: k}, err
	})
}

// save makes a key and the certificate that make returns for it. The
// certificate is written last: where it is, the key was kept.
func (o *AuthorityOptions) save(dir, stem string, make func(key crypto.Signer) (*Issuer, error)) (*Issuer, error) {
	key, err := o.SaveKey(dir, stem)
	if err != nil {
		return nil, err
	}
	i, err := make(key)
	if err != nil {
		return nil, err
	}
	return i, writeNew(filepath.Join(dir, stem+".crt"), EncodeCertificate(i.Cert), 0o644)
}

// SaveKey makes the key of a stem and keeps it in dir, or what says where it
// is. A key file that is there already, from a run that was cut short, is used.
func (o *AuthorityOptions) SaveKey(dir, stem string) (crypto.Signer, error) {
	if o.NewKey != nil {
		key, uri, err := o.NewKey(stem)
		if err != nil {
			return nil, fmt.Errorf("make key of %s: %w", stem, err)
		}
		if uri != "" {
			if _, err := publicP256(key); err != nil {
				return nil, fmt.Errorf("key of %s: %w", stem, err)
			}
			return key, writeNew(filepath.Join(dir, stem+".uri"), []byte(uri+"\n"), 0o600)
		}
	}
	file := filepath.Join(dir, stem+".key")
	if _, err := os.Lstat(file); err == nil {
		return ReadKey(file, o.Passphrase)
	}
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	data, err := EncodeKey(key, o.Passphrase)
	if err != nil {
		return nil, err
	}
	return key, writeNew(file, data, 0o600)
}

// ExtendAuthority makes what an authority lacks: the CAs that an earlier version
// did not know, and a CA or TSA whose files were moved away to be replaced. It
// returns the file stems of what it made; a second time there is nothing to
// make. It needs the root's key. The options' name is not used: the authority
// has one.
func ExtendAuthority(dir string, o AuthorityOptions) ([]string, error) {
	added, err := extendAuthority(dir, o)
	if err != nil {
		return added, fmt.Errorf("extend authority in %s: %w", dir, err)
	}
	return added, nil
}

func extendAuthority(dir string, o AuthorityOptions) ([]string, error) {
	if o.Now == nil {
		return nil, fmt.Errorf("clock wanted: %w", errs.Invalid)
	}
	root, err := loadIssuer(dir, "root", func(stem string, i *Issuer) error { return loadKey(dir, stem, o.Passphrase, o.OpenKey, i) })
	if err != nil {
		return nil, err
	}
	name := strings.TrimSuffix(root.Cert.Subject.CommonName, " Root")
	var added []string
	add := func(stem string, make func() error) error {
		if _, err := os.Lstat(filepath.Join(dir, stem+".crt")); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if root.Key == nil {
			return fmt.Errorf("%s is missing, and the root's key is not here to make it: %w", stem, errs.NotFound)
		}
		if err := make(); err != nil {
			return err
		}
		added = append(added, stem)
		return nil
	}
	for _, p := range Purposes() {
		if err := add(caStem(p), func() error {
			_, err := o.saveCA(dir, root, p, name)
			return err
		}); err != nil {
			return added, err
		}
	}
	return added, add("tsa", func() error {
		_, err := o.saveTSA(dir, root, name)
		return err
	})
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
// against its profile and the root, and every key file against its certificate.
// Keys in tokens are not opened by it: see LoadAuthorityKeys.
func LoadAuthority(dir string, passphrase []byte, now func() time.Time) (*Authority, error) {
	return LoadAuthorityKeys(dir, passphrase, now, func(string) (crypto.Signer, error) {
		return nil, fmt.Errorf("it is in a token: %w", errs.Unsupported)
	})
}

// LoadAuthorityKeys is LoadAuthority with keys that are not files: open is
// called for one when it signs for the first time, and not before, so that a
// token that is not needed need not be there.
func LoadAuthorityKeys(dir string, passphrase []byte, now func() time.Time, open KeyOpener) (*Authority, error) {
	a, err := loadAuthority(dir, func(stem string, i *Issuer) error { return loadKey(dir, stem, passphrase, open, i) })
	if err == nil && a.Log != nil {
		i := &Issuer{Cert: &x509.Certificate{PublicKey: a.Log.Key}}
		err = loadKey(dir, stemLog, passphrase, open, i)
		a.LogKey = i.Key
	}
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
		if errors.Is(err, errs.NotFound) && !slices.Contains(firstPurposes(), p) {
			continue
		}
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
	if a.OtherTSAs, err = loadOtherTSAs(dir); err != nil {
		return nil, err
	}
	if a.Log, err = loadLog(dir); err != nil {
		return nil, err
	}
	return a, nil
}

func loadIssuer(dir, stem string, addKey func(stem string, i *Issuer) error) (*Issuer, error) {
	c, err := loadCertificate(dir, stem)
	if err != nil {
		return nil, err
	}
	i := &Issuer{Cert: c}
	return i, addKey(stem, i)
}

func loadCertificate(dir, stem string) (*x509.Certificate, error) {
	data, err := os.ReadFile(filepath.Join(dir, stem+".crt"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%s.crt: %w", stem, errs.NotFound)
		}
		return nil, err
	}
	c, err := DecodeCertificate(data)
	if err != nil {
		return nil, fmt.Errorf("%s.crt: %w", stem, err)
	}
	return c, nil
}

// loadOtherTSAs reads tsa-*.crt: a timestamp authority's own certificate, or
// that of the CA that issued it.
func loadOtherTSAs(dir string) ([]Anchor, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []Anchor
	for _, e := range entries { // sorted by name
		stem, ok := strings.CutSuffix(e.Name(), ".crt")
		if !ok || !strings.HasPrefix(stem, "tsa-") {
			continue
		}
		c, err := loadCertificate(dir, stem)
		if err != nil {
			return nil, err
		}
		if !c.IsCA {
			err = checkTSA(c)
		}
		if err := errors.Join(err, checkP256(c)); err != nil {
			return nil, fmt.Errorf("%s.crt: %w", stem, err)
		}
		out = append(out, Anchor{Name: c.Subject.CommonName, Cert: c})
	}
	return out, nil
}

// loadLog reads log.pub, if it is there.
func loadLog(dir string) (*LogAnchor, error) {
	data, err := os.ReadFile(filepath.Join(dir, stemLog+".pub"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // an authority without a log is whole
	}
	if err != nil {
		return nil, err
	}
	k, err := ParseLogKey(strings.TrimSuffix(string(data), "\n"))
	if err != nil {
		return nil, fmt.Errorf("%s.pub: %w", stemLog, err)
	}
	return &LogAnchor{Name: k.Origin, LogKey: *k}, nil
}

// SaveLog makes the key of a transparency log, and makes the authority in dir
// trust and require that log from now on. It must not have one.
func SaveLog(dir, origin string, o AuthorityOptions) (*LogAnchor, crypto.Signer, error) {
	if _, err := os.Lstat(filepath.Join(dir, stemLog+".pub")); !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("make log key in %s: there is one already: %w", dir, errs.Conflict)
	}
	if err := checkOrigin(origin); err != nil {
		return nil, nil, fmt.Errorf("make log key in %s: %w", dir, err)
	}
	key, err := o.SaveKey(dir, stemLog)
	if err != nil {
		return nil, nil, fmt.Errorf("make log key in %s: %w", dir, err)
	}
	pub, err := publicP256(key)
	if err != nil {
		return nil, nil, fmt.Errorf("make log key in %s: %w", dir, err)
	}
	a := &LogAnchor{Name: origin, LogKey: LogKey{Origin: origin, Key: pub}}
	if err := writeNew(filepath.Join(dir, stemLog+".pub"), []byte(a.String()+"\n"), 0o644); err != nil {
		return nil, nil, fmt.Errorf("make log key in %s: %w", dir, err)
	}
	return a, key, nil
}

// AdoptKey makes the authority in dir use the key at uri for a stem (such as
// build-ca). The key must be the one of the stem's certificate; a key file that
// is there stays, and must be moved away first.
func AdoptKey(dir, stem, uri string, open KeyOpener) error {
	if err := adoptKey(dir, stem, uri, open); err != nil {
		return fmt.Errorf("adopt key of %s: %w", stem, err)
	}
	return nil
}

func adoptKey(dir, stem, uri string, open KeyOpener) error {
	if uri == "" || len(uri) > maxKeyURI || strings.ContainsAny(uri, "\r\n") {
		return fmt.Errorf("URI of %d bytes: %w", len(uri), errs.Invalid)
	}
	var pub crypto.PublicKey
	if stem == stemLog {
		l, err := loadLog(dir)
		if err != nil {
			return err
		}
		if l == nil {
			return fmt.Errorf("%s.pub: %w", stemLog, errs.NotFound)
		}
		pub = l.Key
	} else {
		c, err := loadCertificate(dir, stem)
		if err != nil {
			return err
		}
		pub = c.PublicKey
	}
	if _, err := os.Lstat(filepath.Join(dir, stem+".key")); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s.key is still here: %w", stem, errs.Conflict)
	}
	key, err := open(uri)
	if err != nil {
		return err
	}
	if have, err := publicP256(key); err != nil || !have.Equal(pub) {
		return fmt.Errorf("the key at that place is another one: %w", errs.Invalid)
	}
	return writeNew(filepath.Join(dir, stem+".uri"), []byte(uri+"\n"), 0o600)
}

// loadKey adds the key to an issuer, if it is there.
func loadKey(dir, stem string, passphrase []byte, open KeyOpener, i *Issuer) error {
	pub, ok := i.Cert.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("%s.crt: key is not on P-256: %w", stem, errs.Untrusted)
	}
	uri, err := readURI(filepath.Join(dir, stem+".uri"))
	if err != nil {
		return fmt.Errorf("%s.uri: %w", stem, err)
	}
	path := filepath.Join(dir, stem+".key")
	_, err = os.Lstat(path)
	switch here := !errors.Is(err, fs.ErrNotExist); {
	case here && uri != "":
		return fmt.Errorf("%s.key and %s.uri are both here: %w", stem, stem, errs.Conflict)
	case uri != "":
		i.Key = &elsewhere{public: pub, open: sync.OnceValues(func() (crypto.Signer, error) { return openMatching(uri, pub, open) })}
		return nil
	case !here:
		return nil
	}
	key, err := ReadKey(path, passphrase)
	if err != nil {
		return err
	}
	if !key.PublicKey.Equal(pub) {
		return fmt.Errorf("%s.key does not belong to %s.crt: %w", stem, stem, errs.Invalid)
	}
	i.Key = key
	return nil
}

// ReadKey reads a key file as EncodeKey makes it, which only its owner may read.
func ReadKey(path string, passphrase []byte) (*ecdsa.PrivateKey, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: mode %04o lets others read it (want 0600): %w", filepath.Base(path), st.Mode().Perm(), errs.Denied)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := DecodeKey(data, passphrase)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return key, nil
}

// readURI returns "" when there is no such file.
func readURI(path string) (string, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	line, rest, _ := bytes.Cut(data, []byte("\n"))
	if len(line) == 0 || len(line) > maxKeyURI || len(rest) > 0 {
		return "", fmt.Errorf("want one line of at most %d bytes: %w", maxKeyURI, errs.Invalid)
	}
	return string(line), nil
}

// elsewhere is a key that is opened when it is first used.
type elsewhere struct {
	public *ecdsa.PublicKey
	open   func() (crypto.Signer, error)
}

func (e *elsewhere) Public() crypto.PublicKey { return e.public }

func (e *elsewhere) Sign(rnd io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k, err := e.open()
	if err != nil {
		return nil, err
	}
	return k.Sign(rnd, digest, opts)
}

func openMatching(uri string, want *ecdsa.PublicKey, open KeyOpener) (crypto.Signer, error) {
	if open == nil {
		return nil, fmt.Errorf("nothing here opens keys in tokens: %w", errs.Unsupported)
	}
	k, err := open(uri)
	if err != nil {
		return nil, fmt.Errorf("open key: %w", err)
	}
	if pub, err := publicP256(k); err != nil || !pub.Equal(want) {
		return nil, fmt.Errorf("the key at its place is another one: %w", errs.Invalid)
	}
	return k, nil
}

// Roots returns what a verifier of one purpose needs to trust this authority:
// the issuing CA and the TSA themselves, each under its subject's name, and the
// log. The root is not in it; a CA that it issues tomorrow is trusted when a
// policy says so, not before. Without a CA for the purpose nothing verifies.
func (a *Authority) Roots(p Purpose) TrustRoots {
	r := TrustRoots{TSAs: append([]Anchor{{Name: a.TSA.Cert.Subject.CommonName, Cert: a.TSA.Cert}}, a.OtherTSAs...)}
	if i := a.Issuers[p]; i != nil {
		r.CAs = []Anchor{{Name: i.Cert.Subject.CommonName, Cert: i.Cert}}
	}
	if a.Log != nil && p.logged() {
		r.Logs = []LogAnchor{*a.Log}
	}
	return r
}

// NewSigner issues a leaf for a key that exists only in memory. Its timestamps
// come from the authority's own TSA; set Stamper for another one, and Log for
// the log that the signatures go to.
func (a *Authority) NewSigner(r LeafRequest) (*Signer, error) {
	i := a.Issuers[r.Purpose]
	if i == nil || i.Key == nil {
		return nil, fmt.Errorf("new signer: the key of the %v CA is not here: %w", r.Purpose, errs.NotFound)
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
	validFor := func(c *x509.Certificate) map[string]string {
		return map[string]string{"start": c.NotBefore.UTC().Format(time.RFC3339), "end": c.NotAfter.UTC().Format(time.RFC3339)}
	}
	list := func(anchors []Anchor) []authority {
		var out []authority
		for _, anchor := range anchors {
			chain := []cert{{anchor.Cert.Raw}}
			if issuedBy(anchor.Cert, a.Root.Cert, anchor.Cert.NotBefore) == nil {
				chain = append(chain, cert{a.Root.Cert.Raw})
			}
			out = append(out, authority{
				Subject: map[string]string{"commonName": anchor.Name, "organization": anchor.Name},
				URI:     "urn:ringwall:anchor", Valid: validFor(anchor.Cert),
				Chain: map[string][]cert{"certificates": chain},
			})
		}
		return out
	}
	doc := map[string]any{
		"mediaType":              "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
		"certificateAuthorities": list(r.CAs),
		"timestampAuthorities":   list(r.TSAs),
	}
	if a.Log != nil {
		log, err := a.Log.sigstore(validFor(a.Root.Cert))
		if err != nil {
			return nil, fmt.Errorf("encode trusted root: %w", err)
		}
		doc["tlogs"] = []any{log}
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode trusted root: %w", err)
	}
	return b, nil
}
