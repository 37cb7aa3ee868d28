package artefact

import (
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// squashfs 4.0, read only as far as content, modes, links and capabilities go
// (Documentation/filesystems/squashfs.rst, fs/squashfs/squashfs_fs.h). The
// usual Go readers do not read extended attributes and trust the image's
// numbers.

const (
	squashSuper      = 96
	squashMeta       = 8192 // bytes in a metadata block
	squashNone       = 0xffffffff
	squashNoTable    = 1<<64 - 1
	squashCached     = 64 // metadata blocks
	squashMaxBlock   = 1 << 20
	squashRaw        = 1 << 24 // in a data block's size: not compressed
	squashPerTable   = squashMeta / 16
	squashSecurity   = 2
	squashOutOfLine  = 0x100
	maxXattrs        = 1 << 16 // of a file
	maxAllXattrs     = 1 << 24
	maxXattrBytes    = 64 << 10
	maxDirectoryList = 256 << 20
)

type squashfs struct {
	src              *io.SectionReader
	blockSize        int64
	inodes, dirs     int64
	fragments, attrs uint64 // tables; squashNoTable: none
	fragmentCount    uint32
	decode           squashDecoder
	cache            map[int64]squashBlock
	fragment         []byte // the one that was used last
	fragmentAt       int64
	seen             map[uint64]bool // directories
	members          int
	claimed          int64
	unpacked         int64 // decompressed, also what was so before
	attributes       int
	visit            func(codesign.Member, io.Reader) error
}

// squashBlock is a metadata block, decompressed, and where the next one lies.
type squashBlock struct {
	data []byte
	next int64
}

// squashCursor reads metadata, over the ends of blocks.
type squashCursor struct {
	s   *squashfs
	at  int64 // of the next block
	buf []byte
	err error
}

// squashInode is an inode of any type.
type squashInode struct {
	mode         fs.FileMode
	size         int64
	start        int64 // of the data, or of the directory's listing
	offset       int
	fragment     uint32
	fragmentFrom int64
	xattr        uint32
	link         string
	blocks       squashCursor // of a regular file
}

func readSquashfs(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) error {
	s := &squashfs{
		src: src, visit: visit, cache: make(map[int64]squashBlock), seen: make(map[uint64]bool), fragmentAt: -1,
	}
	err := s.walk()
	if s.decode.close != nil {
		s.decode.close()
	}
	if err != nil {
		return fmt.Errorf("read squashfs: %w", err)
	}
	return nil
}

func (s *squashfs) walk() error {
	var b [squashSuper]byte
	if n, _ := s.src.ReadAt(b[:], 0); n < len(b) {
		return fmt.Errorf("no superblock: %w", errs.Invalid)
	}
	le := binary.LittleEndian
	s.blockSize = int64(le.Uint32(b[12:]))
	log, major, minor := le.Uint16(b[22:]), le.Uint16(b[28:]), le.Uint16(b[30:])
	used := le.Uint64(b[40:])
	switch {
	case string(b[:4]) != "hsqs":
		return fmt.Errorf("no superblock: %w", errs.Invalid)
	case major != 4 || minor != 0:
		return fmt.Errorf("version %d.%d: %w", major, minor, errs.Unsupported)
	case s.blockSize < 4096 || s.blockSize > squashMaxBlock || log > 20 || s.blockSize != 1<<log:
		return fmt.Errorf("block size %d: %w", s.blockSize, errs.Invalid)
	case used > uint64(s.src.Size()): //nolint:gosec // a size
		return fmt.Errorf("%d bytes, of which %d are there: %w", used, s.src.Size(), errs.Invalid)
	}
	s.inodes, s.dirs = int64(le.Uint64(b[64:])), int64(le.Uint64(b[72:])) //nolint:gosec // checked where they are used
	s.attrs, s.fragments, s.fragmentCount = le.Uint64(b[56:]), le.Uint64(b[80:]), le.Uint32(b[16:])
	var err error
	if s.decode, err = newSquashDecoder(le.Uint16(b[20:])); err != nil {
		return err
	}
	return s.directory(le.Uint64(b[32:]), ".")
}

// block returns the metadata block at a place.
func (s *squashfs) block(at int64) (squashBlock, error) {
	if b, ok := s.cache[at]; ok {
		return b, nil
	}
	var h [2]byte
	if n, _ := s.src.ReadAt(h[:], at); at < 0 || n < len(h) {
		return squashBlock{}, fmt.Errorf("metadata at %d is not there: %w", at, errs.Invalid)
	}
	head := binary.LittleEndian.Uint16(h[:])
	size := int64(head & 0x7fff)
	raw := make([]byte, size)
	if n, _ := s.src.ReadAt(raw, at+2); int64(n) < size || size > squashMeta || size == 0 {
		return squashBlock{}, fmt.Errorf("metadata at %d is cut: %w", at, errs.Invalid)
	}
	if head&0x8000 == 0 {
		var err error
		if raw, err = s.decompress(raw, make([]byte, 0, squashMeta)); err != nil {
			return squashBlock{}, fmt.Errorf("metadata at %d: %w", at, err)
		}
	}
	if len(s.cache) >= squashCached {
		clear(s.cache)
	}
	b := squashBlock{data: raw, next: at + 2 + size}
	s.cache[at] = b
	return b, nil
}

func (s *squashfs) cursor(at int64, offset int) squashCursor {
	c := squashCursor{s: s}
	b, err := s.block(at)
	if err == nil && offset > len(b.data) {
		err = fmt.Errorf("offset %d in metadata at %d: %w", offset, at, errs.Invalid)
	}
	if err != nil {
		c.err = err
		return c
	}
	c.buf, c.at = b.data[offset:], b.next
	return c
}

// read fills p; after a failure it fills nothing more, and err tells.
func (c *squashCursor) read(p []byte) {
	for len(p) > 0 && c.err == nil {
		if len(c.buf) == 0 {
			b, err := c.s.block(c.at)
			if err != nil {
				c.err = err
				return
			}
			c.buf, c.at = b.data, b.next
			continue
		}
		n := copy(p, c.buf)
		p, c.buf = p[n:], c.buf[n:]
	}
}

func (c *squashCursor) u16() uint16 {
	var b [2]byte
	c.read(b[:])
	return binary.LittleEndian.Uint16(b[:])
}

func (c *squashCursor) u32() uint32 {
	var b [4]byte
	c.read(b[:])
	return binary.LittleEndian.Uint32(b[:])
}

func (c *squashCursor) u64() uint64 {
	var b [8]byte
	c.read(b[:])
	return binary.LittleEndian.Uint64(b[:])
}

func (c *squashCursor) skip(n int) {
	var b [16]byte
	c.read(b[:n])
}

// inode reads the inode of a reference.
func (s *squashfs) inode(ref uint64) (*squashInode, error) {
	c := s.cursor(s.inodes+int64(ref>>16), int(ref&0xffff)) // cursor checks both
	kind, perm := c.u16(), c.u16()
	c.skip(12)
	i := &squashInode{mode: unixMode(uint32(perm)).Perm() | unixMode(uint32(perm))&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky), fragment: squashNone, xattr: squashNone}
	switch kind {
	case 1, 8:
		s.directoryInode(i, &c, kind == 8)
	case 2, 9:
		s.fileInode(i, &c, kind == 9)
	case 3, 10:
		i.mode |= fs.ModeSymlink
		c.skip(4)
		n := c.u32()
		if n > maxPlace {
			return nil, fmt.Errorf("a link of %d bytes: %w", n, errs.Invalid)
		}
		b := make([]byte, n)
		c.read(b)
		i.link = string(b)
	case 4, 11:
		i.mode |= fs.ModeDevice
	case 5, 12:
		i.mode |= fs.ModeDevice | fs.ModeCharDevice
	case 6, 13:
		i.mode |= fs.ModeNamedPipe
	case 7, 14:
		i.mode |= fs.ModeSocket
	default:
		return nil, fmt.Errorf("inode of type %d: %w", kind, errs.Invalid)
	}
	if c.err != nil {
		return nil, c.err
	}
	if i.size < 0 {
		return nil, fmt.Errorf("a size of more than 2^63: %w", errs.Invalid)
	}
	return i, nil
}

