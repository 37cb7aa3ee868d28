package csv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"ringwall/internal/errs"
)

// Bounds of what is kept and parsed of one ELF file.
const (
	keepHead      = 4 << 20  // its beginning
	keepSegment   = 8 << 20  // a later segment, if it is not longer
	keepTotal     = 24 << 20 // of later segments
	headersWithin = 64 << 10 // program headers lie within
	maxHeaders    = 1024
	maxDynamic    = 16 << 10 // entries
	maxNeeded     = 1024
	maxWord       = 4096 // a path or soname
)

// window keeps those parts of a file that passes by which its ELF program
// headers speak of. It is reused from file to file.
type window struct {
	head  []byte
	spans []span
	pos   int64
	read  bool // the headers
}

// span is a part after the head.
type span struct {
	from int64
	size int64
	data []byte
}

func (w *window) reset() { w.head, w.spans, w.pos, w.read = w.head[:0], w.spans[:0], 0, false }

// Write never fails.
func (w *window) Write(p []byte) (int, error) {
	if room := keepHead - len(w.head); room > 0 {
		w.head = append(w.head, p[:min(room, len(p))]...)
	}
	if !w.read && len(w.head) >= headersWithin {
		w.plan()
	}
	for i := range w.spans {
		s := &w.spans[i]
		from, to := max(s.from, w.pos), min(s.from+s.size, w.pos+int64(len(p)))
		if from < to {
			s.data = append(s.data, p[from-w.pos:to-w.pos]...)
		}
	}
	w.pos += int64(len(p))
	return len(p), nil
}

// plan decides what to keep after the head.
func (w *window) plan() {
	w.read = true
	e := elfFile{w: w}
	if e.headers() != nil {
		return
	}
	left := uint64(keepTotal)
	for _, h := range e.progs {
		if end := h.off + h.size; h.size > keepSegment || end <= keepHead || h.size > left || end < h.off {
			continue
		}
		left -= h.size
		w.spans = append(w.spans, span{from: int64(h.off), size: int64(h.size)}) //nolint:gosec // size is bounded, and so is their sum
	}
}

// bytes returns a part of the file, or nil if it was not kept.
func (w *window) bytes(off, size uint64) []byte {
	end := off + size
	if end < off || size > keepTotal {
		return nil
	}
	if end <= uint64(len(w.head)) {
		return w.head[off:end]
	}
	for _, s := range w.spans {
		if from := uint64(s.from); from <= off && end <= from+uint64(len(s.data)) { //nolint:gosec // never negative
			return s.data[off-from : end-from]
		}
	}
	return nil
}

// Of the ELF specification, and of its GNU extensions.
const (
	etExec = 2
	etDyn  = 3

	ptLoad     = 1
	ptDynamic  = 2
	ptInterp   = 3
	ptGNUStack = 0x6474e551
	ptGNURelro = 0x6474e552

	pfX = 1
	pfW = 2

	dtNeeded  = 1
	dtStrtab  = 5
	dtStrsz   = 10
	dtSoname  = 14
	dtTextrel = 22
	dtFlags   = 30

	dfTextrel = 4

	em386 = 3
)

type prog struct {
	kind, flags     uint32
	off, addr, size uint64 // size in the file
}

// elfFacts are what the kernel and the loader read in a file. Only program
// headers count for them, and so only these count here.
type elfFacts struct {
	interp    string // the loader, without leading slash
	needed    []string
	soname    string
	fixed     bool // ET_EXEC: not position-independent
	dynamic   bool
	rwx       bool // a segment that is writable and executable
	execStack bool
	textrel   bool
	relro     bool
	packed    string // by what packer
}

// elfFile parses what a window kept.
type elfFile struct {
	w       *window
	bo      binary.ByteOrder
	wide    bool
	kind    uint16
	machine uint16
	progs   []prog
}

func badELF(format string, a ...any) error {
	return fmt.Errorf("ELF: %s: %w", fmt.Sprintf(format, a...), errs.Invalid)
}

func (e *elfFile) headers() error {
	h := e.w.head
	if len(h) < 52 || string(h[:4]) != "\x7fELF" {
		return badELF("no header")
	}
	switch h[5] {
	case 1:
		e.bo = binary.LittleEndian
	case 2:
		e.bo = binary.BigEndian
	default:
		return badELF("byte order %d", h[5])
	}
	e.wide = h[4] == 2
	if !e.wide && h[4] != 1 || e.wide && len(h) < 64 {
		return badELF("class %d", h[4])
	}
	e.kind, e.machine = e.bo.Uint16(h[16:]), e.bo.Uint16(h[18:])
	var off uint64
	var size, n uint16
	if e.wide {
		off, size, n = e.bo.Uint64(h[32:]), e.bo.Uint16(h[54:]), e.bo.Uint16(h[56:])
	} else {
		off, size, n = uint64(e.bo.Uint32(h[28:])), e.bo.Uint16(h[42:]), e.bo.Uint16(h[44:])
	}
	want := uint16(32)
	if e.wide {
		want = 56
	}
	switch {
	case n == 0:
		return nil
	case n > maxHeaders || size != want:
		return badELF("%d program headers of %d bytes", n, size)
	case off > headersWithin || off+uint64(n)*uint64(size) > uint64(len(h)):
		return badELF("program headers at %d, beyond the end or too far in", off)
	}
	for i := range uint64(n) {
		e.progs = append(e.progs, e.prog(h[off+i*uint64(size):]))
	}
	return nil
}

