package attest

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"
	"time"
)

func oidSAN() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 5, 29, 17} }

// Names of the TCG's arc (TCG EK Credential Profile, section 3): the key usage
// of EK certificates and the three attributes in their alternative name.
func tcg(tail ...int) asn1.ObjectIdentifier {
	return append(asn1.ObjectIdentifier{2, 23, 133}, tail...)
}

const (
	maxEKCertificate = 8 << 10
	maxIntermediates = 6
	tagDirectoryName = 4
)

// Chip is what an EK certificate says of its TPM. Manufacturer and version are
// "id:" and hexadecimal digits, as the certificate spells them.
type Chip struct {
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Version      string `json:"version"`
}

// EKCertificate is a parsed certificate; Verify decides whether to believe it.
type EKCertificate struct {
	Chip Chip
	cert *x509.Certificate
}

// ParseEKCertificate reads a certificate as a TPM's NV holds it: DER, possibly
// followed by padding of zeros or ones.
//
// The alternative name is read here. Go's verifier does not know names of the
// directory kind and refuses every EK certificate because the extension is
// critical, so what was read here is taken off its list of the unknown.
func ParseEKCertificate(nv []byte) (*EKCertificate, error) {
	if len(nv) > maxEKCertificate {
		return nil, tooLarge("EK certificate of %d bytes (at most %d)", len(nv), maxEKCertificate)
	}
	var raw asn1.RawValue
	rest, err := asn1.Unmarshal(nv, &raw)
	if err != nil {
		return nil, malformed("EK certificate: %v", err)
	}
	if len(rest) > 0 && !allZero(rest) && !allOnes(rest) {
		return nil, malformed("EK certificate: %d bytes follow it", len(rest))
	}
	cert, err := x509.ParseCertificate(raw.FullBytes)
	if err != nil {
		return nil, malformed("EK certificate: %v", err)
	}
	c := &EKCertificate{cert: cert}
	for _, x := range cert.Extensions {
		if !x.Id.Equal(oidSAN()) {
			continue
		}
		if c.Chip, err = parseChip(x.Value); err != nil {
			return nil, err
		}
	}
	if c.Chip.Manufacturer == "" {
		return nil, malformed("EK certificate: no TPM manufacturer in its alternative name")
	}
	cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions, func(o asn1.ObjectIdentifier) bool { return o.Equal(oidSAN()) })
	return c, nil
}

func allOnes(b []byte) bool {
	for _, x := range b {
		if x != 0xff {
			return false
		}
	}
	return true
}

// parseChip reads GeneralNames with one directoryName that holds the three
// attributes. Other kinds of names may stand beside it (a permanent identifier
// of the platform's does) and say nothing here.
func parseChip(der []byte) (Chip, error) {
	var c Chip
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil || len(rest) > 0 {
		return c, malformed("EK certificate: alternative name")
	}
	seen := false
	for _, n := range names {
		if n.Class != asn1.ClassContextSpecific || n.Tag != tagDirectoryName {
			continue
		}
		var rdns pkix.RDNSequence
		if rest, err := asn1.Unmarshal(n.Bytes, &rdns); err != nil || len(rest) > 0 || seen {
			return c, malformed("EK certificate: directory name, or a second one")
		}
		seen = true
		for _, rdn := range rdns {
			for _, a := range rdn {
				text, _ := a.Value.(string)
				for i, field := range []*string{&c.Manufacturer, &c.Model, &c.Version} {
					if !a.Type.Equal(tcg(2, i+1)) {
						continue
					}
					if text == "" || *field != "" {
						return c, malformed("EK certificate: attribute %v is empty or repeated", a.Type)
					}
					*field = text
				}
			}
		}
	}
	return c, nil
}