func (s *squashfs) directoryInode(i *squashInode, c *squashCursor, extended bool) {
	i.mode |= fs.ModeDir
	if !extended {
		i.start = int64(c.u32())
		c.skip(4)
		i.size, i.offset = int64(c.u16()), int(c.u16())
		return
	}
	c.skip(4)
	i.size, i.start = int64(c.u32()), int64(c.u32())
	c.skip(6)
	i.offset = int(c.u16())
}

func (s *squashfs) fileInode(i *squashInode, c *squashCursor, extended bool) {
	if extended {
		i.start, i.size = int64(c.u64()), int64(c.u64()) //nolint:gosec // checked by who reads
		c.skip(12)
	} else {
		i.start = int64(c.u32())
	}
	i.fragment, i.fragmentFrom = c.u32(), int64(c.u32())
	if extended {
		i.xattr = c.u32()
	} else {
		i.size = int64(c.u32())
	}
	i.blocks = *c
}

// directory visits what is below a directory.
func (s *squashfs) directory(ref uint64, rel string) error {
	i, err := s.inode(ref)
	if err != nil {
		return fmt.Errorf("%.200q: %w", rel, err)
	}
	if !i.mode.IsDir() || i.size > maxDirectoryList {
		return fmt.Errorf("%.200q is no directory, or of %d bytes: %w", rel, i.size, errs.Invalid)
	}
	if s.seen[ref] {
		return fmt.Errorf("%.200q contains itself, or is linked twice: %w", rel, errs.Invalid)
	}
	s.seen[ref] = true
	if s.members++; s.members > maxMembers {
		return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
	}
	left := i.size - 3 // for "." and "..", which are not stored
	if left <= 0 {
		return nil
	}
	names := make(map[string]bool)
	c := s.cursor(s.dirs+i.start, i.offset)
	for left > 0 {
		count, start := int64(c.u32())+1, int64(c.u32())
		c.skip(4)
		left -= 12
		if c.err == nil && count > 256 {
			c.err = fmt.Errorf("%d names in a row: %w", count, errs.Invalid)
		}
		for range count {
			offset, _, _, length := c.u16(), c.u16(), c.u16(), int64(c.u16())+1
			if left -= 8 + length; c.err == nil && (length > 256 || left < 0) {
				c.err = fmt.Errorf("names do not fit their listing: %w", errs.Invalid)
			}
			if c.err != nil {
				return fmt.Errorf("%.200q: %w", rel, c.err)
			}
			b := make([]byte, length)
			c.read(b)
			p, err := memberPath(rel, string(b))
			if err != nil {
				return err
			}
			if names[p] {
				return fmt.Errorf("%.200q appears twice: %w", p, errs.Invalid)
			}
			names[p] = true
			if err := s.entry(uint64(start)<<16|uint64(offset), p); err != nil { //nolint:gosec // 32 bits
				return err
			}
		}
	}
	return c.err
}

