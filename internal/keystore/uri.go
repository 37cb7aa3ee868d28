package keystore

import (
	"fmt"
	"net/url"
	"strings"

	"ringwall/internal/errs"
)

// URI is a PKCS#11 URI (RFC 7512), as far as a private key needs it. Empty
// fields match anything.
type URI struct {
	Token, Manufacturer, Model, Serial string // of the token
	Object                             string // the key's label
	ID                                 []byte // the key's id
	ModulePath                         string
	PINSource                          string
}

// ParseURI reads a PKCS#11 URI. An attribute that it does not know is an error,
// since leaving it out would match more; pin-value is refused, since a URI is
// seen in files, logs and lists of processes.
func ParseURI(s string) (*URI, error) {
	bad := func(format string, a ...any) (*URI, error) {
		return nil, fmt.Errorf("PKCS#11 URI: %s: %w", fmt.Sprintf(format, a...), errs.Invalid)
	}
	rest, ok := strings.CutPrefix(s, schemePKCS11)
	if !ok || len(s) > maxURI {
		return bad("it does not begin with %s, or is longer than %d bytes", schemePKCS11, maxURI)
	}
	path, query, _ := strings.Cut(rest, "?")
	u := &URI{}
	var id string
	fields := map[string]*string{
		"token": &u.Token, "manufacturer": &u.Manufacturer, "model": &u.Model, "serial": &u.Serial,
		"object": &u.Object, "id": &id, "type": nil,
	}
	queries := map[string]*string{"module-path": &u.ModulePath, "pin-source": &u.PINSource}
	for _, part := range []struct {
		text, separator string
		known           map[string]*string
	}{{path, ";", fields}, {query, "&", queries}} {
		if part.text == "" {
			continue
		}
		seen := map[string]bool{}
		for attribute := range strings.SplitSeq(part.text, part.separator) {
			name, raw, found := strings.Cut(attribute, "=")
			value, err := url.PathUnescape(raw)
			to, known := part.known[name]
			switch {
			case name == "pin-value":
				return bad("pin-value would show the PIN to everybody; use pin-source=file:PATH")
			case !found || !known:
				return bad("attribute %.40q is not known", name)
			case err != nil || value == "" || strings.ContainsAny(value, "\x00\r\n") && name != "id":
				return bad("value of %s", name)
			case seen[name]:
				return bad("%s is repeated", name)
			case name == "type" && value != "private":
				return bad("type is %.20q, not private", value)
			}
			seen[name] = true
			if to != nil {
				*to = value
			}
		}
	}
	u.ID = []byte(id)
	if u.Object == "" && id == "" && u.Token == "" && u.Serial == "" {
		return bad("it names neither a token nor a key")
	}
	return u, nil
}

// String returns the URI in a form that ParseURI reads.
func (u *URI) String() string {
	var b strings.Builder
	add := func(separator *string, next, name, value string) {
		if value != "" {
			b.WriteString(*separator + name + "=" + escape(value))
			*separator = next
		}
	}
	separator := schemePKCS11
	add(&separator, ";", "token", u.Token)
	add(&separator, ";", "manufacturer", u.Manufacturer)
	add(&separator, ";", "model", u.Model)
	add(&separator, ";", "serial", u.Serial)
	add(&separator, ";", "object", u.Object)
	add(&separator, ";", "id", string(u.ID))
	separator = "?"
	add(&separator, "&", "module-path", u.ModulePath)
	add(&separator, "&", "pin-source", u.PINSource)
	return b.String()
}

// escape spells out what may not stand in an attribute (RFC 7512, 2.3).
func escape(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~:/", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
