package host

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// Package is one record of the dpkg database.
type Package struct {
	Name          string     `json:"name"`
	Arch          string     `json:"arch"`
	Version       string     `json:"version"`
	Source        string     `json:"source"`         // source package; the name itself if the record names none
	SourceVersion string     `json:"source_version"` // likewise
	Want          string     `json:"want"`           // install, hold, deinstall, …
	Flag          string     `json:"flag"`           // ok or reinstreq
	State         string     `json:"state"`          // installed, half-installed, unpacked, …
	MultiArch     string     `json:"multi_arch,omitempty"`
	Essential     bool       `json:"essential,omitempty"`
	Conffiles     []Conffile `json:"conffiles,omitempty"`
}

// Conffile is a configuration file with the MD5 that it had in its package.
type Conffile struct {
	Path     string `json:"path"`
	MD5      string `json:"md5"` // hex, or newconffile while being unpacked
	Obsolete bool   `json:"obsolete,omitempty"`
}

// OnDisk is whether files of the package lie on the disk.
func (p Package) OnDisk() bool { return p.State != "not-installed" && p.State != "config-files" }

// PackageFile is a file that a package brought.
type PackageFile struct {
	Path     string `json:"path"`          // as the package names it
	Disk     string `json:"disk"`          // where it lies: other than Path if diverted
	MD5      string `json:"md5,omitempty"` // hex; "" for directories, links, and files without a checksum
	Conffile bool   `json:"conffile,omitempty"`
}

// Diversion moves a file of every package but one.
type Diversion struct {
	From    string `json:"from"`
	To      string `json:"to"`
	Package string `json:"package"` // the one that keeps From; "" for a local diversion: none does
}

// Alternative is a link group of update-alternatives.
type Alternative struct {
	Name    string            `json:"name"`
	Auto    bool              `json:"auto"`
	Link    string            `json:"link"`
	Slaves  map[string]string `json:"slaves,omitempty"` // name to link
	Targets []string          `json:"targets"`          // candidates for Link
}

// Bounds of what the database may hold. Debian has about 65,000 packages.
const (
	maxPackages   = 200_000
	maxDpkgLine   = 1 << 20
	maxDpkgFile   = 512 << 20
	maxInfoFile   = 128 << 20
	maxConffiles  = 10_000
	dpkgDir       = "var/lib/dpkg"
	maxUpdates    = 10_000
	maxDiversions = 100_000
)

// Dpkg reads the dpkg database of a system. It holds no lock: Busy says whether
// someone may be changing it. What cannot be parsed is an error, never skipped
// (fails closed).
type Dpkg struct {
	root       string
	packages   []Package
	byName     map[string][]int
	diversions map[string]Diversion
}

// OpenDpkg reads the status of all packages below root, with the updates that a
// running dpkg has not yet merged, and the diversions.
func OpenDpkg(root string) (*Dpkg, error) {
	d := &Dpkg{root: root, byName: make(map[string][]int), diversions: make(map[string]Diversion)}
	all, err := d.status()
	if err != nil {
		return nil, fmt.Errorf("open the dpkg database of %s: %w", root, err)
	}
	for _, p := range all {
		d.byName[p.Name] = append(d.byName[p.Name], len(d.packages))
		d.packages = append(d.packages, p)
	}
	b, err := readBounded(d.path("diversions"), maxInfoFile)
	if err != nil && !errors.Is(err, errs.NotFound) {
		return nil, fmt.Errorf("open the dpkg database of %s: %w", root, err)
	}
	list, err := ParseDiversions(b)
	if err != nil {
		return nil, fmt.Errorf("open the dpkg database of %s: %w", root, err)
	}
	for _, x := range list {
		d.diversions[x.From] = x
	}
	return d, nil
}

// InstalledPackages are the packages below root that have files on the disk.
func InstalledPackages(root string) ([]Package, error) {
	d, err := OpenDpkg(root)
	if err != nil {
		return nil, err
	}
	return d.Packages(), nil
}