// memberPath joins a directory of an image and a name in it.
func memberPath(dir, name string) (string, error) {
	p := name
	if dir != "." {
		p = dir + "/" + name
	}
	clean, err := codesign.CleanPath(p)
	if err != nil {
		return "", err
	}
	if clean != p {
		return "", fmt.Errorf("name %.80q: %w", name, errs.Invalid)
	}
	return p, nil
}

func (s *squashfs) entry(ref uint64, p string) error {
	i, err := s.inode(ref)
	if err != nil {
		return fmt.Errorf("%.200q: %w", p, err)
	}
	if i.mode.IsDir() {
		return s.directory(ref, p)
	}
	m := codesign.Member{Path: p, Mode: i.mode, Link: i.link, Alone: true}
	s.members++
	if s.members > maxMembers {
		return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
	}
	if !i.mode.IsRegular() {
		return s.visit(m, nil)
	}
	m.Size = i.size
	if s.claimed += i.size; s.claimed > codesign.RatioFree+codesign.MaxRatio*s.src.Size() || s.claimed > codesign.MaxTotal || s.claimed < 0 {
		return fmt.Errorf("%.200q: %d bytes are claimed: %w", p, i.size, errs.Invalid)
	}
	if m.Caps, err = s.hasCaps(i.xattr); err != nil {
		return fmt.Errorf("%.200q: extended attributes: %w", p, err)
	}
	return s.visit(m, &squashFile{s: s, i: *i, left: i.size, at: i.start})
}

// table returns entry n of a table of 16-byte entries in metadata blocks, the
// places of which are listed from at on.
func (s *squashfs) table(at int64, n uint32) (squashCursor, error) {
	var b [8]byte
	if k, _ := s.src.ReadAt(b[:], at+8*int64(n/squashPerTable)); at < 0 || k < len(b) {
		return squashCursor{}, fmt.Errorf("table at %d is cut: %w", at, errs.Invalid)
	}
	c := s.cursor(int64(binary.LittleEndian.Uint64(b[:])), int(n%squashPerTable)*16) //nolint:gosec // cursor checks it
	return c, c.err
}

// hasCaps looks for security.capability.
func (s *squashfs) hasCaps(id uint32) (bool, error) {
	if id == squashNone {
		return false, nil
	}
	var b [16]byte
	if n, _ := s.src.ReadAt(b[:], int64(s.attrs)); s.attrs == squashNoTable || n < len(b) { //nolint:gosec // ReadAt refuses negative
		return false, fmt.Errorf("no table: %w", errs.Invalid)
	}
	start, count := int64(binary.LittleEndian.Uint64(b[:])), binary.LittleEndian.Uint32(b[8:]) //nolint:gosec // cursor checks it
	if id >= count {
		return false, fmt.Errorf("number %d of %d: %w", id, count, errs.Invalid)
	}
	t, err := s.table(int64(s.attrs)+16, id) //nolint:gosec // was read from above
	if err != nil {
		return false, err
	}
	ref, n := t.u64(), t.u32()
	if s.attributes += int(n); t.err != nil || n > maxXattrs || s.attributes > maxAllXattrs {
		return false, fmt.Errorf("%d attributes (%w): %w", n, t.err, errs.Invalid)
	}
	c := s.cursor(start+int64(ref>>16), int(ref&0xffff)) // cursor checks both
	for range n {
		kind, size := c.u16(), c.u16()
		name := make([]byte, size)
		c.read(name)
		length := c.u32()
		if length > maxXattrBytes {
			return false, fmt.Errorf("a value of %d bytes: %w", length, errs.Invalid)
		}
		c.read(make([]byte, length))
		if c.err != nil {
			return false, c.err
		}
		if kind&^squashOutOfLine == squashSecurity && string(name) == "capability" {
			return true, nil
		}
	}
	return false, nil
}

