package artefact

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// An RPM package: a lead that says nothing, a header of signatures, a header of
// tags, and the payload, a compressed cpio archive (RPM's file format V4,
// rpm.org/docs/4.20.x/manual/format_v4.html).

const (
	rpmLead      = 96
	rpmMagic     = "\x8e\xad\xe8\x01"
	maxRPMTags   = 64 << 10
	maxRPMHeader = 64 << 20 // RPM takes 256 MiB, for packages that nobody makes
	maxRPMTexts  = 1 << 20  // strings of a tag: one for each file
	// rpmPrefix is where scriptlets are members. A payload must not use it.
	rpmPrefix = "RPM/"
)

// The tags that are read.
const (
	rpmName, rpmVersion, rpmRelease, rpmEpoch, rpmArch            = 1000, 1001, 1002, 1003, 1022
	rpmBasenames, rpmDirnames, rpmDirIndexes                      = 1117, 1118, 1116
	rpmPayloadFormat, rpmPayloadCompressor                        = 1124, 1125
	rpmTriggers, rpmFileTriggers, rpmTransFileTriggers, rpmFlagFC = 1065, 5066, 5076, 5010
)

// rpmScripts are the tags of scriptlets by the names that spec files use.
func rpmScripts() map[int]string {
	return map[int]string{
		1023: "pre", 1024: "post", 1025: "preun", 1026: "postun", 1079: "verify",
		1151: "pretrans", 1152: "posttrans", 5104: "preuntrans", 5107: "postuntrans",
		rpmTriggers: "trigger", rpmFileTriggers: "filetrigger", rpmTransFileTriggers: "transfiletrigger",
	}
}

// rpmHeader is one header structure.
type rpmHeader struct {
	store []byte
	tags  map[int]rpmEntry
}

type rpmEntry struct{ kind, offset, count uint32 }

// readRPM yields the scriptlets and triggers and then the payload.
func readRPM(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) (Package, error) {
	p, err := rpmWalk(src, visit)
	if err != nil {
		return p, fmt.Errorf("read rpm: %w", err)
	}
	return p, nil
}

func rpmWalk(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) (Package, error) {
	var p Package
	_, at, err := readRPMHeader(src, rpmLead)
	if err != nil {
		return p, fmt.Errorf("signatures: %w", err)
	}
	h, at, err := readRPMHeader(src, (at+7)&^7)
	if err != nil {
		return p, fmt.Errorf("header: %w", err)
	}
	p = Package{Name: h.text(rpmName), Version: h.text(rpmVersion) + "-" + h.text(rpmRelease), Architecture: h.text(rpmArch)}
	if e := h.number(rpmEpoch, 0); e > 0 {
		p.Version = fmt.Sprintf("%d:%s", e, p.Version)
	}
	if p.Name == "" {
		return p, fmt.Errorf("a package without a name: %w", errs.Invalid)
	}
	if f := h.text(rpmPayloadFormat); f != "" && f != "cpio" {
		return p, fmt.Errorf("payload format %.20q: %w", f, errs.Unsupported)
	}
	if err := h.scripts(visit); err != nil {
		return p, err
	}
	caps, err := h.capabilities()
	if err != nil {
		return p, err
	}
	d, err := decompress(io.NewSectionReader(src, at, src.Size()-at))
	if err != nil {
		return p, fmt.Errorf("payload: %w", err)
	}
	defer d.Close()
	c := newCpio(d, func(m codesign.Member, r io.Reader) error {
		if strings.HasPrefix(m.Path, rpmPrefix) {
			return fmt.Errorf("the payload holds %q: %w", m.Path, errs.Invalid)
		}
		m.Origin = "payload"
		return visit(m, r)
	})
	c.caps = caps
	if err := c.archive(); err != nil {
		return p, fmt.Errorf("payload: %w", err)
	}
	return p, nothingLeft(d)
}