// Packages are those that have files on the disk, in the database's order.
func (d *Dpkg) Packages() []Package {
	var out []Package
	for _, p := range d.packages {
		if p.OnDisk() {
			out = append(out, p)
		}
	}
	return out
}

// Package finds a package by name, or name:arch; errs.NotFound if it has no
// files on the disk.
func (d *Dpkg) Package(name string) (Package, error) {
	n, arch, _ := strings.Cut(name, ":")
	for _, i := range d.byName[n] {
		if p := d.packages[i]; p.OnDisk() && (arch == "" || arch == p.Arch) {
			return p, nil
		}
	}
	return Package{}, fmt.Errorf("package %s: %w", name, errs.NotFound)
}

func (d *Dpkg) path(name string) string { return filepath.Join(d.root, dpkgDir, name) }

func (d *Dpkg) status() ([]Package, error) {
	f, err := os.Open(d.path("status"))
	if err != nil {
		return nil, kindOf(err)
	}
	defer f.Close()
	all, err := ParseDpkgStatus(f)
	if err != nil {
		return nil, err
	}
	e, err := os.ReadDir(d.path("updates"))
	if err != nil && !os.IsNotExist(err) {
		return nil, kindOf(err)
	}
	if len(e) > maxUpdates {
		return nil, fmt.Errorf("%d pending updates: %w", len(e), errs.Invalid)
	}
	for _, x := range e { // sorted by name, which is the order of the updates
		if strings.Trim(x.Name(), "0123456789") != "" {
			continue // tmp.i and the like are not yet part of the journal
		}
		b, err := readBounded(filepath.Join(d.path("updates"), x.Name()), maxInfoFile)
		if errors.Is(err, errs.NotFound) {
			continue // merged meanwhile
		}
		if err != nil {
			return nil, err
		}
		if all, err = overlayStatus(all, b); err != nil {
			return nil, fmt.Errorf("pending update %s: %w", x.Name(), err)
		}
	}
	return all, nil
}

func overlayStatus(all []Package, update []byte) ([]Package, error) {
	news, err := ParseDpkgStatus(bytes.NewReader(update))
	if err != nil {
		return nil, err
	}
	for _, p := range news {
		if i := slices.IndexFunc(all, func(q Package) bool { return q.Name == p.Name && q.Arch == p.Arch }); i >= 0 {
			all[i] = p
		} else {
			all = append(all, p)
		}
	}
	return all, nil
}

// DpkgBusy is the process that holds one of dpkg's or apt's locks below root, 0
// if none does. A process in another PID namespace shows as -1. A lock file
// that is not there is not held.
func DpkgBusy(root string) (pid int, err error) {
	for _, n := range []string{dpkgDir + "/lock-frontend", dpkgDir + "/lock", "var/cache/apt/archives/lock"} {
		f, err := os.Open(filepath.Join(root, n))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("look at lock %s: %w", n, kindOf(err))
		}
		l := unix.Flock_t{Type: unix.F_WRLCK}
		err = unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l)
		_ = f.Close()
		if err != nil {
			return 0, fmt.Errorf("look at lock %s: %w", n, err)
		}
		if l.Type != unix.F_UNLCK {
			if l.Pid == 0 {
				return -1, nil
			}
			return int(l.Pid), nil
		}
	}
	return 0, nil
}