// squashFile reads a regular file.
type squashFile struct {
	s    *squashfs
	i    squashInode
	left int64
	at   int64 // of the next data block
	buf  []byte
	own  []byte // what buf may be part of
}

func (f *squashFile) Read(p []byte) (int, error) {
	for len(f.buf) == 0 {
		if f.left == 0 {
			return 0, io.EOF
		}
		if err := f.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.buf)
	f.buf = f.buf[n:]
	return n, nil
}

// fill reads the next block, or the tail out of a fragment.
func (f *squashFile) fill() error {
	s := f.s
	want := min(s.blockSize, f.left)
	if want < s.blockSize && f.i.fragment != squashNone {
		b, err := s.fragmentBlock(f.i.fragment)
		if err != nil {
			return err
		}
		if f.i.fragmentFrom+want > int64(len(b)) {
			return fmt.Errorf("a tail of %d bytes at %d of a fragment of %d: %w", want, f.i.fragmentFrom, len(b), errs.Invalid)
		}
		f.buf, f.left = b[f.i.fragmentFrom:][:want], 0
		return nil
	}
	size := f.i.blocks.u32()
	if f.i.blocks.err != nil {
		return f.i.blocks.err
	}
	if f.own == nil {
		f.own = make([]byte, 0, want)
	}
	b, err := s.data(f.at, size, f.own)
	if err != nil {
		return err
	}
	if size == 0 { // a hole
		b = f.own[:want]
		clear(b)
	}
	if int64(len(b)) != want {
		return fmt.Errorf("a block of %d bytes where %d belong: %w", len(b), want, errs.Invalid)
	}
	f.at += int64(size &^ squashRaw)
	f.left -= want
	f.buf, f.own = b, b[:0]
	return nil
}

// data reads a data block into buf's memory where it is large enough.
func (s *squashfs) data(at int64, size uint32, buf []byte) ([]byte, error) {
	n := int64(size &^ squashRaw)
	if n > s.blockSize || at < 0 {
		return nil, fmt.Errorf("a block of %d bytes at %d: %w", n, at, errs.Invalid)
	}
	raw := make([]byte, n)
	if k, _ := s.src.ReadAt(raw, at); int64(k) < n {
		return nil, fmt.Errorf("a block at %d is cut: %w", at, errs.Invalid)
	}
	if size&squashRaw != 0 || n == 0 {
		return raw, nil
	}
	if int64(cap(buf)) < s.blockSize {
		buf = make([]byte, 0, s.blockSize)
	}
	return s.decompress(raw, buf[:0:s.blockSize])
}

// decompress unpacks a block. An image that has the same blocks unpacked over
// and over, for files that take turns, is as much of a bomb as a large one.
func (s *squashfs) decompress(raw, into []byte) ([]byte, error) {
	b, err := s.decode.block(raw, into)
	if s.unpacked += int64(len(b)); err == nil && s.unpacked > nestedFree+nestedRatio*s.src.Size() {
		err = fmt.Errorf("unpacks to more than %d times the whole: %w", nestedRatio, errs.Invalid)
	}
	return b, err
}

func (s *squashfs) fragmentBlock(n uint32) ([]byte, error) {
	if n >= s.fragmentCount || s.fragments == squashNoTable {
		return nil, fmt.Errorf("fragment %d of %d: %w", n, s.fragmentCount, errs.Invalid)
	}
	if s.fragmentAt == int64(n) {
		return s.fragment, nil
	}
	t, err := s.table(int64(s.fragments), n) //nolint:gosec // table checks it
	if err != nil {
		return nil, err
	}
	at, size := int64(t.u64()), t.u32() //nolint:gosec // data checks it
	if t.err != nil {
		return nil, t.err
	}
	b, err := s.data(at, size, nil)
	if err != nil {
		return nil, err
	}
	s.fragment, s.fragmentAt = b, int64(n)
	return b, nil
}
