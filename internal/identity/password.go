package identity

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"

	"ringwall/internal/errs"
)

// What new passwords are hashed with: argon2id, 64 MiB, 3 passes, 1 lane (RFC
// 9106, section 4, with fewer lanes, since the server is shared).
const (
	memory = 64 << 10 // KiB
	passes = 3
	lanes  = 1
	salt   = 16 // bytes
	length = 32 // bytes
)

// Bounds of passwords.
const (
	MinPassword = 12   // characters
	MaxPassword = 1024 // bytes
)

// HashPassword returns a password's hash in the usual form,
// $argon2id$v=19$m=…,t=…,p=…$SALT$HASH. One that is too short is errs.Invalid.
func HashPassword(password string) (string, error) {
	if utf8.RuneCountInString(password) < MinPassword || len(password) > MaxPassword || !utf8.ValidString(password) {
		return "", fmt.Errorf("a password has %d characters or more, and at most %d bytes of UTF-8: %w", MinPassword, MaxPassword, errs.Invalid)
	}
	b := make([]byte, salt)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	h := hash{memory: memory, passes: passes, lanes: lanes, salt: b}
	h.sum = h.of(password, length)
	return h.String(), nil
}

// hash is a parsed one.
type hash struct {
	memory, passes uint32
	lanes          uint8
	salt, sum      []byte
}

func (h *hash) of(password string, n uint32) []byte {
	return argon2.IDKey([]byte(password), h.salt, h.passes, h.memory, h.lanes, n)
}

func (h *hash) String() string {
	e := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, h.memory, h.passes, h.lanes, e.EncodeToString(h.salt), e.EncodeToString(h.sum))
}

// CheckHash refuses a hash that is none, that is too cheap to guess (OWASP's
// minimum of 19 MiB and 2 passes), or so dear that checking it hurts the
// server. The error is errs.Invalid and does not show the hash.
func CheckHash(s string) error {
	_, err := parseHash(s)
	return err
}

func parseHash(s string) (*hash, error) {
	bad := fmt.Errorf("a password's hash is $argon2id$v=19$m=19456…262144,t=2…10,p=1…4$SALT$HASH: %w", errs.Invalid)
	parts := strings.Split(s, "$")
	if len(s) > 512 || len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" {
		return nil, bad
	}
	var h hash
	var version int
	if n, err := fmt.Sscanf(parts[2]+" "+parts[3], "v=%d m=%d,t=%d,p=%d", &version, &h.memory, &h.passes, &h.lanes); err != nil || n != 4 {
		return nil, bad
	}
	var err1, err2 error
	h.salt, err1 = base64.RawStdEncoding.Strict().DecodeString(parts[4])
	h.sum, err2 = base64.RawStdEncoding.Strict().DecodeString(parts[5])
	switch {
	case err1 != nil || err2 != nil || version != argon2.Version,
		h.memory < 19<<10 || h.memory > 256<<10, h.passes < 2 || h.passes > 10, h.lanes < 1 || h.lanes > 4,
		len(h.salt) < 8 || len(h.salt) > 64, len(h.sum) < 16 || len(h.sum) > 64,
		h.String() != s: // there is one way to write it
		return nil, bad
	}
	return &h, nil
}

// VerifyPassword reports whether a password is the one of a hash. It fails
// closed, and takes as long for a hash that is none: nobody learns from the time
// who exists.
func VerifyPassword(of, password string) bool {
	h, err := parseHash(of)
	if err != nil {
		h = &hash{memory: memory, passes: passes, lanes: lanes, salt: make([]byte, salt), sum: make([]byte, length)}
	}
	if len(password) > MaxPassword {
		return false
	}
	same := subtle.ConstantTimeCompare(h.of(password, uint32(len(h.sum))), h.sum) == 1 //nolint:gosec // at most 64
	return same && err == nil
}
