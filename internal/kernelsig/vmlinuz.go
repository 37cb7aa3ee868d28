package kernelsig

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"

	"ringwall/internal/errs"
)

// Bounds of kernel images.
const (
	maxKernel     = 512 << 20 // as a file
	maxVMLinux    = 512 << 20 // decompressed
	maxKernelCert = 8 << 10
	maxKernelKeys = 64
)

// KernelKeys are the certificates that are built into a kernel image.
type KernelKeys struct {
	// Module is the certificate of the key that signed the kernel's modules
	// when it was built; nil: it has none of its own.
	Module *x509.Certificate
	// Builtin are all certificates of the keyring .builtin_trusted_keys,
	// Module first: whose signatures on modules the kernel accepts without
	// anything else being enrolled.
	Builtin []*x509.Certificate
}

// KernelCertificates finds the certificates inside a boot image: an x86
// vmlinuz, a compressed or plain arm64 Image, or vmlinux itself. They are
// found by the layout that the kernel's certs/system_certificates.S gives
// them, so that a certificate elsewhere in the image, such as one on the
// kernel's list of revoked ones, does not count. An image that has no such list
// is errs.NotFound; a compression that is not read is errs.Unsupported.
func KernelCertificates(image []byte) (*KernelKeys, error) {
	if len(image) > maxKernel {
		return nil, fmt.Errorf("kernel image: %d bytes (at most %d): %w", len(image), maxKernel, errs.Invalid)
	}
	plain, err := decompressKernel(image)
	if err != nil {
		return nil, fmt.Errorf("kernel image: %w", err)
	}
	k, err := findCertificates(plain)
	if err != nil {
		return nil, fmt.Errorf("kernel image: %w", err)
	}
	return k, nil
}

// decompressKernel returns the kernel proper (the kernel's arch/x86/boot and
// drivers/firmware/efi/libstub/zboot-header.S).
func decompressKernel(b []byte) (io.Reader, error) {
	switch {
	case len(b) > 0x250 && string(b[0x202:0x206]) == "HdrS":
		start := (uint64(b[0x1f1]) + 1) * 512
		if b[0x1f1] == 0 {
			start = 5 * 512
		}
		if binary.LittleEndian.Uint16(b[0x206:]) < 0x208 {
			return nil, fmt.Errorf("boot protocol older than 2.08: %w", errs.Unsupported)
		}
		at := start + uint64(binary.LittleEndian.Uint32(b[0x248:]))
		n := uint64(binary.LittleEndian.Uint32(b[0x24c:]))
		if at+n > uint64(len(b)) || n < 8 {
			return nil, fmt.Errorf("payload of %d bytes at %d of %d: %w", n, at, len(b), errs.Invalid)
		}
		return decompress(b[at : at+n])
	case len(b) > 64 && string(b[:2]) == "MZ" && string(b[4:8]) == "zimg":
		at, n := uint64(binary.LittleEndian.Uint32(b[8:])), uint64(binary.LittleEndian.Uint32(b[12:]))
		if at+n > uint64(len(b)) || n < 8 {
			return nil, fmt.Errorf("payload of %d bytes at %d of %d: %w", n, at, len(b), errs.Invalid)
		}
		return decompress(b[at : at+n])
	case bytes.HasPrefix(b, []byte("\x1f\x8b")):
		return decompress(b)
	case bytes.HasPrefix(b, []byte("\x7fELF")), len(b) > 64 && string(b[56:60]) == "ARM\x64":
		return bytes.NewReader(b), nil
	}
	return nil, fmt.Errorf("it is no kernel image that is known: %w", errs.Unsupported)
}

