package artefact

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"

	"github.com/klauspost/compress/gzip"
	"github.com/ulikunitz/xz"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

const (
	cpioHeader  = 110
	cpioTrailer = "TRAILER!!!"
	maxSegments = 64
)

// cpioReader reads the "newc" form of cpio, as the kernel does
// (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpioReader struct {
	r     io.Reader
	pos   int64 // of the next byte
	visit func(codesign.Member, io.Reader) error
	seen  map[string]bool
	links map[cpioInode]*cpioGroup
	order []*cpioGroup // those without content so far, as they came
	caps  map[string]bool
}

type cpioInode struct{ ino, major, minor uint32 }

// cpioGroup is the names of one file. Its content comes with any one of them.
type cpioGroup struct {
	members []codesign.Member // until the content has come
	main    string            // the name that the content was visited under
}

func newCpio(r io.Reader, visit func(codesign.Member, io.Reader) error) *cpioReader {
	return &cpioReader{r: r, visit: visit, seen: make(map[string]bool), links: make(map[cpioInode]*cpioGroup)}
}

func (c *cpioReader) full(b []byte) error {
	n, err := io.ReadFull(c.r, b)
	c.pos += int64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the archive is cut: %w", errs.Invalid)
	}
	return err
}

// pad skips to a multiple of four; what it skips must be zero.
func (c *cpioReader) pad() error {
	var b [3]byte
	if err := c.full(b[:-c.pos&3]); err != nil {
		return err
	}
	if b != [3]byte{} {
		return fmt.Errorf("data in the padding: %w", errs.Invalid)
	}
	return nil
}

// archive reads members up to and with the trailer.
func (c *cpioReader) archive() error {
	for {
		more, err := c.next()
		if err != nil {
			return err
		}
		if !more {
			return c.finish()
		}
		if len(c.seen) > maxMembers {
			return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
		}
	}
}

// next reads one member; false at the trailer.
func (c *cpioReader) next() (more bool, err error) {
	var h [cpioHeader]byte
	if err := c.full(h[:]); err != nil {
		return false, err
	}
	switch string(h[:6]) {
	case "070701", "070702":
	case "07070X":
		return false, fmt.Errorf("a package of files of more than 4 GiB: %w", errs.Unsupported)
	default:
		return false, fmt.Errorf("no cpio header at %d: %w", c.pos-cpioHeader, errs.Invalid)
	}
	var f [13]uint32
	for i := range f {
		v, err := strconv.ParseUint(string(h[6+8*i:14+8*i]), 16, 32)
		if err != nil {
			return false, fmt.Errorf("cpio header at %d: %w", c.pos-cpioHeader, errs.Invalid)
		}
		f[i] = uint32(v)
	}
	ino, mode, nlink, size, major, minor, nameSize := f[0], f[1], f[4], f[6], f[7], f[8], f[11]
	if nameSize == 0 || nameSize > maxPlace {
		return false, fmt.Errorf("name of %d bytes: %w", nameSize, errs.Invalid)
	}
	name := make([]byte, nameSize)
	if err := c.full(name); err != nil {
		return false, err
	}
	if name[nameSize-1] != 0 {
		return false, fmt.Errorf("%.80q: a name without end: %w", name, errs.Invalid)
	}
	if err := c.pad(); err != nil {
		return false, err
	}
	raw := string(name[:nameSize-1])
	if raw == cpioTrailer {
		if size != 0 {
			return false, fmt.Errorf("a trailer with content: %w", errs.Invalid)
		}
		return false, nil
	}
	m := codesign.Member{Mode: unixMode(mode), Size: int64(size)}
	if m.Path, err = codesign.CleanPath(raw); err != nil {
		return false, err
	}
	if err := c.member(m, cpioInode{ino, major, minor}, nlink); err != nil {
		return false, err
	}
	return true, c.pad()
}

func (c *cpioReader) member(m codesign.Member, ino cpioInode, nlink uint32) error {
	m.Caps = c.caps[m.Path]
	if m.Mode.IsDir() {
		if m.Size != 0 {
			return fmt.Errorf("%q: a directory with content: %w", m.Path, errs.Invalid)
		}
		return nil
	}
	if m.Path == "." || c.seen[m.Path] {
		return fmt.Errorf("%q appears twice: %w", m.Path, errs.Invalid)
	}
	c.seen[m.Path] = true
	switch {
	case m.Mode&fs.ModeSymlink != 0:
		if m.Size > maxPlace {
			return fmt.Errorf("%q: a link of %d bytes: %w", m.Path, m.Size, errs.Invalid)
		}
		b := make([]byte, m.Size)
		if err := c.full(b); err != nil {
			return err
		}
		m.Link, m.Size = string(b), 0
		return c.visit(m, nil)
	case !m.Mode.IsRegular():
		if m.Size != 0 {
			return fmt.Errorf("%q: a special file with content: %w", m.Path, errs.Invalid)
		}
		return c.visit(m, nil)
	case nlink > 1:
		return c.linked(m, ino)
	}
	m.Alone = true
	return c.content(m)
}

