//go:build pkcs11

package keystore

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"ringwall/internal/errs"
)

// oidP256 is secp256r1 as CKA_EC_PARAMS has it (RFC 5480, 2.1.1.1).
func oidP256() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7} }

// token is a session with a token in which the user is logged in. It is never
// closed: a crypto.Signer has no end but the process's.
type token struct {
	mu      sync.Mutex // a session does one thing at a time
	module  *pkcs11.Ctx
	session pkcs11.SessionHandle
}

// tokenKey is a private key that stays in its token.
type tokenKey struct {
	token  *token
	public *ecdsa.PublicKey
	handle pkcs11.ObjectHandle
}

func openToken(u *URI, pin []byte) (crypto.Signer, error) {
	t, err := login(u, pin, false)
	if err != nil {
		return nil, err
	}
	return t.key(u)
}

// login opens a session with the one token that the URI names.
func login(u *URI, pin []byte, write bool) (*token, error) {
	module := pkcs11.New(u.ModulePath)
	if module == nil {
		return nil, fmt.Errorf("%s is no PKCS#11 library: %w", u.ModulePath, errs.NotFound)
	}
	if err := module.Initialize(); err != nil && !isCode(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return nil, fmt.Errorf("initialise %s: %w", u.ModulePath, err)
	}
	slot, err := findSlot(module, u)
	if err != nil {
		return nil, err
	}
	flags := uint(pkcs11.CKF_SERIAL_SESSION)
	if write {
		flags |= pkcs11.CKF_RW_SESSION
	}
	s, err := module.OpenSession(slot, flags)
	if err != nil {
		return nil, fmt.Errorf("open session: %w", err)
	}
	err = module.Login(s, pkcs11.CKU_USER, string(pin))
	switch {
	case isCode(err, pkcs11.CKR_PIN_INCORRECT), isCode(err, pkcs11.CKR_PIN_LOCKED), isCode(err, pkcs11.CKR_PIN_LEN_RANGE):
		return nil, errors.Join(fmt.Errorf("log in: %w: %w", err, errs.Denied), module.CloseSession(s))
	case err != nil && !isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		return nil, errors.Join(fmt.Errorf("log in: %w", err), module.CloseSession(s))
	}
	return &token{module: module, session: s}, nil
}

func isCode(err error, code uint) bool {
	e, ok := errors.AsType[pkcs11.Error](err)
	return ok && uint(e) == code
}

func findSlot(module *pkcs11.Ctx, u *URI) (uint, error) {
	slots, err := module.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("list tokens: %w", err)
	}
	var found []uint
	for _, s := range slots {
		i, err := module.GetTokenInfo(s)
		if err != nil || i.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		matches := func(want, have string) bool { return want == "" || want == strings.TrimRight(have, " \x00") }
		if matches(u.Token, i.Label) && matches(u.Serial, i.SerialNumber) && matches(u.Model, i.Model) && matches(u.Manufacturer, i.ManufacturerID) {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return 0, fmt.Errorf("no such token: %w", errs.NotFound)
	}
	return 0, fmt.Errorf("%d tokens match; add token= or serial=: %w", len(found), errs.Conflict)
}

