//go:build !pkcs11

package keystore

import (
	"crypto"
	"fmt"

	"ringwall/internal/errs"
)

func noTokens() error {
	return fmt.Errorf("this ringwall was built without PKCS#11; `./build --pkcs11` makes one that has it, ringwall-pkcs11: %w", errs.Unsupported)
}

func openToken(*URI, []byte) (crypto.Signer, error) { return nil, noTokens() }

func generateInToken(*URI, []byte) (crypto.Signer, error) { return nil, noTokens() }
