package csv

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Bounds of what is kept of members.
const (
	sniffBytes = 4096
	maxModule  = 96 << 20 // of a kernel module or EFI image, held while it is checked
)

// facts are what a member's bytes say about where and how it runs.
type facts struct {
	elf     *elfFacts
	shebang *shebang
	install bool   // runs while the package is installed
	makes   []made // of a maintainer script
	payload string // what is inside and gets unpacked
	setID   bool
	caps    bool
	bad     string // why it cannot be parsed
	// What kernels and firmware say of its signature, by trust; nil: it is no
	// module, or no boot image.
	modules, images []string
}

// build is what one reading of an artefact found.
type build struct {
	catalogue *codesign.Catalogue
	names     *codesign.NameTable
	built     *codesign.Built
	contents  []content
	unread    []archive         // archives in the build that nobody looked into
	links     map[string]string // cleaned path → target, for resolving names
	byPath    map[string]int32  // cleaned path → content, the file's own
}

// archive is a member that others can be unpacked from.
type archive struct {
	member codesign.Member
	format string
}

// place is where a member lies: the part of the artefact, and the path in it.
type place struct{ origin, path string }

// inspector is a Source that takes facts from what passes through it.
type inspector struct {
	src    codesign.Source
	window window
	head   []byte
	script []byte
	blob   []byte // of a module or boot image
	trusts []trust
	own    []*x509.Certificate // keys inside a kernel of the build
	facts  map[place]*facts
	files  []archive
	nested map[string]bool // archives that have members of their own
	bad    string          // the member that could not be read
}

// Walk implements codesign.Source.
func (in *inspector) Walk(visit func(codesign.Member, io.Reader) error) error {
	return in.src.Walk(func(m codesign.Member, r io.Reader) error {
		if outer, ok := strings.CutSuffix(m.Origin, "!"); ok {
			in.nested[outer] = true
		}
		if r == nil {
			return visit(m, nil)
		}
		p := &probe{in: in, m: m}
		in.window.reset()
		in.head, in.script, in.blob = in.head[:0], in.script[:0], in.blob[:0]
		if err := visit(m, io.TeeReader(r, p)); err != nil {
			if in.bad == "" && errors.Is(err, errs.Invalid) {
				in.bad = m.Path
			}
			return err
		}
		p.finish()
		return nil
	})
}

// probe looks at one member as it passes by.
type probe struct {
	in      *inspector
	m       codesign.Member
	decided bool // what it is, from its first bytes
	isELF   bool
	// Their signature is checked, so all of them is kept.
	module, image bool
	binary        bool // a script that holds a zero byte
}

// Write never fails.
func (p *probe) Write(b []byte) (int, error) {
	in, size := p.in, len(b)
	if !p.decided {
		n := min(len(b), sniffBytes-len(in.head))
		in.head, b = append(in.head, b[:n]...), b[n:]
		if len(in.head) < sniffBytes {
			return size, nil
		}
		p.decide()
	}
	p.feed(b)
	return size, nil
}

func (p *probe) decide() {
	head := p.in.head
	p.decided, p.isELF = true, bytes.HasPrefix(head, []byte("\x7fELF"))
	p.module, p.image = keepsWhole(p.m, head)
	p.feed(head)
}

func (p *probe) feed(b []byte) {
	in := p.in
	if p.isELF {
		_, _ = in.window.Write(b)
	}
	if p.m.Install {
		in.script = append(in.script, b[:min(scriptMax-len(in.script), len(b))]...)
	}
	if p.module || p.image {
		in.blob = append(in.blob, b[:min(maxModule+1-len(in.blob), len(b))]...)
	}
	if !p.binary && bytes.HasPrefix(in.head, []byte("#!")) {
		p.binary = bytes.IndexByte(b, 0) >= 0
	}
}

// signature checks a module or boot image.
func (p *probe) signature(f *facts) {
	var err error
	switch in := p.in; {
	case len(in.blob) > maxModule:
		err = fmt.Errorf("more than %d bytes: %w", maxModule, errs.Invalid)
	case p.module:
		f.modules, err = in.module(in.blob)
	case p.image:
		f.images, err = in.image(in.blob)
	}
	if err != nil && f.bad == "" {
		f.bad = plainErr(err)
	}
}

func (p *probe) finish() {
	in, f := p.in, facts{install: p.m.Install}
	if !p.decided {
		p.decide()
	}
	p.signature(&f)
	if p.isELF {
		var err error
		if f.elf, err = parseELF(&in.window); err != nil {
			f.bad = strings.TrimSuffix(err.Error(), ": "+errs.Invalid.Error())
		} else if f.elf != nil && f.elf.packed != "" {
			f.payload = f.elf.packed
		}
	}
	if s, ok := parseShebang(in.head); ok {
		f.shebang = &s
		if p.binary {
			f.payload = "a script with binary data after its text"
		}
	}
	if p.m.Install {
		f.makes = scanScript(in.script)
		if len(in.script) == scriptMax {
			f.bad = fmt.Sprintf("a maintainer script of more than %d bytes", scriptMax)
		}
	}
	f.setID = p.m.Mode&(fs.ModeSetuid|fs.ModeSetgid) != 0 && p.m.Mode&0o111 != 0
	f.caps = p.m.Caps
	if format := archiveFormat(p.m.Path, in.head); format != "" {
		in.files = append(in.files, archive{p.m, format})
	}
	if f.elf != nil || f.shebang != nil || f.bad != "" || f.payload != "" || f.setID || f.caps || f.makes != nil || f.modules != nil || f.images != nil {
		in.facts[place{p.m.Origin, p.m.Path}] = &f
	}
}