// key finds the one private key that the URI names, and its public half.
func (t *token) key(u *URI) (*tokenKey, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	private, err := t.find(u, pkcs11.CKO_PRIVATE_KEY)
	if err != nil {
		return nil, err
	}
	if len(private) != 1 {
		kind := errs.Conflict
		if len(private) == 0 {
			kind = errs.NotFound
		}
		return nil, fmt.Errorf("%d private keys match: %w", len(private), kind)
	}
	id, err := t.module.GetAttributeValue(t.session, private[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
	if err != nil {
		return nil, fmt.Errorf("read key's id: %w", err)
	}
	public, err := t.find(&URI{ID: id[0].Value, Object: u.Object}, pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return nil, err
	}
	if len(public) != 1 {
		return nil, fmt.Errorf("%d public keys belong to it (want 1, with the same id and label): %w", len(public), errs.NotFound)
	}
	pub, err := t.publicKey(public[0])
	if err != nil {
		return nil, err
	}
	return &tokenKey{token: t, public: pub, handle: private[0]}, nil
}

func (t *token) find(u *URI, class uint) ([]pkcs11.ObjectHandle, error) {
	want := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, class),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, uint(pkcs11.CKK_EC)),
	}
	if u.Object != "" {
		want = append(want, pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object))
	}
	if len(u.ID) > 0 {
		want = append(want, pkcs11.NewAttribute(pkcs11.CKA_ID, u.ID))
	}
	if err := t.module.FindObjectsInit(t.session, want); err != nil {
		return nil, fmt.Errorf("find key: %w", err)
	}
	found, _, err := t.module.FindObjects(t.session, 16)
	if err := errors.Join(err, t.module.FindObjectsFinal(t.session)); err != nil {
		return nil, fmt.Errorf("find key: %w", err)
	}
	return found, nil
}

func (t *token) publicKey(h pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	a, err := t.module.GetAttributeValue(t.session, h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, nil), pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil),
	})
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	var curve asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(a[0].Value, &curve); err != nil || len(rest) > 0 || !curve.Equal(oidP256()) {
		return nil, fmt.Errorf("the key is not on P-256: %w", errs.Invalid)
	}
	point := a[1].Value
	var inner []byte // PKCS#11 wants an OCTET STRING; some tokens give the point itself
	if rest, err := asn1.Unmarshal(point, &inner); err == nil && len(rest) == 0 {
		point = inner
	}
	k, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, fmt.Errorf("public key: %w: %w", err, errs.Invalid)
	}
	return k, nil
}

// Public implements crypto.Signer.
func (k *tokenKey) Public() crypto.PublicKey { return k.public }

// Sign implements crypto.Signer. The token's answer is verified: one that signs
// wrongly, or something else, is found here and not on a host.
func (k *tokenKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("sign in token: not a SHA-256 digest: %w", errs.Invalid)
	}
	k.token.mu.Lock()
	defer k.token.mu.Unlock()
	if err := k.token.module.SignInit(k.token.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, k.handle); err != nil {
		return nil, fmt.Errorf("sign in token: %w", err)
	}
	raw, err := k.token.module.Sign(k.token.session, digest)
	if err != nil {
		return nil, fmt.Errorf("sign in token: %w", err)
	}
	if len(raw) != 64 {
		return nil, fmt.Errorf("sign in token: signature of %d bytes: %w", len(raw), errs.Invalid)
	}
	sig, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
	if err != nil {
		return nil, fmt.Errorf("sign in token: %w", err)
	}
	if !ecdsa.VerifyASN1(k.public, digest, sig) {
		return nil, fmt.Errorf("sign in token: the token's signature does not verify: %w", errs.Untrusted)
	}
	return sig, nil
}

// generateInToken makes a key that cannot be extracted.
func generateInToken(u *URI, pin []byte) (crypto.Signer, error) {
	t, err := login(u, pin, true)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	taken, err := t.find(&URI{Object: u.Object}, pkcs11.CKO_PRIVATE_KEY)
	if err == nil && len(taken) > 0 {
		err = fmt.Errorf("there is a key of that name already: %w", errs.Conflict)
	}
	if err == nil {
		err = t.generate(u)
	}
	t.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return t.key(u)
}

func (t *token) generate(u *URI) error {
	id := u.ID
	if len(id) == 0 {
		id = make([]byte, 16)
		if _, err := rand.Read(id); err != nil {
			return err
		}
	}
	curve, err := asn1.Marshal(oidP256())
	if err != nil {
		return err
	}
	common := func(a ...*pkcs11.Attribute) []*pkcs11.Attribute {
		return append(a,
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object),
			pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	_, _, err = t.module.GenerateKeyPair(t.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		common(pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curve), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true)),
		common(pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false)))
	if err != nil {
		return fmt.Errorf("generate: %w", err)
	}
	return nil
}
