//go:build !pkcs11

package keystore_test

import (
	"errors"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/keystore"
)

func TestOpen_withoutPKCS11(t *testing.T) {
	_, err := keystore.Open("pkcs11:token=a;object=b?module-path=/m.so", []byte("1234"))
	if !errors.Is(err, errs.Unsupported) || !strings.Contains(err.Error(), "./build --pkcs11") {
		t.Errorf("%v: want unsupported, and how to get it", err)
	}
}