// content visits a regular file.
func (c *cpioReader) content(m codesign.Member) error {
	r := &io.LimitedReader{R: c.r, N: m.Size}
	if err := c.visit(m, cutReader{r}); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, cutReader{r}); err != nil {
		return err
	}
	c.pos += m.Size
	return nil
}

// cutReader makes the end of the input an error while content is missing.
type cutReader struct{ r *io.LimitedReader }

func (c cutReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if errors.Is(err, io.EOF) && c.r.N > 0 {
		err = fmt.Errorf("the archive is cut: %w", errs.Invalid)
	}
	return n, err
}

// linked gathers the names of a file with several. The kernel would let a
// second content overwrite the first; whoever makes that wants to be misread.
func (c *cpioReader) linked(m codesign.Member, ino cpioInode) error {
	g := c.links[ino]
	if g == nil {
		g = &cpioGroup{}
		c.links[ino] = g
		c.order = append(c.order, g)
	}
	if m.Size == 0 {
		if g.main != "" {
			m.Hard, m.Link = true, g.main
			return c.visit(m, nil)
		}
		g.members = append(g.members, m)
		return nil
	}
	if g.main != "" {
		return fmt.Errorf("%q and %q are one file with two contents: %w", m.Path, g.main, errs.Invalid)
	}
	g.main = m.Path
	if err := c.content(m); err != nil {
		return err
	}
	return c.names(g)
}

// names visits the names that came before the content.
func (c *cpioReader) names(g *cpioGroup) error {
	for _, m := range g.members {
		m.Hard, m.Link, m.Size = true, g.main, 0
		if err := c.visit(m, nil); err != nil {
			return err
		}
	}
	g.members = nil
	return nil
}

// finish visits files with several names and no content.
func (c *cpioReader) finish() error {
	for _, g := range c.order {
		if g.main != "" || len(g.members) == 0 {
			continue
		}
		first := g.members[0]
		g.main, g.members = first.Path, g.members[1:]
		if err := c.visit(first, io.MultiReader()); err != nil {
			return err
		}
		if err := c.names(g); err != nil {
			return err
		}
	}
	return nil
}

// unixMode turns st_mode into Go's form.
func unixMode(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	for _, b := range []struct {
		unix uint32
		mode fs.FileMode
	}{{0o4000, fs.ModeSetuid}, {0o2000, fs.ModeSetgid}, {0o1000, fs.ModeSticky}} {
		if m&b.unix != 0 {
			mode |= b.mode
		}
	}
	switch m & 0o170000 {
	case 0o040000:
		mode |= fs.ModeDir
	case 0o120000:
		mode |= fs.ModeSymlink
	case 0o060000:
		mode |= fs.ModeDevice
	case 0o020000:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case 0o010000:
		mode |= fs.ModeNamedPipe
	case 0o140000:
		mode |= fs.ModeSocket
	case 0o100000:
	default:
		mode |= fs.ModeIrregular
	}
	return mode
}

// readInitramfs yields what the kernel unpacks at boot: cpio archives, plain
// and compressed, one after the other, with zeros between. A path may come
// again in another segment, where the kernel would overwrite; both are listed,
// under different origins.
func readInitramfs(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) error {
	at, n := int64(0), 0
	for {
		var err error
		if at, err = skipZeros(src, at); err != nil {
			return fmt.Errorf("read initramfs: %w", err)
		}
		if at == src.Size() {
			break
		}
		if n++; n > maxSegments {
			return fmt.Errorf("read initramfs: more than %d segments: %w", maxSegments, errs.Invalid)
		}
		origin := "segment-" + strconv.Itoa(n)
		used, err := readSegment(io.NewSectionReader(src, at, src.Size()-at), func(m codesign.Member, r io.Reader) error {
			m.Origin = origin
			return visit(m, r)
		})
		if err != nil {
			return fmt.Errorf("read initramfs: segment %d at %d: %w", n, at, err)
		}
		at += used
	}
	if n == 0 {
		return fmt.Errorf("read initramfs: it holds nothing: %w", errs.Invalid)
	}
	return nil
}

// skipZeros returns where the next byte that is not zero lies.
func skipZeros(src *io.SectionReader, at int64) (int64, error) {
	b := make([]byte, 4096)
	for at < src.Size() {
		n, err := src.ReadAt(b, at)
		for i, x := range b[:n] {
			if x != 0 {
				return at + int64(i), nil
			}
		}
		at += int64(n)
		if err != nil && !errors.Is(err, io.EOF) {
			return at, err
		}
	}
	return at, nil
}