// archiveFormat tells files that others are unpacked from. A single compressed
// file, such as a manual page, is none.
func archiveFormat(name string, head []byte) string {
	has := func(s string) bool { return bytes.HasPrefix(head, []byte(s)) }
	base := strings.ToLower(path.Base(name))
	packed := has("\x1f\x8b") || has("\xfd7zXZ\x00") || has("\x28\xb5\x2f\xfd") || has("BZh")
	switch {
	case has("PK\x03\x04"):
		switch path.Ext(base) {
		case ".jar", ".war", ".pyz", ".egg", ".zip", ".whl":
			return "zip"
		case ".docx", ".xlsx", ".odt", ".ods", ".odp", ".epub":
			return ""
		}
		return "zip"
	case has("7z\xbc\xaf\x27\x1c"):
		return "7z"
	case has("070701"), has("070702"):
		return "cpio"
	case has("hsqs"):
		return "squashfs"
	case has("\xed\xab\xee\xdb"):
		return "rpm"
	case has("!<arch>\ndebian-binary"):
		return "deb"
	case len(head) >= 262 && string(head[257:262]) == "ustar":
		return "tar"
	case packed && (strings.Contains(base, ".tar.") || slices.Contains([]string{".tgz", ".txz", ".tbz2", ".tzst"}, path.Ext(base))):
		return "tar"
	case packed && strings.Contains(base, ".cpio."):
		return "cpio"
	}
	return ""
}

// inspect reads the whole build. An errs.Invalid comes with the member that
// could not be read, if it was one.
func inspect(src codesign.Source, allFiles bool, trusts []trust) (*build, string, error) {
	in := &inspector{src: src, trusts: trusts, facts: map[place]*facts{}, nested: map[string]bool{}}
	built, err := codesign.Build(in, codesign.Options{AllFiles: allFiles})
	if err != nil {
		return nil, in.bad, err
	}
	b := &build{built: built, links: map[string]string{}, byPath: map[string]int32{}}
	if b.catalogue, err = codesign.ParseCatalogue(built.Catalogue); err != nil {
		return nil, "", err
	}
	if b.names, err = codesign.ParseNames(built.Names, b.catalogue); err != nil {
		return nil, "", err
	}
	b.table(in.facts)
	for _, f := range in.files {
		if !in.opened(f.member) {
			b.unread = append(b.unread, f)
		}
	}
	return b, "", nil
}

// opened says whether the source yielded what is inside an archive.
func (in *inspector) opened(m codesign.Member) bool {
	for outer := range in.nested {
		if outer == m.Path || strings.HasSuffix(outer, "/"+m.Path) || outer == m.Origin+m.Path {
			return true
		}
	}
	return false
}

// table lists the contents that are code.
func (b *build) table(found map[place]*facts) {
	b.contents = make([]content, 0, b.catalogue.Len())
	for i, rec := range b.catalogue.All() {
		if rec.Flags&codesign.FlagData != 0 {
			continue
		}
		names := b.names.Names[i]
		c := content{digest: rec.Digest, kinds: rec.Kinds, inner: rec.Flags&codesign.FlagInner != 0, nested: rec.Flags&codesign.FlagNested != 0, paths: make([]string, len(names))}
		n := int32(len(b.contents)) //nolint:gosec // at most codesign.MaxRecords
		for j, name := range names {
			c.paths[j], c.origin = name.Path, name.Origin
			if c.nested {
				c.places = append(c.places, shownPath(name))
			}
			if c.inner {
				continue
			}
			if !strings.HasSuffix(name.Origin, "!") {
				b.byPath[clean(name.Path)] = n
			}
			c.facts = merge(c.facts, found[place{name.Origin, name.Path}])
		}
		if !c.inner && rec.Flags&(codesign.FlagSetID|codesign.FlagCaps) != 0 {
			c.facts = merge(c.facts, &facts{setID: rec.Flags&codesign.FlagSetID != 0, caps: rec.Flags&codesign.FlagCaps != 0})
		}
		b.contents = append(b.contents, c)
	}
	for _, n := range b.names.Others {
		if n.Target != "" {
			b.links[clean(n.Path)] = n.Target
		}
	}
}

// merge unites what two names of one content say.
func merge(a, b *facts) *facts {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	m := *a
	m.setID, m.caps, m.install = a.setID || b.setID, a.caps || b.caps, a.install || b.install
	if len(m.makes) == 0 {
		m.makes = b.makes
	}
	if m.elf == nil && m.shebang == nil && m.bad == "" {
		m.elf, m.shebang, m.bad, m.payload = b.elf, b.shebang, b.bad, b.payload
	}
	if m.modules == nil && m.images == nil {
		m.modules, m.images = b.modules, b.images
	}
	return &m
}

// resolve follows the build's own links. False: it leads out of the build.
func (b *build) resolve(p string) (int32, bool) {
	p = clean(p)
	for range 40 {
		if n, ok := b.byPath[p]; ok {
			return n, true
		}
		target, ok := b.links[p]
		if !ok {
			return 0, false
		}
		if path.IsAbs(target) {
			p = clean(target)
		} else {
			p = clean(path.Join(path.Dir(p), target))
		}
	}
	return 0, false
}

// count is the number of files that are used as each kind.
func (b *build) count() map[string]int {
	out := map[string]int{}
	for _, k := range integrity.Kinds() {
		if n := b.built.Kinds[k]; n > 0 {
			out[k.String()] = n
		}
	}
	return out
}

// shownPath is where people find a member: one in an archive by the archive's
// path and its own.
func shownPath(n codesign.Name) string {
	if strings.HasSuffix(n.Origin, "!") {
		return n.Origin + "/" + n.Path
	}
	return n.Path
}