// Verify decides whether one of the roots vouches for the key: the certificate
// is for this very key, says that it is for an endorsement key, is no CA's and
// chains up. intermediates come from the host and prove nothing by themselves.
func (c *EKCertificate) Verify(ek *EK, roots, intermediates []*x509.Certificate, now time.Time) error {
	if len(intermediates) > maxIntermediates {
		return tooLarge("%d intermediate certificates (at most %d)", len(intermediates), maxIntermediates)
	}
	spki, err := x509.MarshalPKIXPublicKey(ek.Key)
	if err != nil || !bytes.Equal(spki, c.cert.RawSubjectPublicKeyInfo) {
		return refuse(ReasonEKCertificate, "it is for another key")
	}
	if c.cert.IsCA {
		return refuse(ReasonEKCertificate, "it is a CA's")
	}
	if !slices.ContainsFunc(c.cert.UnknownExtKeyUsage, func(o asn1.ObjectIdentifier) bool { return o.Equal(tcg(8, 1)) }) {
		return refuse(ReasonEKCertificate, "it does not say that it is for an endorsement key")
	}
	pool := func(certs []*x509.Certificate) *x509.CertPool {
		p := x509.NewCertPool()
		for _, cert := range certs {
			p.AddCert(cert)
		}
		return p
	}
	_, err = c.cert.Verify(x509.VerifyOptions{
		Roots: pool(roots), Intermediates: pool(intermediates), CurrentTime: now,
		// the usage was checked above; CAs of TPM vendors rarely name it
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return refuse(ReasonEKTrust, "certificate from %.80q: %v", c.cert.Issuer, err)
	}
	return nil
}

// Basis is why an endorsement key is believed to be one.
type Basis string

// The bases, in the order in which they are tried.
const (
	BasisVTPMCA    Basis = "vtpm-ca"   // our own CA for virtual TPMs
	BasisVendorCA  Basis = "vendor-ca" // a TPM vendor's CA
	BasisAllowList Basis = "allow-list"
	BasisJoinToken Basis = "join-token" // nobody vouches for the TPM; whoever joined had a token of the fleet
	BasisFirstUse  Basis = "first-use"  // seen first in an open window and approved by a person
)

// EKPolicy says whose endorsement keys are believed. The zero EKPolicy
// believes nobody.
type EKPolicy struct {
	VTPMCAs   []*x509.Certificate
	VendorCAs []*x509.Certificate
	Allowed   []HostID // from purchase or inventory data
	Denied    []HostID // beats everything
	// FirstUseUntil: until then an unknown key may enrol, if a person approves
	// it (Approved). The zero time: never.
	FirstUseUntil time.Time
	Approved      []HostID
	// JoinToken: a host that joined the fleet with a token is enough. It then is
	// the same TPM from that day on, and nothing says that it is a real one.
	JoinToken bool
}

// Trust decides whether a host's endorsement key is believed, and why. cert
// may be nil, for TPMs without one. ReasonEKPending means that a person has to
// approve the key first; every other error is a refusal.
func (p *EKPolicy) Trust(ek *EK, cert *EKCertificate, intermediates []*x509.Certificate, now time.Time) (Basis, error) {
	id := ek.ID()
	if slices.Contains(p.Denied, id) {
		return "", refuse(ReasonEKTrust, "the policy denies this key")
	}
	why := refuse(ReasonEKTrust, "no certificate, and nobody else vouches for the key")
	if cert != nil {
		why = refuse(ReasonEKTrust, "no certificate authority is trusted")
		for _, ca := range []struct {
			basis Basis
			roots []*x509.Certificate
		}{{BasisVTPMCA, p.VTPMCAs}, {BasisVendorCA, p.VendorCAs}} {
			if len(ca.roots) == 0 {
				continue
			}
			err := cert.Verify(ek, ca.roots, intermediates, now)
			if err == nil {
				return ca.basis, nil
			}
			why = err
		}
		// a certificate that belongs to another key is an attempt, not a lack
		if ReasonOf(why) == ReasonEKCertificate {
			return "", why
		}
	}
	switch {
	case slices.Contains(p.Allowed, id):
		return BasisAllowList, nil
	case p.JoinToken:
		return BasisJoinToken, nil
	case !now.Before(p.FirstUseUntil):
		return "", why
	case slices.Contains(p.Approved, id):
		return BasisFirstUse, nil
	}
	return "", refuse(ReasonEKPending, "key %s waits for a person's approval", id)
}
