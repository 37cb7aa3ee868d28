package host

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// VerityVolume is an active device-mapper device whose every block the kernel
// checks against one root hash.
type VerityVolume struct {
	Name string   // of the mapping
	Dev  uint64   // device number, as stat(2) gives for files on it
	Root [32]byte // SHA-256 root of the hash tree
}

// WeakVolume is a device with a verity target whose content the root hash does
// not vouch for.
type WeakVolume struct {
	Name string
	Dev  uint64
	Why  string
}

// Of linux/dm-ioctl.h.
const (
	dmControl  = "/dev/mapper/control"
	dmHeadLen  = 312 // struct dm_ioctl
	dmSpecLen  = 40  // struct dm_target_spec
	dmList     = 2
	dmTable    = 12
	dmGetTable = 1 << 4 // the table instead of the status
	dmSuspend  = 1 << 1
	dmActive   = 1 << 5
	dmInactive = 1 << 6
	dmFull     = 1 << 8 // the answer did not fit

	maxDMAnswer  = 16 << 20
	maxDMDevices = 10_000
)

// FileVerity is the fs-verity digest of an open file that has one by SHA-256, as
// the kernel tells it (FS_IOC_MEASURE_VERITY); ok is false for any other file.
func FileVerity(f *os.File) (d [32]byte, ok bool) {
	const measureVerity, sha256 = 0xc0046686, 1
	var b struct {
		algorithm, size uint16
		digest          [64]byte
	}
	b.size = uint16(len(b.digest))
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), measureVerity, uintptr(unsafe.Pointer(&b))) //nolint:gosec // as dmIoctl
	if errno != 0 || b.algorithm != sha256 || int(b.size) != len(d) {
		return d, false
	}
	return [32]byte(b.digest[:]), true
}

// VerityVolumes lists the dm-verity volumes of this host that can be trusted by
// their root. A kernel without device mapper has none.
//
// It says what was at that moment. Root can put another table, or another
// device, behind a device number afterwards: whoever keeps an answer must ask
// again, and drop a number that is not in the new one.
func VerityVolumes() ([]VerityVolume, error) {
	good, _, err := ListVerity()
	return good, err
}

// ListVerity is VerityVolumes, with the devices that have a verity target and
// are left out. What cannot be read is an error, a table that is not understood
// is weak (fails closed).
func ListVerity() (good []VerityVolume, weak []WeakVolume, err error) {
	good, weak, err = listVerity()
	if err != nil {
		return nil, nil, fmt.Errorf("list verity volumes: %w", err)
	}
	return good, weak, nil
}

func listVerity() (good []VerityVolume, weak []WeakVolume, err error) {
	f, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if os.IsNotExist(err) {
		misc, err := readBounded("/proc/misc", maxSmallFile)
		if err == nil && !strings.Contains(string(misc), " device-mapper\n") {
			return nil, nil, nil
		}
		return nil, nil, fmt.Errorf("the kernel has a device mapper, or hides whether, and there is no %s: %w", dmControl, errs.Unsupported)
	}
	if err != nil {
		return nil, nil, kindOf(err)
	}
	defer f.Close()
	answer, err := dmAsk(f, dmList, 0, 0)
	if err != nil {
		return nil, nil, err
	}
	devices, err := parseDMList(answer)
	if err != nil {
		return nil, nil, err
	}
	for _, d := range devices {
		answer, err := dmAsk(f, dmTable, dmGetTable, d.dev)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EINVAL) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, nil, fmt.Errorf("table of %s: %w", d.name, err)
		}
		flags, targets, err := parseDMTable(answer)
		if err != nil {
			return nil, nil, fmt.Errorf("table of %s: %w", d.name, err)
		}
		root, why := verityRoot(flags, targets)
		switch {
		case why == "":
			good = append(good, VerityVolume{d.name, d.dev, root})
		case hasVerity(targets):
			weak = append(weak, WeakVolume{d.name, d.dev, why})
		}
	}
	return good, weak, nil
}

// dmAsk asks for a list or a table, with as much room as the answer takes.
func dmAsk(f *os.File, command, flags uint32, dev uint64) ([]byte, error) {
	for size := 16 << 10; size <= maxDMAnswer; size *= 4 {
		b := make([]byte, size)
		binary.NativeEndian.PutUint32(b[0:], 4) // version 4.0.0
		binary.NativeEndian.PutUint32(b[12:], uint32(size))
		binary.NativeEndian.PutUint32(b[16:], dmHeadLen)
		binary.NativeEndian.PutUint32(b[28:], flags)
		binary.NativeEndian.PutUint64(b[40:], dev)
		if err := dmIoctl(f, command, b); err != nil {
			return nil, err
		}
		if binary.NativeEndian.Uint32(b[28:])&dmFull == 0 {
			return b, nil
		}
	}
	return nil, fmt.Errorf("an answer of more than %d bytes: %w", maxDMAnswer, errs.Invalid)
}

func dmIoctl(f *os.File, command uint32, b []byte) error {
	request := uintptr(3<<30 | dmHeadLen<<16 | 0xfd<<8 | command)                            // _IOWR
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&b[0]))) //nolint:gosec // the ioctl takes a pointer; b lives until it returns
	if e != 0 {
		return fmt.Errorf("device mapper command %d: %w", command, e)
	}
	return nil
}

type dmDevice struct {
	name string
	dev  uint64
}