// PackageFiles lists what a package brought, with the checksums it came with,
// and where each lies after diversions.
func (d *Dpkg) PackageFiles(p Package) ([]PackageFile, error) {
	list, err := d.info(p, "list")
	if err != nil {
		return nil, fmt.Errorf("files of package %s: %w", p.Name, err)
	}
	sums := make(map[string]string)
	b, err := d.info(p, "md5sums")
	if err != nil && !errors.Is(err, errs.NotFound) {
		return nil, fmt.Errorf("files of package %s: %w", p.Name, err)
	}
	if err := ParseMD5Sums(b, func(name, sum string) { sums["/"+name] = sum }); err != nil {
		return nil, fmt.Errorf("checksums of package %s: %w", p.Name, err)
	}
	conf := make(map[string]string, len(p.Conffiles))
	for _, c := range p.Conffiles {
		if !c.Obsolete {
			conf[c.Path] = c.MD5
		}
	}
	var out []PackageFile
	for line := range strings.SplitSeq(string(list), "\n") {
		if line == "" || line == "/." {
			continue
		}
		if !cleanAbs(line) {
			return nil, fmt.Errorf("files of package %s: path %q: %w", p.Name, line, errs.Invalid)
		}
		f := PackageFile{Path: line, Disk: line, MD5: sums[line]}
		if m, ok := conf[line]; ok {
			f.Conffile = true
			if f.MD5 == "" && len(m) == 32 {
				f.MD5 = m
			}
		}
		if v, ok := d.diversions[line]; ok && v.Package != p.Name {
			f.Disk = v.To
		}
		out = append(out, f)
	}
	return out, nil
}

// info reads one of a package's files; a Multi-Arch: same package has them
// under name:arch.
func (d *Dpkg) info(p Package, ext string) ([]byte, error) {
	b, err := readBounded(d.path("info/"+p.Name+":"+p.Arch+"."+ext), maxInfoFile)
	if errors.Is(err, errs.NotFound) {
		return readBounded(d.path("info/"+p.Name+"."+ext), maxInfoFile)
	}
	return b, err
}

// Diversions are all diversions, by the path that is moved away.
func (d *Dpkg) Diversions() map[string]Diversion { return d.diversions }

// ParseDpkgStatus reads records in the format of var/lib/dpkg/status. It is
// strict: an unknown shape of line, a name that could leave its directory, a
// field given twice or a record without name or status is errs.Invalid.
func ParseDpkgStatus(r io.Reader) ([]Package, error) {
	in := bufio.NewScanner(io.LimitReader(r, maxDpkgFile+1))
	in.Buffer(make([]byte, 64<<10), maxDpkgLine)
	var out []Package
	var p Package
	var field string
	seen := make(map[string]bool)
	line, size := 0, 0
	finish := func() error {
		if len(seen) == 0 {
			return nil
		}
		if err := p.finish(); err != nil {
			return fmt.Errorf("record before line %d: %w", line, err)
		}
		out = append(out, p)
		p, field = Package{}, ""
		clear(seen)
		if len(out) > maxPackages {
			return fmt.Errorf("more than %d packages: %w", maxPackages, errs.Invalid)
		}
		return nil
	}
	for in.Scan() {
		s := in.Text()
		line++
		if size += len(s) + 1; size > maxDpkgFile {
			return nil, fmt.Errorf("more than %d bytes: %w", maxDpkgFile, errs.Invalid)
		}
		if s == "" {
			if err := finish(); err != nil {
				return nil, err
			}
			continue
		}
		if s[0] == ' ' || s[0] == '\t' {
			if field == "" {
				return nil, fmt.Errorf("line %d: continues nothing: %w", line, errs.Invalid)
			}
			if err := p.more(field, strings.TrimSpace(s)); err != nil {
				return nil, fmt.Errorf("line %d: %w", line, err)
			}
			continue
		}
		name, value, ok := strings.Cut(s, ":")
		if !ok || !fieldName(name) {
			return nil, fmt.Errorf("line %d: no field: %w", line, errs.Invalid)
		}
		if field = strings.ToLower(name); seen[field] {
			return nil, fmt.Errorf("line %d: second %s: %w", line, name, errs.Invalid)
		}
		seen[field] = true
		if err := p.set(field, strings.TrimSpace(value)); err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
	}
	if err := in.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("%w: %w", err, errs.Invalid)
		}
		return nil, fmt.Errorf("dpkg status, line %d: %w", line+1, err)
	}
	return out, finish()
}

