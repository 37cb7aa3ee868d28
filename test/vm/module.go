package vm

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"ringwall/internal/errs"
)

// defaultModules are what tests of file systems, devices and containers need,
// where the kernel has them as modules.
var defaultModules = []string{
	"virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "crc32c_generic", "sha256_generic",
	"ext4", "squashfs", "erofs", "overlay", "fuse", "loop", "dm_verity",
}

// maxModule bounds an unpacked module.
const maxModule = 64 << 20

// module is one loadable module, unpacked.
type module struct {
	name string
	data []byte
}

// loadOrder finds the named modules and what they depend on, each after its
// dependencies. Names that the kernel does not have as a module are left out:
// they are built in, or the kernel lacks them.
func (k Kernel) loadOrder(names []string) ([]module, error) {
	paths := map[string]string{}
	err := filepath.WalkDir(k.Modules, func(p string, d fs.DirEntry, err error) error {
		if err == nil && strings.Contains(d.Name(), ".ko") && d.Type().IsRegular() {
			base, _, _ := strings.Cut(d.Name(), ".ko")
			paths[moduleName(base)] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var order []module
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		p, ok := paths[name]
		if !ok || seen[name] {
			return nil
		}
		seen[name] = true
		data, err := k.plainModule(p)
		if err != nil {
			return fmt.Errorf("module %s: %w", p, err)
		}
		deps, err := moduleDepends(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", p, err)
		}
		for _, d := range deps {
			if err := visit(d); err != nil {
				return err
			}
		}
		order = append(order, module{name: name, data: data})
		return nil
	}
	for _, n := range names {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName is the form in which the kernel compares names of modules.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// plainModule reads a module, unpacked. The unpacked form is kept beside the
// kernel: to unpack takes a second or two, in an emulated guest longer.
func (k Kernel) plainModule(path string) ([]byte, error) {
	base, packed, _ := strings.Cut(filepath.Base(path), ".ko")
	if packed == "" {
		return readModule(path)
	}
	dir := filepath.Join(k.Dir, "plain")
	plain := filepath.Join(dir, base+".ko")
	if b, err := os.ReadFile(plain); err == nil {
		return b, nil
	}
	b, err := readModule(path)
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

// readModule reads a module, unpacked.
func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = f
	switch filepath.Ext(path) {
	case ".xz":
		if r, err = xz.NewReader(f); err != nil {
			return nil, err
		}
	case ".zst":
		z, err := zstd.NewReader(f)
		if err != nil {
			return nil, err
		}
		defer z.Close()
		r = z
	}
	b, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(b) > maxModule {
		err = fmt.Errorf("more than %d bytes: %w", maxModule, errs.Invalid)
	}
	return b, err
}

// moduleDepends reads the names after "depends=" and the soft dependencies
// that must come first ("softdep=pre: …") in a module's .modinfo section.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("no .modinfo: %w", errs.Invalid)
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	return parseModinfo(info), nil
}

func parseModinfo(info []byte) []string {
	var deps []string
	for item := range strings.SplitSeq(string(info), "\x00") {
		if v, ok := strings.CutPrefix(item, "depends="); ok && v != "" {
			deps = append(deps, strings.Split(v, ",")...)
		}
		if v, ok := strings.CutPrefix(item, "softdep=pre:"); ok {
			pre, _, _ := strings.Cut(v, "post:")
			deps = append(deps, strings.Fields(pre)...)
		}
	}
	return deps
}
