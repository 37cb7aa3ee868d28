package hypervisor

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
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

// maxModule bounds an unpacked kernel module.
const maxModule = 64 << 20

// Module is a loadable kernel module, unpacked.
type Module struct {
	Name string
	Data []byte
}

// LoadOrder finds modules by name below dir, which is lib/modules/RELEASE of a
// kernel, with what they depend on: each after its dependencies. A name that is
// no module there is left out: it is built in, or the kernel lacks it. read is
// ReadModule, or one that keeps what it unpacked.
func LoadOrder(dir string, names []string, read func(path string) ([]byte, error)) ([]Module, error) {
	paths := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && strings.Contains(d.Name(), ".ko") && d.Type().IsRegular() {
			base, _, _ := strings.Cut(d.Name(), ".ko")
			paths[moduleName(base)] = p
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	o := loadOrder{paths: paths, seen: map[string]bool{}, read: read}
	for _, n := range names {
		if err := o.visit(n); err != nil {
			return nil, fmt.Errorf("kernel modules of %s: %w", dir, err)
		}
	}
	return o.out, nil
}

type loadOrder struct {
	paths map[string]string
	seen  map[string]bool
	read  func(path string) ([]byte, error)
	out   []Module
}

func (o *loadOrder) visit(name string) error {
	name = moduleName(name)
	p, ok := o.paths[name]
	if !ok || o.seen[name] {
		return nil
	}
	o.seen[name] = true
	data, err := o.read(p)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	needs, err := moduleNeeds(data)
	if err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	for _, n := range needs {
		if err := o.visit(n); err != nil {
			return err
		}
	}
	o.out = append(o.out, Module{Name: name, Data: data})
	return nil
}

// moduleName is the form in which the kernel compares names of modules.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// ReadModule reads a module, unpacked: not every kernel unpacks by itself.
func ReadModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = f
	switch filepath.Ext(path) {
	case ".xz":
		r, err = xz.NewReader(f)
	case ".gz":
		r, err = gzip.NewReader(f)
	case ".zst":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(f); err == nil {
			defer z.Close()
			r = z
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	b, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(b) > maxModule {
		err = fmt.Errorf("more than %d bytes: %w", maxModule, errs.Invalid)
	}
	return b, err
}

// moduleNeeds reads the names after "depends=" and the soft dependencies that
// must come first ("softdep=pre: …") in a module's .modinfo section.
func moduleNeeds(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	s := f.Section(".modinfo")
	if s == nil || s.Size > maxModule {
		return nil, fmt.Errorf("no .modinfo: %w", errs.Invalid)
	}
	info, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	return parseModinfo(info), nil
}

func parseModinfo(info []byte) []string {
	var out []string
	for item := range strings.SplitSeq(string(info), "\x00") {
		if v, ok := strings.CutPrefix(item, "depends="); ok && v != "" {
			out = append(out, strings.Split(v, ",")...)
		}
		if v, ok := strings.CutPrefix(item, "softdep=pre:"); ok {
			pre, _, _ := strings.Cut(v, "post:")
			out = append(out, strings.Fields(pre)...)
		}
	}
	return out
}
