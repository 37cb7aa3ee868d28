package kernelsig

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"

	"ringwall/internal/errs"
)

func oidIndirectData() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}
}

// maxChain is how many certificates may lie between signer and db, both included.
const maxChain = 6

// ImageVerdict is why firmware would start an image.
type ImageVerdict struct {
	Hash [32]byte // the image's Authenticode digest
	// Signer and Anchor are the certificate that signed it and the one of db
	// that this was traced to (possibly the same); nil: db lists the hash.
	Signer, Anchor *x509.Certificate
}

// VerifyImage says whether firmware with these signature databases would start
// an EFI image: its hash is in db, or one of its signatures is by a certificate
// that db lists or that leads to one. The hash, or a certificate of any of its
// signatures' chains, in dbx refuses it, whatever else is true. What is not
// understood refuses it too (fails closed), which is stricter than firmware:
// SHA-1, an extended key usage without codeSigning, a chain through anything but
// CAs. Validity in time is not looked at, as in firmware. SBAT is a question of
// its own: CheckSBAT. A database that is nil is empty.
func VerifyImage(image []byte, db, dbx *SignatureDB) (*ImageVerdict, error) {
	m, err := ParseImage(image)
	if err != nil {
		return nil, err
	}
	v, err := m.Verify(db, dbx)
	if err != nil {
		return nil, fmt.Errorf("EFI image: %w", err)
	}
	return v, nil
}

// Verify is VerifyImage for an image that is parsed already.
func (m *Image) Verify(db, dbx *SignatureDB) (*ImageVerdict, error) {
	if db == nil {
		db = &SignatureDB{}
	}
	if dbx == nil {
		dbx = &SignatureDB{}
	}
	v := &ImageVerdict{Hash: m.Hash()}
	if dbx.Hashes[v.Hash] {
		return nil, fmt.Errorf("its hash %x is in dbx: %w", v.Hash, errs.Untrusted)
	}
	var problems []error
	for i, der := range m.Signatures {
		cms, err := ParseCMS(der)
		if err == nil {
			var signer, anchor *x509.Certificate
			signer, anchor, err = m.checkSignature(cms, db)
			if revoked := dbx.revokes(append(cms.Certificates, signer, anchor)); revoked != nil {
				return nil, fmt.Errorf("signature %d: %w", i+1, revoked)
			}
			if err == nil && v.Signer == nil {
				v.Signer, v.Anchor = signer, anchor
			}
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("signature %d: %w", i+1, err))
		}
	}
	switch {
	case v.Signer != nil || db.Hashes[v.Hash]:
		return v, nil
	case len(problems) > 0:
		return nil, errors.Join(problems...)
	}
	return nil, fmt.Errorf("it is not signed and its hash %x is not in db: %w", v.Hash, errs.Untrusted)
}

// revokes is an error if one of the certificates is listed, or was issued by one
// that is.
func (db *SignatureDB) revokes(certificates []*x509.Certificate) error {
	for _, c := range certificates {
		if c == nil {
			continue
		}
		if chain, err := db.trace(c, nil); err == nil {
			return fmt.Errorf("certificate %q is in dbx: %w", chain[len(chain)-1].Subject.CommonName, errs.Untrusted)
		}
	}
	return nil
}

// checkSignature checks one CMS and returns who signed and which certificate
// of db that leads to.
func (m *Image) checkSignature(s *SignedData, db *SignatureDB) (signer, anchor *x509.Certificate, err error) {
	if !s.ContentType.Equal(oidIndirectData()) || s.Content == nil || len(s.signers) != 1 {
		return nil, nil, fmt.Errorf("it is no Authenticode signature: %w", errs.Untrusted)
	}
	if err := m.checkContent(s.Content); err != nil {
		return nil, nil, err
	}
	g := &s.signers[0]
	if g.attributes == nil {
		return nil, nil, fmt.Errorf("no signed attributes: %w", errs.Untrusted)
	}
	err = fmt.Errorf("the signer's certificate is not there: %w", errs.Untrusted)
	for _, c := range slices.Concat(db.Certificates, s.Certificates) {
		if !g.by(c) {
			continue
		}
		if err = CheckSigner(c); err != nil {
			continue
		}
		if err = g.verify(c, s.ContentType, s.Content); err != nil {
			continue
		}
		var chain []*x509.Certificate
		if chain, err = db.trace(c, s.Certificates); err == nil {
			return c, chain[len(chain)-1], nil
		}
	}
	return nil, nil, err
}

// trimPadding cuts the zeros that round a table's entry up to a multiple of
// eight and are sometimes counted in.
func trimPadding(der []byte) []byte {
	var raw asn1.RawValue
	rest, err := asn1.Unmarshal(der, &raw)
	if err != nil || len(rest) >= 8 || len(bytes.Trim(rest, "\x00")) > 0 {
		return der
	}
	return raw.FullBytes
}

// checkContent compares the digest in SpcIndirectDataContent with the image's.
func (m *Image) checkContent(content []byte) error {
	var data asn1.RawValue
	rest, err := asn1.Unmarshal(content, &data)
	if err != nil {
		return fmt.Errorf("signed content: %w: %w", err, errs.Invalid)
	}
	var digest struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
	if err := unmarshal(rest, &digest); err != nil {
		return fmt.Errorf("signed content: %w", err)
	}
	var h crypto.Hash
	switch digest.Algorithm.Algorithm.String() {
	case "2.16.840.1.101.3.4.2.1":
		h = crypto.SHA256
	case "2.16.840.1.101.3.4.2.2":
		h = crypto.SHA384
	case "2.16.840.1.101.3.4.2.3":
		h = crypto.SHA512
	default:
		return fmt.Errorf("digest algorithm %v: %w", digest.Algorithm.Algorithm, errs.Unsupported)
	}
	s := h.New()
	m.hashTo(s)
	if !bytes.Equal(s.Sum(nil), digest.Digest) {
		return fmt.Errorf("the signature is over another image (%x): %w", digest.Digest, errs.Untrusted)
	}
	return nil
}

// trace leads from a signer's certificate to one that the database lists, by
// way of others from the CMS: the shortest chain, the listed one last. Every
// issuer must be a CA and its key must have signed the one before. Each
// certificate is looked at once, so that what is made to be ambiguous costs no
// more than what is not.
func (db *SignatureDB) trace(signer *x509.Certificate, more []*x509.Certificate) ([]*x509.Certificate, error) {
	chains := [][]*x509.Certificate{{signer}}
	used := make([]bool, len(more))
	for len(chains) > 0 {
		chain := chains[0]
		chains = chains[1:]
		last := chain[len(chain)-1]
		if db.hasCertificate(last) {
			return chain, nil
		}
		for _, c := range db.Certificates {
			if issued(last, c) {
				return append(slices.Clip(chain), c), nil
			}
		}
		for i, c := range more {
			if !used[i] && len(chain) < maxChain-1 && issued(last, c) {
				used[i] = true
				chains = append(chains, append(slices.Clip(chain), c))
			}
		}
	}
	return nil, fmt.Errorf("certificate %q leads to none in db: %w", signer.Subject.CommonName, errs.Untrusted)
}

func issued(c, by *x509.Certificate) bool {
	return bytes.Equal(by.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(by) == nil
}