// dmBody is what follows the head of an answer.
func dmBody(b []byte) ([]byte, error) {
	if len(b) < dmHeadLen {
		return nil, fmt.Errorf("answer of %d bytes: %w", len(b), errs.Invalid)
	}
	size, start := binary.NativeEndian.Uint32(b[12:]), binary.NativeEndian.Uint32(b[16:])
	if start < dmHeadLen || size < start || uint64(size) > uint64(len(b)) {
		return nil, fmt.Errorf("answer of %d bytes, data from %d to %d: %w", len(b), start, size, errs.Invalid)
	}
	return b[start:size], nil
}

// parseDMList reads the answer to DM_LIST_DEVICES: struct dm_name_list, each
// with the offset to the next.
func parseDMList(b []byte) ([]dmDevice, error) {
	b, err := dmBody(b)
	if err != nil {
		return nil, err
	}
	var out []dmDevice
	for len(out) < maxDMDevices {
		if len(b) < 13 {
			if len(b) == 0 && len(out) == 0 {
				return nil, nil
			}
			return nil, fmt.Errorf("list of devices is cut: %w", errs.Invalid)
		}
		dev, next := binary.NativeEndian.Uint64(b), binary.NativeEndian.Uint32(b[8:])
		if dev == 0 && len(out) == 0 {
			return nil, nil // no device at all
		}
		name, _, ok := bytes.Cut(b[12:], []byte{0})
		if !ok || len(name) == 0 || len(name) > 127 {
			return nil, fmt.Errorf("name of a device: %w", errs.Invalid)
		}
		out = append(out, dmDevice{string(name), dev})
		if next == 0 {
			return out, nil
		}
		if next < 13 || uint64(next) > uint64(len(b)) {
			return nil, fmt.Errorf("list of devices: offset %d of %d: %w", next, len(b), errs.Invalid)
		}
		b = b[next:]
	}
	return nil, fmt.Errorf("more than %d devices: %w", maxDMDevices, errs.Invalid)
}

type dmTarget struct {
	start, length uint64 // sectors
	kind, params  string
}

// parseDMTable reads the answer to DM_TABLE_STATUS with the table asked for:
// struct dm_target_spec and a string each; the offset to the next one counts
// from the first.
func parseDMTable(b []byte) (flags uint32, out []dmTarget, err error) {
	body, err := dmBody(b)
	if err != nil {
		return 0, nil, err
	}
	count := binary.NativeEndian.Uint32(b[20:])
	flags = binary.NativeEndian.Uint32(b[28:])
	at := uint64(0)
	for range count {
		if at+dmSpecLen > uint64(len(body)) {
			return 0, nil, fmt.Errorf("%d targets in %d bytes: %w", count, len(body), errs.Invalid)
		}
		s := body[at:]
		kind, _, ok := bytes.Cut(s[24:dmSpecLen], []byte{0})
		params, _, ended := bytes.Cut(s[dmSpecLen:], []byte{0})
		if !ok || !ended {
			return 0, nil, fmt.Errorf("target without an end: %w", errs.Invalid)
		}
		out = append(out, dmTarget{binary.NativeEndian.Uint64(s), binary.NativeEndian.Uint64(s[8:]), string(kind), string(params)})
		next := uint64(binary.NativeEndian.Uint32(s[20:]))
		if next <= at && uint32(len(out)) < count { //nolint:gosec // at most count
			return 0, nil, fmt.Errorf("next target at %d: %w", next, errs.Invalid)
		}
		at = next
	}
	return flags, out, nil
}

func hasVerity(targets []dmTarget) bool {
	for _, t := range targets {
		if t.kind == "verity" {
			return true
		}
	}
	return false
}

// verityRoot is the root of a device that is all verity and refuses what does
// not fit its root; why says what else it is.
func verityRoot(flags uint32, targets []dmTarget) (root [32]byte, why string) {
	switch {
	case flags&dmActive == 0 || flags&dmSuspend != 0:
		return root, "the device is not active"
	case flags&dmInactive != 0:
		return root, "another table is loaded and may take its place at any time"
	case len(targets) != 1 || targets[0].start != 0 || targets[0].kind != "verity":
		return root, "the device is not all verity"
	}
	return parseVerity(targets[0].params)
}

// parseVerity reads the parameters of a verity target (the kernel's
// admin-guide/device-mapper/verity): version, data device, hash device, two
// block sizes, number of blocks, first hash block, algorithm, root, salt, and a
// count of options. An option that is not known may weaken it.
func parseVerity(params string) (root [32]byte, why string) {
	f := strings.Fields(params)
	if len(f) < 10 || f[0] != "0" && f[0] != "1" {
		return root, "the table is of an unknown form"
	}
	digest, err := hex.DecodeString(f[8])
	if f[7] != "sha256" || err != nil || len(digest) != len(root) {
		return root, fmt.Sprintf("its hash is %.40s, not sha256", f[7])
	}
	options := f[10:]
	if len(options) > 0 {
		n, err := strconv.ParseUint(options[0], 10, 16)
		if options = options[1:]; err != nil || int(n) != len(options) {
			return root, "the table is of an unknown form"
		}
	}
	for i := 0; i < len(options); i++ {
		switch o := options[i]; o {
		case "restart_on_corruption", "panic_on_corruption", "restart_on_error", "panic_on_error", "ignore_zero_blocks", "try_verify_in_tasklet":
		case "use_fec_from_device", "fec_roots", "fec_blocks", "fec_start", "root_hash_sig_key_desc":
			i++ // its value
		case "ignore_corruption":
			return root, "it lets corrupt blocks through (ignore_corruption)"
		case "check_at_most_once":
			return root, "it checks a block only the first time (check_at_most_once)"
		default:
			return root, fmt.Sprintf("option %.40q is not known", o)
		}
	}
	copy(root[:], digest)
	return root, ""
}
