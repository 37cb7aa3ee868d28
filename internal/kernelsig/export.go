package kernelsig

import (
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// FSVeritySignature signs a file's fs-verity digest (SHA-256) for
// FS_IOC_ENABLE_VERITY, as `fsverity sign` does: a detached CMS over struct
// fsverity_formatted_digest (the kernel's filesystems/fsverity, "Built-in
// signature verification").
func FSVeritySignature(key crypto.Signer, cert *x509.Certificate, digest [32]byte) ([]byte, error) {
	b, err := SignDetached(key, cert, formattedDigest(digest))
	if err != nil {
		return nil, fmt.Errorf("fs-verity signature: %w", err)
	}
	return b, nil
}

// VerifyFSVerity checks what FSVeritySignature made.
func VerifyFSVerity(cms []byte, digest [32]byte, trusted []*x509.Certificate) (*x509.Certificate, error) {
	c, err := VerifyDetached(cms, formattedDigest(digest), trusted)
	if err != nil {
		return nil, fmt.Errorf("fs-verity signature: %w", err)
	}
	return c, nil
}

func formattedDigest(digest [32]byte) []byte {
	b := []byte("FSVerity")
	b = binary.LittleEndian.AppendUint16(b, 1) // FS_VERITY_HASH_ALG_SHA256
	b = binary.LittleEndian.AppendUint16(b, uint16(len(digest)))
	return append(b, digest[:]...)
}

// RootHashSignature signs a dm-verity root hash for the target's option
// root_hash_sig_key_desc and `veritysetup --root-hash-signature`: a detached CMS
// over the hash in lower-case hex, without a line end.
func RootHashSignature(key crypto.Signer, cert *x509.Certificate, root [32]byte) ([]byte, error) {
	b, err := SignDetached(key, cert, []byte(hex.EncodeToString(root[:])))
	if err != nil {
		return nil, fmt.Errorf("root hash signature: %w", err)
	}
	return b, nil
}

// VerifyRootHash checks what RootHashSignature made.
func VerifyRootHash(cms []byte, root [32]byte, trusted []*x509.Certificate) (*x509.Certificate, error) {
	c, err := VerifyDetached(cms, []byte(hex.EncodeToString(root[:])), trusted)
	if err != nil {
		return nil, fmt.Errorf("root hash signature: %w", err)
	}
	return c, nil
}