func (e *elfFile) prog(b []byte) prog {
	if e.wide {
		return prog{kind: e.bo.Uint32(b), flags: e.bo.Uint32(b[4:]), off: e.bo.Uint64(b[8:]), addr: e.bo.Uint64(b[16:]), size: e.bo.Uint64(b[32:])}
	}
	return prog{
		kind: e.bo.Uint32(b), off: uint64(e.bo.Uint32(b[4:])), addr: uint64(e.bo.Uint32(b[8:])),
		size: uint64(e.bo.Uint32(b[16:])), flags: e.bo.Uint32(b[24:]),
	}
}

// parseELF reads what a window kept of a whole file. Nil without an error: it
// is ELF, but nothing that is started or loaded, such as an object file.
func parseELF(w *window) (*elfFacts, error) {
	e := elfFile{w: w}
	if err := e.headers(); err != nil {
		return nil, err
	}
	if e.kind != etExec && e.kind != etDyn || len(e.progs) == 0 {
		return nil, nil //nolint:nilnil // said above
	}
	f := &elfFacts{fixed: e.kind == etExec}
	stack := false
	for _, p := range e.progs {
		switch p.kind {
		case ptLoad:
			f.rwx = f.rwx || p.flags&(pfW|pfX) == pfW|pfX
			if p.off+p.size < p.off || p.off+p.size > uint64(w.pos) { //nolint:gosec // never negative
				return nil, badELF("a segment reaches beyond the end of the file")
			}
		case ptInterp:
			b := w.bytes(p.off, p.size)
			if p.size == 0 || p.size > maxWord || b == nil || b[len(b)-1] != 0 {
				return nil, badELF("no readable PT_INTERP")
			}
			f.interp = clean(string(b[:bytes.IndexByte(b, 0)]))
		case ptGNUStack:
			stack = true
			f.execStack = p.flags&pfX != 0
		case ptGNURelro:
			f.relro = true
		}
	}
	// Without the header, Linux makes the stack executable for i386 only.
	f.execStack = f.execStack || !stack && e.machine == em386
	f.packed = packer(w.head)
	return f, e.dynamicOf(f)
}

// packer tells programs that unpack themselves in memory.
func packer(head []byte) string {
	switch {
	case len(head) > 11 && string(head[8:10]) == "AI" && (head[10] == 1 || head[10] == 2):
		return "AppImage"
	case bytes.Contains(head[:min(len(head), 1024)], []byte("UPX!")):
		return "UPX"
	}
	return ""
}

func (e *elfFile) dynamicOf(f *elfFacts) error {
	i := slices.IndexFunc(e.progs, func(p prog) bool { return p.kind == ptDynamic })
	if i < 0 {
		return nil
	}
	f.dynamic = true
	p, size := e.progs[i], uint64(8)
	if e.wide {
		size = 16
	}
	if p.size/size > maxDynamic {
		return badELF("dynamic section of %d bytes", p.size)
	}
	b := e.w.bytes(p.off, p.size)
	if b == nil {
		return badELF("dynamic section at %d is beyond the end, or too far in", p.off)
	}
	word := func(b []byte) uint64 {
		if e.wide {
			return e.bo.Uint64(b)
		}
		return uint64(e.bo.Uint32(b))
	}
	var names, strtab, strsz uint64
	var needed []uint64
	var soname uint64
entries:
	for ; uint64(len(b)) >= size; b = b[size:] {
		tag, v := word(b), word(b[size/2:])
		switch tag {
		case 0:
			break entries
		case dtNeeded:
			needed = append(needed, v)
		case dtStrtab:
			strtab, names = v, names+1
		case dtStrsz:
			strsz = v
		case dtSoname:
			soname = v
		case dtTextrel:
			f.textrel = true
		case dtFlags:
			f.textrel = f.textrel || v&dfTextrel != 0
		}
	}
	if len(needed) == 0 && soname == 0 {
		return nil
	}
	if names != 1 || len(needed) > maxNeeded {
		return badELF("%d string tables, %d libraries needed", names, len(needed))
	}
	table, err := e.table(strtab, strsz)
	if err != nil {
		return err
	}
	return f.texts(table, needed, soname)
}

// table returns the dynamic string table, which is given by address.
func (e *elfFile) table(addr, size uint64) ([]byte, error) {
	for _, p := range e.progs {
		if p.kind == ptLoad && addr >= p.addr && addr-p.addr < p.size {
			if b := e.w.bytes(p.off+addr-p.addr, size); b != nil {
				return b, nil
			}
			return nil, badELF("dynamic string table of %d bytes is beyond the end, or too far in", size)
		}
	}
	return nil, badELF("dynamic string table lies in no segment")
}

func (f *elfFacts) texts(table []byte, needed []uint64, soname uint64) error {
	text := func(off uint64) (string, error) {
		if off >= uint64(len(table)) {
			return "", badELF("a name lies beyond the string table")
		}
		b := table[off:]
		end := bytes.IndexByte(b[:min(len(b), maxWord)], 0)
		if end < 0 {
			return "", badELF("a name has no end")
		}
		return string(b[:end]), nil
	}
	for _, off := range needed {
		s, err := text(off)
		if err != nil {
			return err
		}
		f.needed = append(f.needed, s)
	}
	if soname == 0 {
		return nil
	}
	var err error
	f.soname, err = text(soname)
	return err
}
