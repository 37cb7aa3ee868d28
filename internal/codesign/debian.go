package codesign

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Bounds of archive indices.
const (
	maxInRelease = 4 << 20
	maxStanza    = 1 << 20
	maxIndexFile = 200_000
)

// Suite is what an InRelease file says: what an archive vouches for.
type Suite struct {
	Origin, Suite, Codename string
	Date, ValidUntil        time.Time // ValidUntil is zero when the archive gives none
	Files                   map[string]IndexFile
	Signer                  string // fingerprint of the OpenPGP primary key, once verified
}

// IndexFile is an index that an InRelease file lists.
type IndexFile struct {
	Size   int64
	Digest integrity.Digest
}

// ParseSuite reads the text of an InRelease file whose signature has been
// verified; package archive does both.
func ParseSuite(text []byte) (*Suite, error) {
	s, err := parseSuite(text)
	if err != nil {
		return nil, fmt.Errorf("parse InRelease: %w", err)
	}
	return s, nil
}

func parseSuite(text []byte) (*Suite, error) {
	s := &Suite{}
	stanzas := 0
	err := eachStanza(bytes.NewReader(text), maxInRelease, func(f map[string]string) error {
		if stanzas++; stanzas > 1 {
			return fmt.Errorf("two stanzas: %w", errs.Invalid)
		}
		s.Origin, s.Suite, s.Codename = f["Origin"], f["Suite"], f["Codename"]
		var err error
		if s.Date, err = parseDate(f["Date"]); err != nil {
			return err
		}
		if v := f["Valid-Until"]; v != "" {
			if s.ValidUntil, err = parseDate(v); err != nil {
				return err
			}
		}
		s.Files, err = parseFiles(f["SHA256"])
		return err
	})
	if err != nil {
		return nil, err
	}
	if stanzas == 0 || (s.Suite == "" && s.Codename == "") {
		return nil, fmt.Errorf("no suite or code name: %w", errs.Invalid)
	}
	return s, nil
}

func parseDate(v string) (time.Time, error) {
	t, err := time.Parse(time.RFC1123, v)
	if err != nil || (!strings.HasSuffix(v, "UTC") && !strings.HasSuffix(v, "GMT")) {
		return time.Time{}, fmt.Errorf("date %.60q: %w", v, errs.Invalid)
	}
	return t.UTC(), nil
}

func parseFiles(v string) (map[string]IndexFile, error) {
	files := make(map[string]IndexFile)
	for line := range strings.Lines(v) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 3 || len(files) == maxIndexFile {
			return nil, fmt.Errorf("SHA256 line %.120q: %w", line, errs.Invalid)
		}
		d, err := integrity.ParseDigest(f[0])
		if err != nil {
			return nil, err
		}
		size, err := parseSize(f[1])
		if err != nil {
			return nil, err
		}
		name, err := CleanPath(f[2])
		if err != nil || name != f[2] {
			return nil, fmt.Errorf("SHA256 path %.120q: %w", f[2], errs.Invalid)
		}
		if _, dup := files[name]; dup {
			return nil, fmt.Errorf("SHA256 lists %q twice: %w", name, errs.Invalid)
		}
		files[name] = IndexFile{Size: size, Digest: d}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no SHA256 entries: %w", errs.Invalid)
	}
	return files, nil
}

func parseSize(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 62)
	if err != nil {
		return 0, fmt.Errorf("size %.40q: %w", s, errs.Invalid)
	}
	return int64(n), nil
}

// Package is one entry of a Packages index.
type Package struct {
	Package, Version, Architecture, Filename string
	Size                                     int64
	Digest                                   integrity.Digest
}

// ParsePackages reads a Packages index as a stream. It says nothing about
// trust: hash what r yields and compare with the Suite's entry for the index.
func ParsePackages(r io.Reader, visit func(Package) error) error {
	err := eachStanza(r, maxStanza, func(f map[string]string) error {
		p := Package{Package: f["Package"], Version: f["Version"], Architecture: f["Architecture"], Filename: f["Filename"]}
		if p.Package == "" || p.Version == "" || p.Architecture == "" || p.Filename == "" {
			return fmt.Errorf("stanza of %.80q lacks a field: %w", p.Package, errs.Invalid)
		}
		var err error
		if p.Size, err = parseSize(f["Size"]); err != nil {
			return fmt.Errorf("%s: %w", p.Package, err)
		}
		if p.Digest, err = integrity.ParseDigest(f["SHA256"]); err != nil {
			return fmt.Errorf("%s: %w", p.Package, err)
		}
		return visit(p)
	})
	if err != nil {
		return fmt.Errorf("parse Packages: %w", err)
	}
	return nil
}

// VerifyIndex reads an index to its end and checks it against the InRelease
// entry; consume sees the bytes before they are known to be good, and must not
// act on them until VerifyIndex returns nil.
func VerifyIndex(r io.Reader, want IndexFile, consume func(io.Reader) error) error {
	h := sha256.New()
	c := &Input{r: io.TeeReader(io.LimitReader(r, want.Size+1), h)}
	if err := consume(c); err != nil {
		return fmt.Errorf("verify index: %w", err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		return fmt.Errorf("verify index: %w", err)
	}
	if got := integrity.Digest(h.Sum(nil)); c.n != want.Size || got != want.Digest {
		return fmt.Errorf("verify index: %d bytes, SHA-256 %v; want %d, %v: %w", c.n, got, want.Size, want.Digest, errs.Untrusted)
	}
	return nil
}

// VerifyDeb reads a package file to its end and checks it against its entry.
func VerifyDeb(r io.Reader, want Package) error {
	err := VerifyIndex(r, IndexFile{Size: want.Size, Digest: want.Digest}, func(io.Reader) error { return nil })
	if err != nil {
		return fmt.Errorf("package %s %s: %w", want.Package, want.Version, err)
	}
	return nil
}

// eachStanza reads deb822 text. Field names are unique within a stanza;
// continuation lines are kept with their line breaks.
func eachStanza(r io.Reader, limit int, visit func(map[string]string) error) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 64<<10), maxStanza)
	fields, last, size := make(map[string]string), "", 0
	var text strings.Builder
	flush := func() {
		if last != "" {
			fields[last] = text.String()
			text.Reset()
			last = ""
		}
	}
	end := func() error {
		flush()
		if len(fields) == 0 {
			return nil
		}
		err := visit(fields)
		fields, size = make(map[string]string), 0
		return err
	}
	for sc.Scan() {
		line := strings.TrimSuffix(sc.Text(), "\r")
		if size += len(line) + 1; size > limit {
			return fmt.Errorf("stanza of more than %d bytes: %w", limit, errs.Invalid)
		}
		switch {
		case strings.TrimSpace(line) == "":
			if err := end(); err != nil {
				return err
			}
		case line[0] == '#':
		case line[0] == ' ' || line[0] == '\t':
			if last == "" {
				return fmt.Errorf("continuation of nothing: %w", errs.Invalid)
			}
			text.WriteByte('\n')
			text.WriteString(line)
		default:
			flush()
			name, value, ok := strings.Cut(line, ":")
			if _, dup := fields[name]; !ok || dup || name == "" {
				return fmt.Errorf("line %.80q is no field, or repeats one: %w", line, errs.Invalid)
			}
			last = name
			text.WriteString(strings.TrimSpace(value))
		}
	}
	if err := sc.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("%w: %w", err, errs.Invalid)
		}
		return err
	}
	return end()
}