// decompress undoes what the kernel's build did. Except for gzip it appends the
// size of what comes out.
func decompress(b []byte) (io.Reader, error) {
	if bytes.HasPrefix(b, []byte("\x1f\x8b")) {
		r, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("gzip: %w: %w", err, errs.Invalid)
		}
		r.Multistream(false) // zeros may follow
		return limited(r, maxVMLinux), nil
	}
	size := binary.LittleEndian.Uint32(b[len(b)-4:])
	if size > maxVMLinux {
		return nil, fmt.Errorf("%d bytes when decompressed (at most %d): %w", size, maxVMLinux, errs.Invalid)
	}
	limit := int(size)
	b = b[:len(b)-4]
	switch {
	case bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")):
		return unxz(b, limit)
	case bytes.HasPrefix(b, []byte("\x28\xb5\x2f\xfd")):
		r, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxXZDict*2))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w: %w", err, errs.Invalid)
		}
		return limited(r, limit), nil
	case bytes.HasPrefix(b, []byte("\x02\x21\x4c\x18")):
		return limited(lz4.NewReader(bytes.NewReader(b)), limit), nil
	case bytes.HasPrefix(b, []byte("BZh")):
		return limited(bzip2.NewReader(bytes.NewReader(b)), limit), nil
	case bytes.HasPrefix(b, []byte("\x5d\x00\x00")):
		r, err := lzma.ReaderConfig{DictCap: maxXZDict}.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("lzma: %w: %w", err, errs.Invalid)
		}
		return limited(r, limit), nil
	}
	return nil, fmt.Errorf("compression with the magic %x: %w", b[:min(4, len(b))], errs.Unsupported)
}

// findCertificates looks for certificates one after the other that are followed,
// at the next multiple of eight, by the length of all of them and then by that
// of the first, or by zero where the kernel has no key of its own for modules.
// It holds a window of the kernel, not all of it.
func findCertificates(r io.Reader) (*KernelKeys, error) {
	const longest = maxKernelKeys*maxKernelCert + 32 // of a list
	var found *KernelKeys
	start := []byte{0x30, 0x82}
	buf := make([]byte, 0, 4<<20)
	for at := 0; ; {
		n, err := io.ReadFull(r, buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return nil, err
		}
		end := len(buf) - longest // a list that begins before ends in the window
		if last {
			end = len(buf)
		}
		for at < end {
			i := bytes.Index(buf[at:], start)
			if i < 0 || at+i >= end {
				at = max(at, end)
				break
			}
			at += i
			k, next := certificateList(buf, at)
			if k == nil {
				at++
				continue
			}
			if found != nil {
				return nil, fmt.Errorf("more than one list of certificates: %w", errs.Invalid)
			}
			found, at = k, next
		}
		if last {
			break
		}
		at -= end
		buf = append(buf[:0], buf[end:]...)
	}
	if found == nil {
		return nil, fmt.Errorf("no list of certificates in it: %w", errs.NotFound)
	}
	return found, nil
}

// certificateList reads the list at a place; nil: there is none.
func certificateList(b []byte, at int) (k *KernelKeys, end int) {
	k = &KernelKeys{}
	first := 0
	end = at
	for end+4 <= len(b) && b[end] == 0x30 && b[end+1] == 0x82 && len(k.Builtin) < maxKernelKeys {
		n := int(binary.BigEndian.Uint16(b[end+2:])) + 4
		if n > maxKernelCert || end+n > len(b) {
			break
		}
		c, err := x509.ParseCertificate(bytes.Clone(b[end : end+n])) // it keeps them, and the window goes on
		if err != nil {
			break
		}
		if first == 0 {
			first = n
		}
		k.Builtin = append(k.Builtin, c)
		end += n
	}
	total := end - at
	// The list begins at a multiple of eight in memory; in the file, sections
	// keep that.
	sizes := end + (8-total%8)%8
	if first == 0 || sizes+16 > len(b) || binary.LittleEndian.Uint64(b[sizes:]) != uint64(total) { //nolint:gosec // not negative
		return nil, 0
	}
	switch binary.LittleEndian.Uint64(b[sizes+8:]) {
	case uint64(first):
		k.Module = k.Builtin[0]
	case 0:
	default:
		return nil, 0
	}
	return k, end
}
