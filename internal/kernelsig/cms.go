package kernelsig

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"

	"ringwall/internal/errs"
)

func oidSignedData() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2} }

func oidData() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1} }

func oidSHA256() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
}
func oidRSA() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1} }
func oidECDSASHA256() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
}

// RFC 5652, section 5, as far as the kernel's parser wants it.
type (
	issuerAndSerial struct {
		Issuer asn1.RawValue
		Serial *big.Int
	}
	signerInfo struct {
		Version   int
		SID       asn1.RawValue
		Digest    pkix.AlgorithmIdentifier
		Signed    asn1.RawValue `asn1:"optional,tag:0"`
		Algorithm pkix.AlgorithmIdentifier
		Signature []byte
		Unsigned  asn1.RawValue `asn1:"optional,tag:1"`
	}
	signedData struct {
		Version      int
		Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      contentInfo
		Certificates asn1.RawValue `asn1:"optional,tag:0"`
		CRLs         asn1.RawValue `asn1:"optional,tag:1"`
		Signers      []signerInfo  `asn1:"set"`
	}
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"explicit,optional,tag:0"`
	}
)

// SignDetached signs content with SHA-256 and returns the CMS that the kernel's
// PKCS#7 parser takes: no attributes, no certificates, the signer named by
// issuer and serial number. With an RSA key the bytes are those of OpenSSL's
// PKCS7_sign with NOATTR and NOCERTS, which fsverity-utils and the kernel's
// sign-file use.
func SignDetached(key crypto.Signer, cert *x509.Certificate, content []byte) ([]byte, error) {
	b, err := signCMS(key, cert, content, false)
	if err != nil {
		return nil, fmt.Errorf("sign CMS: %w", err)
	}
	return b, nil
}

// SignAttached is SignDetached with the content inside.
func SignAttached(key crypto.Signer, cert *x509.Certificate, content []byte) ([]byte, error) {
	b, err := signCMS(key, cert, content, true)
	if err != nil {
		return nil, fmt.Errorf("sign CMS: %w", err)
	}
	return b, nil
}

func signCMS(key crypto.Signer, cert *x509.Certificate, content []byte, attached bool) ([]byte, error) {
	sum := sha256.Sum256(content)
	sig, err := signDigest(key, cert, sum[:])
	if err != nil {
		return nil, err
	}
	sha := pkix.AlgorithmIdentifier{Algorithm: oidSHA256(), Parameters: asn1.NullRawValue}
	algorithm := pkix.AlgorithmIdentifier{Algorithm: oidECDSASHA256()}
	if _, ok := cert.PublicKey.(*rsa.PublicKey); ok {
		algorithm = pkix.AlgorithmIdentifier{Algorithm: oidRSA(), Parameters: asn1.NullRawValue}
	}
	sid, err := asn1.Marshal(issuerAndSerial{asn1.RawValue{FullBytes: cert.RawIssuer}, cert.SerialNumber})
	if err != nil {
		return nil, err
	}
	s := signedData{
		Version: 1, Digests: []pkix.AlgorithmIdentifier{sha}, Content: contentInfo{Type: oidData()},
		Signers: []signerInfo{{Version: 1, SID: asn1.RawValue{FullBytes: sid}, Digest: sha, Algorithm: algorithm, Signature: sig}},
	}
	if attached {
		if s.Content.Content, err = explicit(content); err != nil {
			return nil, err
		}
	}
	der, err := asn1.Marshal(s)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(contentInfo{oidSignedData(), asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: der}})
}

// explicit is [0] EXPLICIT OCTET STRING.
func explicit(content []byte) (asn1.RawValue, error) {
	b, err := asn1.Marshal(content)
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: b}, err
}

// signDigest signs a SHA-256 with a key that belongs to cert.
func signDigest(key crypto.Signer, cert *x509.Certificate, digest []byte) ([]byte, error) {
	pub, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(key.Public()) {
		return nil, fmt.Errorf("the key is not that of certificate %q: %w", cert.Subject.CommonName, errs.Invalid)
	}
	if err := CheckSigner(cert); err != nil {
		return nil, err
	}
	sig, err := key.Sign(rand.Reader, digest, crypto.SHA256)
	if err != nil {
		return nil, err
	}
	// a signature that does not verify, from a token with a fault, must not leave
	return sig, verifyDigest(cert, crypto.SHA256, keyAlgorithm(cert), digest, sig)
}

// minRSA is the shortest RSA key that is believed, in bits.
const minRSA = 2048

// CheckSigner says whether a certificate may sign code at all: it is an RSA key
// of at least 2048 bits or an ECDSA key; if it has key usages, digitalSignature
// is among them; if it has extended key usages, codeSigning is among them. The
// kernel and most firmware look at none of this; the keys that Debian's kernels
// are built with have no extended key usage. Validity in time is not looked at,
// as the kernel and firmware do not.
func CheckSigner(c *x509.Certificate) error {
	bad := func(s string) error {
		return fmt.Errorf("certificate %q: %s: %w", c.Subject.CommonName, s, errs.Untrusted)
	}
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() < minRSA {
			return bad(fmt.Sprintf("RSA key of %d bits", k.N.BitLen()))
		}
	case *ecdsa.PublicKey:
	default:
		return bad("its key is neither RSA nor ECDSA")
	}
	if c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return bad("key usage is not digitalSignature")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
		return nil
	}
	if slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) {
		return nil
	}
	return bad("extended key usage lacks codeSigning")
}

// keyIDTail is how IMA names a key: the last four bytes of the certificate's
// subject key identifier, whatever that was computed from.
func keyIDTail(c *x509.Certificate) ([]byte, error) {
	if len(c.SubjectKeyId) < 4 {
		return nil, fmt.Errorf("certificate %q has no subject key identifier: %w", c.Subject.CommonName, errs.Invalid)
	}
	return bytes.Clone(c.SubjectKeyId[len(c.SubjectKeyId)-4:]), nil
}
