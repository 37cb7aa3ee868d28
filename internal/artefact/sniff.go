package artefact

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// The formats.
const (
	FormatDir       Format = "directory"
	FormatTar       Format = "tar" // also compressed with gzip, xz, zstd or bzip2
	FormatDeb       Format = "deb"
	FormatRPM       Format = "rpm"
	FormatZip       Format = "zip"       // also jar, wheel, zipapp
	FormatSquashfs  Format = "squashfs"  // version 4
	FormatErofs     Format = "erofs"     // compressed ones by fsck.erofs
	FormatInitramfs Format = "initramfs" // cpio "newc", any number of segments, each plain or compressed
	FormatUKI       Format = "uki"       // an EFI image with a kernel or an initramfs in its sections
	FormatOCI       Format = "oci"       // image layout: a directory, a tar archive of one, or an image in a registry
	FormatFile      Format = "file"      // one file that is code by itself

	formatNone       Format = ""
	formatCompressed Format = "compressed" // of something; what, is seen when it is decompressed
	formatShebang    Format = "shebang"    // a script, which may carry a zip archive at its end
)

const (
	erofsAt  = 1024
	extAt    = 1024 + 56
	tarBlock = 512
)

// sniff tells a container by the first codesign.HeadSize bytes; formatNone is
// anything else. The error (errs.Unsupported) names containers that are known
// and not read.
func sniff(head []byte) (Format, error) {
	has := func(at int, magic string) bool {
		return len(head) >= at+len(magic) && string(head[at:at+len(magic)]) == magic
	}
	switch {
	case has(0, "PK\x03\x04"), has(0, "PK\x05\x06"):
		return FormatZip, nil
	case has(0, "!<arch>\ndebian-binary"):
		return FormatDeb, nil
	case has(0, "\xed\xab\xee\xdb"):
		return FormatRPM, nil
	case has(0, "hsqs"):
		return FormatSquashfs, nil
	case has(0, "070701"), has(0, "070702"):
		return FormatInitramfs, nil
	case has(erofsAt, "\xe2\xe1\xf5\xe0"):
		return FormatErofs, nil
	case has(0, "MZ"):
		if isUKI(head) {
			return FormatUKI, nil
		}
	case has(0, "#!"):
		return formatShebang, nil
	case codesign.Compression(head) != "", has(0, "\x02\x21\x4c\x18"), has(0, "\x04\x22\x4d\x18"), has(0, "\x5d\x00\x00\x80\x00"):
		return formatCompressed, nil
	case isTarHeader(head):
		return FormatTar, nil
	}
	return formatNone, unread(head, has)
}

// unread names what is a container and is not read.
func unread(head []byte, has func(int, string) bool) error {
	const asTar = "unpack it and give the directory, or a tar archive of it"
	for _, f := range []struct {
		at        int
		magic     string
		name, way string
	}{
		{0, "7z\xbc\xaf\x27\x1c", "a 7-Zip archive", asTar},
		{0, "Rar!\x1a\x07", "a RAR archive", asTar},
		{0, "MSCF\x00\x00\x00\x00", "a cabinet archive", asTar},
		{0, "xar!", "a xar archive", asTar},
		{0, "sqsh", "a big-endian squashfs", asTar},
		{0, "070707", "a cpio archive of the old form", "make it with cpio -H newc"},
		{0, "\x89LZO\x00\r\n\x1a\n", "an lzop file", "decompress it"},
		{0, "QFI\xfb", "a qcow2 disk image", "mount it (qemu-nbd) and give the directory"},
		{0, "KDMV", "a VMDK disk image", "mount it (qemu-nbd) and give the directory"},
		{0, "vhdxfile", "a VHDX disk image", "mount it (qemu-nbd) and give the directory"},
		{0, "XFSB", "an XFS image", "mount it read-only and give the directory"},
		{8, "AI\x02", "an AppImage", "unpack it with --appimage-extract and give the directory"},
		{512, "EFI PART", "a disk image with partitions", "mount its file systems read-only (losetup -P) and give the directory"},
	} {
		if has(f.at, f.magic) && (f.at != 8 || has(0, "\x7fELF")) {
			return fmt.Errorf("%s is not read here; %s: %w", f.name, f.way, errs.Unsupported)
		}
	}
	// s_magic alone is two bytes; the block size and the revision must make sense too.
	if has(extAt, "\x53\xef") && len(head) >= 1024+100 {
		block, revision := binary.LittleEndian.Uint32(head[1024+24:]), binary.LittleEndian.Uint32(head[1024+76:])
		if block <= 6 && revision <= 1 {
			return fmt.Errorf("an ext4 image is not read here; mount it read-only and give the directory (mount -o ro,loop), or make a tar archive of it (virt-tar-out, debugfs rdump): %w", errs.Unsupported)
		}
	}
	return nil
}

// isTarHeader checks the header's own sum, which tells tar archives of every
// age from text that happens to look like one.
func isTarHeader(head []byte) bool {
	if len(head) < tarBlock {
		return false
	}
	head = head[:tarBlock]
	field := bytes.Trim(head[148:156], " \x00")
	if len(field) == 0 || len(field) > 7 {
		return false
	}
	var want int
	for _, c := range field {
		if c < '0' || c > '7' {
			return false
		}
		want = want<<3 + int(c-'0')
	}
	var sum, signed int
	for i, c := range head {
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int(c)
		signed += int(int8(c)) // how old archives sum
	}
	return want == sum || want == signed
}

// sniffDeep decides what formatCompressed and formatShebang leave open.
func sniffDeep(f Format, src *io.SectionReader) (Format, error) {
	switch f {
	case formatShebang:
		if _, ok := zipEnd(src); ok {
			return FormatZip, nil
		}
		return formatNone, nil
	case formatCompressed:
		d, err := decompress(src)
		if err != nil {
			return formatNone, nil //nolint:nilerr // no archive, whatever else it is
		}
		defer d.Close()
		head := make([]byte, codesign.HeadSize)
		n, _ := io.ReadFull(d, head) // what is cut or broken is told by whoever reads it
		if n == 0 {
			return formatNone, nil
		}
		switch inner, err := sniff(head[:n]); inner {
		case FormatTar, FormatInitramfs:
			return inner, nil
		case FormatZip, FormatDeb, FormatRPM, FormatSquashfs, FormatErofs, FormatUKI:
			return formatNone, fmt.Errorf("a compressed %s is not read here; decompress it: %w", inner, errs.Unsupported)
		default:
			if err != nil {
				return formatNone, fmt.Errorf("compressed: %w", err)
			}
			return formatNone, nil
		}
	}
	return f, nil
}

// zipEnd finds the record that ends a zip archive (APPNOTE 4.3.16), so that its
// comment ends where the file does.
func zipEnd(src io.ReaderAt) (at int64, ok bool) {
	type sized interface{ Size() int64 }
	s, isSized := src.(sized)
	if !isSized {
		return 0, false
	}
	const record, maxComment = 22, 65535
	n := min(s.Size(), record+maxComment)
	b := make([]byte, n)
	if m, err := src.ReadAt(b, s.Size()-n); int64(m) != n || err != nil && n == 0 {
		return 0, false
	}
	for i := n - record; i >= 0; i-- {
		if string(b[i:i+4]) == "PK\x05\x06" && i+record+int64(binary.LittleEndian.Uint16(b[i+20:])) == n {
			return s.Size() - n + i, true
		}
	}
	return 0, false
}