// readSegment reads one archive and says how many bytes of src it took.
func readSegment(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) (int64, error) {
	in := codesign.NewInput(src)
	b := bufio.NewReaderSize(in, 64<<10)
	ahead := int64(0) // bytes that a decompressor took too many
	used := func() int64 { return in.Count() - int64(b.Buffered()) - ahead }
	head, err := b.Peek(6)
	if err != nil {
		return 0, fmt.Errorf("%d bytes after the last archive: %w", len(head), errs.Invalid)
	}
	var d io.Reader
	switch how := codesign.Compression(head); {
	case string(head[:5]) == "07070":
		err := newCpio(b, visit).archive()
		return used(), err
	case how == "gz":
		z, err := gzip.NewReader(b)
		if err != nil {
			return 0, fmt.Errorf("%w: %w", err, errs.Invalid)
		}
		z.Multistream(false)
		d = z
	case how == "xz":
		z, err := (xz.ReaderConfig{SingleStream: true}).NewReader(b)
		if err != nil {
			return 0, fmt.Errorf("%w: %w", err, errs.Invalid)
		}
		d = &xzStream{r: z, ahead: &ahead}
	case how == "zst":
		size, err := zstdFrame(src)
		if err != nil {
			return 0, err
		}
		z, err := codesign.Decompress(io.NewSectionReader(src, 0, size))
		if err != nil {
			return 0, err
		}
		defer z.Close()
		return size, readArchives(z, visit)
	default: // bzip2, lzma, lz4: how long they are cannot be told, so they come last
		z, err := decompress(b)
		if err != nil {
			return 0, err
		}
		defer z.Close()
		return src.Size(), readArchives(z, visit)
	}
	if err := readArchives(in.Bound(d), visit); err != nil {
		return 0, err
	}
	return used(), nil
}

// xzStream ends where the stream does. The library reads one byte more and
// calls it an error, which only its text tells.
type xzStream struct {
	r     io.Reader
	ahead *int64
}

func (x *xzStream) Read(p []byte) (int, error) {
	if *x.ahead > 0 {
		return 0, io.EOF
	}
	n, err := x.r.Read(p)
	if err != nil && err.Error() == "xz: unexpected data after stream" {
		*x.ahead, err = 1, io.EOF
	}
	return n, err
}

// readArchives reads what a compressed segment holds: archives with zeros
// between them. It must be an archive, or "what cannot be read" would be passed over.
func readArchives(r io.Reader, visit func(codesign.Member, io.Reader) error) error {
	b := bufio.NewReaderSize(r, 64<<10)
	c := newCpio(b, visit)
	for n := 0; ; n++ {
		for {
			x, err := b.ReadByte()
			if errors.Is(err, io.EOF) {
				if n == 0 {
					return fmt.Errorf("no archive inside: %w", errs.Invalid)
				}
				return nil
			}
			if err != nil {
				return err
			}
			if x != 0 {
				break
			}
			c.pos++
		}
		if err := b.UnreadByte(); err != nil {
			return err
		}
		if n > maxSegments || c.pos&3 != 0 {
			return fmt.Errorf("archive %d at %d: %w", n, c.pos, errs.Invalid)
		}
		clear(c.links)
		c.order = nil
		if err := c.archive(); err != nil {
			return err
		}
	}
}

// zstdFrame returns the length of the frame at the beginning (RFC 8878, 3.1.1).
func zstdFrame(src io.ReaderAt) (int64, error) {
	bad := func() (int64, error) { return 0, fmt.Errorf("malformed zstd frame: %w", errs.Invalid) }
	var h [5]byte
	if n, _ := src.ReadAt(h[:], 0); n < len(h) {
		return bad()
	}
	descriptor := h[4]
	at := int64(5)
	single := descriptor&0x20 != 0
	if !single {
		at++ // window descriptor
	}
	at += int64([]int{0, 1, 2, 4}[descriptor&3])
	switch descriptor >> 6 {
	case 0:
		if single {
			at++
		}
	case 1:
		at += 2
	case 2:
		at += 4
	case 3:
		at += 8
	}
	for {
		var b [4]byte
		if n, _ := src.ReadAt(b[:3], at); n < 3 {
			return bad()
		}
		block := int64(binary.LittleEndian.Uint32(b[:]))
		at += 3
		switch block >> 1 & 3 {
		case 1: // one byte, repeated
			at++
		case 3:
			return bad()
		default:
			at += block >> 3
		}
		if block&1 != 0 {
			break
		}
	}
	if descriptor&4 != 0 {
		at += 4 // checksum
	}
	return at, nil
}