// nothingLeft wants only zeros up to the end.
func nothingLeft(r io.Reader) error {
	b := make([]byte, 32<<10)
	for {
		n, err := r.Read(b)
		if len(bytes.Trim(b[:n], "\x00")) > 0 {
			return fmt.Errorf("data after the end of the archive: %w", errs.Invalid)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// readRPMHeader reads the header at a place and says where it ends.
func readRPMHeader(src *io.SectionReader, at int64) (*rpmHeader, int64, error) {
	bad := func(what string) (*rpmHeader, int64, error) { return nil, 0, fmt.Errorf("%s: %w", what, errs.Invalid) }
	var intro [16]byte
	if n, _ := src.ReadAt(intro[:], at); n < len(intro) || string(intro[:4]) != rpmMagic {
		return bad("no header")
	}
	be := binary.BigEndian
	n, size := int64(be.Uint32(intro[8:])), int64(be.Uint32(intro[12:]))
	end := at + 16 + 16*n + size
	if n > maxRPMTags || size > maxRPMHeader || end > src.Size() {
		return bad(fmt.Sprintf("%d tags in %d bytes do not fit", n, size))
	}
	index := make([]byte, 16*n)
	h := &rpmHeader{store: make([]byte, size), tags: make(map[int]rpmEntry, n)}
	for _, part := range []struct {
		b  []byte
		at int64
	}{{index, at + 16}, {h.store, at + 16 + 16*n}} {
		if _, err := io.ReadFull(io.NewSectionReader(src, part.at, int64(len(part.b))), part.b); err != nil {
			return nil, 0, fmt.Errorf("%w: %w", err, errs.Invalid)
		}
	}
	for e := range int(n) {
		b := index[16*e:]
		tag := int(be.Uint32(b))
		entry := rpmEntry{kind: be.Uint32(b[4:]), offset: be.Uint32(b[8:]), count: be.Uint32(b[12:])}
		if int64(entry.offset) > size || int64(entry.count) > size {
			return bad(fmt.Sprintf("tag %d is out of bounds", tag))
		}
		if _, twice := h.tags[tag]; twice {
			return bad(fmt.Sprintf("tag %d twice", tag))
		}
		h.tags[tag] = entry
	}
	return h, end, nil
}

const (
	rpmInt32       = 4
	rpmString      = 6
	rpmStringArray = 8
	rpmI18NString  = 9
)

// texts returns a tag's strings; none when it is not there.
func (h *rpmHeader) texts(tag int) ([]string, error) {
	e, ok := h.tags[tag]
	if !ok {
		return nil, nil
	}
	n := e.count
	switch e.kind {
	case rpmString:
		n = 1
	case rpmStringArray, rpmI18NString:
	default:
		return nil, fmt.Errorf("tag %d is no text: %w", tag, errs.Invalid)
	}
	if n > maxRPMTexts {
		return nil, fmt.Errorf("tag %d has %d texts: %w", tag, n, errs.Invalid)
	}
	b := h.store[e.offset:]
	out := make([]string, 0, n)
	for range n {
		s, rest, found := bytes.Cut(b, []byte{0})
		if !found {
			return nil, fmt.Errorf("tag %d is cut: %w", tag, errs.Invalid)
		}
		out, b = append(out, string(s)), rest
	}
	return out, nil
}

func (h *rpmHeader) text(tag int) string {
	t, err := h.texts(tag)
	if err != nil || len(t) == 0 {
		return ""
	}
	return t[0]
}

// number returns element i of an array of 32 bits, or 0.
func (h *rpmHeader) number(tag int, i uint32) uint32 {
	e := h.tags[tag]
	if at := int64(e.offset) + 4*int64(i); e.kind == rpmInt32 && i < e.count && at+4 <= int64(len(h.store)) {
		return binary.BigEndian.Uint32(h.store[at:])
	}
	return 0
}

// scripts visits what the package manager runs. It writes a body to a file and
// hands that to the interpreter, so the body is what the kernel sees. The
// built-in "<lua>" never becomes a file, but is code all the same.
func (h *rpmHeader) scripts(visit func(codesign.Member, io.Reader) error) error {
	names := rpmScripts()
	for _, tag := range []int{1151, 1023, 1024, 1025, 1026, 1152, 5104, 5107, 1079, rpmTriggers, rpmFileTriggers, rpmTransFileTriggers} {
		bodies, err := h.texts(tag)
		if err != nil {
			return fmt.Errorf("scriptlet %s: %w", names[tag], err)
		}
		for i, body := range bodies {
			if body == "" {
				continue
			}
			name := names[tag]
			if tag == rpmTriggers || tag == rpmFileTriggers || tag == rpmTransFileTriggers {
				name = fmt.Sprintf("%s-%d", name, i)
			}
			m := codesign.Member{
				Path: rpmPrefix + name, Mode: 0o755, Size: int64(len(body)), Origin: "scriptlet",
				Install: true, Kinds: integrity.SetOf(integrity.KindScript),
			}
			if err := visit(m, strings.NewReader(body)); err != nil {
				return err
			}
		}
	}
	return nil
}

// capabilities returns the paths that get file capabilities.
func (h *rpmHeader) capabilities() (map[string]bool, error) {
	caps, err := h.texts(rpmFlagFC)
	if err != nil || len(caps) == 0 {
		return nil, err
	}
	base, err := h.texts(rpmBasenames)
	if err != nil {
		return nil, err
	}
	dirs, err := h.texts(rpmDirnames)
	if err != nil {
		return nil, err
	}
	if len(base) != len(caps) {
		return nil, fmt.Errorf("%d capabilities for %d files: %w", len(caps), len(base), errs.Invalid)
	}
	out := make(map[string]bool)
	for i, c := range caps {
		if c == "" {
			continue
		}
		d := h.number(rpmDirIndexes, uint32(i))
		if int64(d) >= int64(len(dirs)) {
			return nil, fmt.Errorf("file %q lies in no directory: %w", base[i], errs.Invalid)
		}
		p, err := codesign.CleanPath(path.Join(dirs[d], base[i]))
		if err != nil {
			return nil, err
		}
		out[p] = true
	}
	return out, nil
}