func (p *Package) set(field, v string) error {
	switch field {
	case "package":
		if !dpkgName(v, "+.-") {
			return fmt.Errorf("package name %q: %w", v, errs.Invalid)
		}
		p.Name = v
	case "architecture":
		if !dpkgName(v, "-") {
			return fmt.Errorf("architecture %q: %w", v, errs.Invalid)
		}
		p.Arch = v
	case "version":
		if v == "" || !dpkgName(strings.ToLower(v), ".+-:~") {
			return fmt.Errorf("version %q: %w", v, errs.Invalid)
		}
		p.Version = v
	case "status":
		w := strings.Fields(v)
		if len(w) != 3 {
			return fmt.Errorf("status %q: %w", v, errs.Invalid)
		}
		p.Want, p.Flag, p.State = w[0], w[1], w[2]
	case "source":
		n, ver, _ := strings.Cut(v, " ")
		if !dpkgName(n, "+.-") {
			return fmt.Errorf("source %q: %w", v, errs.Invalid)
		}
		p.Source, p.SourceVersion = n, strings.Trim(ver, "() ")
	case "multi-arch":
		p.MultiArch = v
	case "essential":
		p.Essential = v == "yes"
	case "conffiles":
		if v != "" {
			return p.more(field, v)
		}
	}
	return nil
}

// more takes a continuation line; only conffiles' matter.
func (p *Package) more(field, v string) error {
	if field != "conffiles" {
		return nil
	}
	var c Conffile
	for {
		rest, last, ok := cutLast(v)
		if !ok {
			return fmt.Errorf("conffile %q: %w", v, errs.Invalid)
		}
		switch {
		case last == "obsolete":
			c.Obsolete = true
		case last == "remove-on-upgrade":
		default:
			c.Path, c.MD5 = rest, last
		}
		if c.Path != "" {
			break
		}
		v = rest
	}
	if !cleanAbs(c.Path) || c.MD5 != "newconffile" && !isMD5(c.MD5) {
		return fmt.Errorf("conffile %q: %w", v, errs.Invalid)
	}
	if len(p.Conffiles) == maxConffiles {
		return fmt.Errorf("more than %d conffiles: %w", maxConffiles, errs.Invalid)
	}
	p.Conffiles = append(p.Conffiles, c)
	return nil
}

func (p *Package) finish() error {
	switch {
	case p.Name == "":
		return fmt.Errorf("no package name: %w", errs.Invalid)
	case p.State == "":
		return fmt.Errorf("package %s: no status: %w", p.Name, errs.Invalid)
	case p.OnDisk() && (p.Arch == "" || p.Version == ""):
		return fmt.Errorf("package %s: no version or architecture: %w", p.Name, errs.Invalid)
	}
	if p.Source == "" {
		p.Source = p.Name
	}
	if p.SourceVersion == "" {
		p.SourceVersion = p.Version
	}
	return nil
}

// ParseDiversions reads var/lib/dpkg/diversions: three lines for each.
func ParseDiversions(b []byte) ([]Diversion, error) {
	if len(b) == 0 {
		return nil, nil
	}
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if len(lines)%3 != 0 || len(lines) > 3*maxDiversions {
		return nil, fmt.Errorf("diversions: %d lines: %w", len(lines), errs.Invalid)
	}
	var out []Diversion
	for i := 0; i < len(lines); i += 3 {
		d := Diversion{From: lines[i], To: lines[i+1], Package: lines[i+2]}
		if d.Package == ":" {
			d.Package = ""
		} else if !dpkgName(d.Package, "+.-") {
			return nil, fmt.Errorf("diversion of %q by %q: %w", d.From, d.Package, errs.Invalid)
		}
		if !cleanAbs(d.From) || !cleanAbs(d.To) {
			return nil, fmt.Errorf("diversion of %q to %q: %w", d.From, d.To, errs.Invalid)
		}
		out = append(out, d)
	}
	return out, nil
}

