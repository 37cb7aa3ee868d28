package vm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"ringwall/internal/hypervisor"
)

// defaultModules are what tests of file systems, devices and containers need,
// where the kernel has them as modules.
var defaultModules = []string{
	"virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "crc32c_generic", "sha256_generic",
	"ext4", "squashfs", "erofs", "overlay", "fuse", "loop", "dm_verity",
}

// plainModule reads a module, unpacked. The unpacked form is kept beside the
// kernel: to unpack takes a second or two, in an emulated guest longer.
func (k Kernel) plainModule(path string) ([]byte, error) {
	base, packed, _ := strings.Cut(filepath.Base(path), ".ko")
	if packed == "" {
		return hypervisor.ReadModule(path)
	}
	dir := filepath.Join(k.Dir, "plain")
	plain := filepath.Join(dir, base+".ko")
	if b, err := os.ReadFile(plain); err == nil {
		return b, nil
	}
	b, err := hypervisor.ReadModule(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	tmp, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(b)
	if err := errors.Join(err, tmp.Close()); err != nil {
		return nil, err
	}
	return b, os.Rename(tmp.Name(), plain)
}
