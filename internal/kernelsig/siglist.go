package kernelsig

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"fmt"

	"ringwall/internal/errs"
)

// SignatureDB is the content of the UEFI variable db or dbx: what firmware
// allows, or refuses whatever else says so (UEFI specification 2.10, 32.4.1).
// The zero value is an empty one.
type SignatureDB struct {
	Certificates []*x509.Certificate
	Hashes       map[[32]byte]bool // Authenticode SHA-256 of images
	// tbs are digests of certificates' signed part, by the hash's name. They
	// come with a time from which on they count, which is not looked at:
	// refused is refused (fails closed).
	tbs map[crypto.Hash]map[string]bool
}

const (
	maxSignatureDB = 4 << 20
	listHead       = 28
	ownerSize      = 16
)

// The types of entries, as GUIDs are in memory.
const (
	guidX509       = "\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72"
	guidSHA256     = "\x26\x16\xc4\xc1\x4c\x50\x92\x40\xac\xa9\x41\xf9\x36\x93\x43\x28"
	guidX509SHA256 = "\x92\xa4\xd2\x3b\xc0\x96\x79\x40\xb4\x20\xfc\xf9\x8e\xf1\x03\xed"
	guidX509SHA384 = "\x6e\x87\x76\x70\xc2\x80\xe6\x4e\xaa\xd2\x28\xb3\x49\xa6\x86\x5b"
	guidX509SHA512 = "\x63\xbf\x6d\x44\x02\x25\xda\x4c\xbc\xfa\x24\x65\xd2\xb0\xfe\x9d"
)

// ParseSignatureLists reads EFI_SIGNATURE_LISTs one after the other, as in an
// .esl file. A file of efivarfs has four bytes of attributes before that. An
// entry of a type that is not read is errs.Unsupported: left out of dbx it would
// allow what firmware refuses.
func ParseSignatureLists(b []byte) (*SignatureDB, error) {
	db := &SignatureDB{Hashes: map[[32]byte]bool{}, tbs: map[crypto.Hash]map[string]bool{}}
	if len(b) > maxSignatureDB {
		return nil, fmt.Errorf("signature lists: %d bytes (at most %d): %w", len(b), maxSignatureDB, errs.Invalid)
	}
	for len(b) > 0 {
		if len(b) < listHead {
			return nil, fmt.Errorf("signature lists: cut: %w", errs.Invalid)
		}
		le := binary.LittleEndian
		size, head, entry := uint64(le.Uint32(b[16:])), uint64(le.Uint32(b[20:])), uint64(le.Uint32(b[24:]))
		if size < listHead || size > uint64(len(b)) || head > size-listHead || entry <= ownerSize || (size-listHead-head)%entry != 0 {
			return nil, fmt.Errorf("signature lists: list of %d bytes in %d, entries of %d: %w", size, len(b), entry, errs.Invalid)
		}
		for e := b[listHead+head : size]; len(e) > 0; e = e[entry:] {
			if err := db.add(string(b[:16]), e[ownerSize:entry]); err != nil {
				return nil, fmt.Errorf("signature lists: %w", err)
			}
		}
		b = b[size:]
	}
	return db, nil
}

func (db *SignatureDB) add(guid string, e []byte) error {
	revoke := func(h crypto.Hash) error {
		if len(e) != h.Size()+16 { // EFI_TIME
			return fmt.Errorf("entry of %d bytes: %w", len(e), errs.Invalid)
		}
		if db.tbs[h] == nil {
			db.tbs[h] = map[string]bool{}
		}
		db.tbs[h][string(e[:h.Size()])] = true
		return nil
	}
	switch guid {
	case guidX509:
		c, err := x509.ParseCertificate(e)
		if err != nil {
			return fmt.Errorf("certificate: %w: %w", err, errs.Invalid)
		}
		db.Certificates = append(db.Certificates, c)
		return nil
	case guidSHA256:
		if len(e) != 32 {
			return fmt.Errorf("SHA-256 of %d bytes: %w", len(e), errs.Invalid)
		}
		db.Hashes[[32]byte(e)] = true
		return nil
	case guidX509SHA256:
		return revoke(crypto.SHA256)
	case guidX509SHA384:
		return revoke(crypto.SHA384)
	case guidX509SHA512:
		return revoke(crypto.SHA512)
	}
	return fmt.Errorf("entry of type %x: %w", guid, errs.Unsupported)
}

// hasCertificate says whether a certificate is listed, itself or by digest.
func (db *SignatureDB) hasCertificate(c *x509.Certificate) bool {
	for _, o := range db.Certificates {
		if bytes.Equal(o.Raw, c.Raw) {
			return true
		}
	}
	for h, set := range db.tbs {
		if set[string(sum(h, c.RawTBSCertificate))] {
			return true
		}
	}
	return false
}