// ParseMD5Sums reads a package's md5sums: "hex  path", paths relative to "/".
func ParseMD5Sums(b []byte, visit func(name, sum string)) error {
	n := 0
	for line := range strings.SplitSeq(string(b), "\n") {
		n++
		if line == "" {
			continue
		}
		if len(line) < 35 || !isMD5(line[:32]) || line[32] != ' ' || line[33] != ' ' && line[33] != '*' {
			return fmt.Errorf("md5sums, line %d: %w", n, errs.Invalid)
		}
		name := strings.TrimPrefix(line[34:], "./")
		if !cleanAbs("/" + name) {
			return fmt.Errorf("md5sums, line %d: path %q: %w", n, name, errs.Invalid)
		}
		visit(name, line[:32])
	}
	return nil
}

// Alternatives reads var/lib/dpkg/alternatives.
func (d *Dpkg) Alternatives() ([]Alternative, error) {
	e, err := os.ReadDir(d.path("alternatives"))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read alternatives: %w", kindOf(err))
	}
	var out []Alternative
	for _, x := range e {
		if !x.Type().IsRegular() || strings.HasSuffix(x.Name(), ".dpkg-tmp") {
			continue
		}
		b, err := readBounded(filepath.Join(d.path("alternatives"), x.Name()), maxSmallFile*16)
		if err != nil {
			return nil, fmt.Errorf("read alternatives: %w", err)
		}
		a, err := ParseAlternative(x.Name(), b)
		if err != nil {
			return nil, fmt.Errorf("read alternatives: %w", err)
		}
		out = append(out, a)
	}
	return out, nil
}

// ParseAlternative reads one file of var/lib/dpkg/alternatives: mode, link,
// pairs of slave name and link, an empty line, then for each candidate its
// path, priority and one path (or nothing) for each slave, and an empty line.
func ParseAlternative(name string, b []byte) (Alternative, error) {
	bad := func(what string) (Alternative, error) {
		return Alternative{}, fmt.Errorf("alternative %s: %s: %w", name, what, errs.Invalid)
	}
	lines := strings.Split(string(b), "\n")
	if len(lines) < 3 || lines[0] != "auto" && lines[0] != "manual" || !cleanAbs(lines[1]) {
		return bad("head")
	}
	a := Alternative{Name: name, Auto: lines[0] == "auto", Link: lines[1], Slaves: map[string]string{}}
	i := 2
	for ; i < len(lines) && lines[i] != ""; i += 2 {
		if i+1 >= len(lines) || !cleanAbs(lines[i+1]) {
			return bad("slave")
		}
		a.Slaves[lines[i]] = lines[i+1]
	}
	for i++; i < len(lines) && lines[i] != ""; i += 2 + len(a.Slaves) {
		if i+1+len(a.Slaves) >= len(lines) || !cleanAbs(lines[i]) {
			return bad("candidate")
		}
		a.Targets = append(a.Targets, lines[i])
	}
	return a, nil
}

func cutLast(s string) (before, last string, ok bool) {
	i := strings.LastIndexByte(s, ' ')
	if i < 1 {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}

func isMD5(s string) bool {
	_, err := hex.DecodeString(s)
	return len(s) == 32 && err == nil
}

// dpkgName is lower-case letters, digits and the given others, the first of
// them a letter or digit.
func dpkgName(s, others string) bool {
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || i > 0 && strings.IndexByte(others, c) >= 0 {
			continue
		}
		return false
	}
	return s != "" && len(s) < 256
}

func fieldName(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return s != "" && len(s) < 256
}

// cleanAbs is whether a path is absolute, in its shortest form and of sane
// length, so that joining it to a root cannot leave the root.
func cleanAbs(p string) bool {
	return len(p) > 1 && len(p) < 4096 && p[0] == '/' && path.Clean(p) == p && !strings.ContainsRune(p, 0)
}
