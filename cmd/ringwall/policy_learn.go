package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/codesign/archive"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// learnDirs are where executables that no package brought are looked for.
func learnDirs() []string { return []string{"/usr", "/opt", "/srv", "/etc", "/root", "/home"} }

func newPolicyLearnCommand(e *env) *cobra.Command {
	var keys, name, root, events, out string
	var archives, releases []string
	c := &cobra.Command{
		Use:   "learn --keys DIR",
		Short: "Write a first policy from what a host has and does",
		Long: `Looks at a host's packages, which of them an archive's signed index lists, which
of their files were changed, and which executables belong to no package; and, in
an event log, at what ran and what it did. Writes a policy in audit mode with
comments, for a person to read.

What it finds is what is there, not what should be there: learn on a host that
you believe to be clean. MD5 sums and package lists on the host are hints here;
the policy that comes out makes the host verify signatures.

The output is YAML in either output format.`,
		Example: `  ringwall policy learn --keys keys -o learned.yaml
  ringwall policy learn --keys keys --events events.jsonl --release releases -o learned.yaml
  ringwall policy learn --keys keys --root /mnt/image -o image.yaml`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if out != "" && exists(out) {
				return fmt.Errorf("%s is there already: %w", out, errs.Conflict)
			}
			trust, err := learnTrust(e, keys, archives)
			if err != nil {
				return err
			}
			l := &learning{e: e, root: root, owner: map[string]ownedFile{}, altered: map[string]bool{}}
			l.in = integrity.LearnInput{Name: name, Trust: trust}
			if err := l.packages(c.Context()); err != nil {
				return err
			}
			if err := l.releases(releases); err != nil {
				return err
			}
			if events != "" {
				if err := l.events(events); err != nil {
					return err
				}
			}
			trees := l.leaveTrees()
			doc, err := integrity.Learn(l.in)
			if err != nil {
				return err
			}
			doc = append(doc, trees...)
			e.notef("%d packages, %d other executables, %d programs with privileges", len(l.in.Packages), len(l.in.Files), len(l.in.Programs))
			return writeDocument(e, out, string(doc))
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`; its certificates are enough")
	f.StringVar(&name, "name", "", "the policy's `NAME` (default: learned)")
	f.StringVar(&root, "root", "/", "the host's root `DIR`")
	f.StringVar(&events, "events", "", "an event log, JSON lines (- for standard input)")
	f.StringArrayVar(&archives, "archive", nil, "trust a package archive, as `NAME=KEYRING`; repeat (default: Debian's, as in policy init)")
	f.StringArrayVar(&releases, "release", nil, "a release record `FILE`, or a directory of them; repeat")
	f.StringVarP(&out, "out", "o", "", "write to `FILE`, which must not exist")
	require(c, "keys")
	return c
}

// learnTrust is the authority and the archives as a policy's trust.
func learnTrust(e *env, keys string, archives []string) (integrity.Trust, error) {
	var t integrity.Trust
	a, err := pki.LoadCertificates(keys)
	if err != nil {
		return t, err
	}
	for _, p := range []pki.Purpose{pki.PurposeBuild, pki.PurposePolicy, pki.PurposePermit} { // those that hosts ask for
		signs := []string{p.String()}
		if p == pki.PurposePolicy {
			signs = append(signs, codesign.SignsSupplement)
		}
		c := a.Issuers[p].Cert
		t.Authorities = append(t.Authorities, integrity.Authority{Name: c.Subject.CommonName, Signs: signs, Certificate: c})
	}
	t.Timestamps = []integrity.Timestamp{{Name: a.TSA.Cert.Subject.CommonName, Certificate: a.TSA.Cert}}
	for _, o := range a.OtherTSAs {
		t.Timestamps = append(t.Timestamps, integrity.Timestamp{Name: o.Name, Certificate: o.Cert})
	}
	if a.Log != nil {
		t.Logs = []pki.LogAnchor{*a.Log}
	}
	kept, err := readArchives(archives)
	if err != nil {
		return t, err
	}
	for _, k := range kept {
		t.Archives = append(t.Archives, integrity.Archive{Name: k.name, Origins: k.origins, Keyring: k.keyring})
	}
	if len(kept) == 0 {
		e.notef("It trusts no package archive: nothing of the distribution will be authorised.")
	}
	return t, nil
}

// learning is what is found out about a host.
type learning struct {
	e       *env
	root    string
	in      integrity.LearnInput
	owner   map[string]ownedFile // by path on the disk
	altered map[string]bool      // paths of packages' files that differ
}

// ownedFile is a file of a package, by the name that it has there.
type ownedFile struct{ pkg, name string }

// packages asks the dpkg database, apt's signed indices and the disk.
func (l *learning) packages(ctx context.Context) error {
	db, err := host.OpenDpkg(l.root)
	if errors.Is(err, errs.NotFound) {
		l.e.notef("There is no dpkg database below %s.", l.root)
		return nil
	}
	if err != nil {
		return err
	}
	listed, err := l.listed(db.Packages())
	if err != nil {
		return err
	}
	at := map[string]int{} // package in l.in.Packages
	for _, p := range db.Packages() {
		files, err := db.PackageFiles(p)
		if err != nil {
			return err
		}
		for _, f := range files {
			l.owner[f.Disk] = ownedFile{p.Name, strings.TrimPrefix(f.Path, "/")}
		}
		at[p.Name] = len(l.in.Packages)
		l.in.Packages = append(l.in.Packages, integrity.LearnedPackage{Archive: listed[packageKey(p.Name, p.Version, p.Arch)], Name: p.Name, Version: p.Version})
	}
	l.e.notef("comparing the files of %d packages …", len(l.in.Packages))
	var unowned []string
	_, err = db.VerifyMD5(ctx, host.VerifyOptions{Unowned: learnDirs()}, func(f host.Finding) error {
		switch {
		case f.Kind == host.FileChanged && !f.Conffile:
			l.altered[f.Path] = true
			name, _, _ := strings.Cut(f.Package, ":")
			if i, ok := at[name]; ok {
				l.in.Packages[i].Altered++
			}
		case f.Kind == host.FileUnowned && !strings.Contains(f.Path, "/__pycache__/"):
			unowned = append(unowned, f.Path) // caches that Python makes are not software
		}
		return nil
	})
	if err != nil {
		return err
	}
	return l.unowned(ctx, unowned)
}

func packageKey(name, version, arch string) string { return name + " " + version + " " + arch }

// listed finds the archive whose signed index lists each package.
func (l *learning) listed(want []host.Package) (map[string]string, error) {
	out := map[string]string{}
	lists, err := host.ReadAptLists(l.root)
	if errors.Is(err, errs.NotFound) {
		l.e.notef("apt has no lists below %s: no package can be found in a signed index; run apt-get update first.", l.root)
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	for _, p := range want {
		wanted[packageKey(p.Name, p.Version, p.Arch)] = true
	}
	for _, s := range lists.Suites {
		if err := l.listedIn(s, wanted, out); err != nil {
			l.e.notef("%s is not used: %v", filepath.Base(s.InRelease), err)
		}
	}
	return out, nil
}

func (l *learning) listedIn(s host.AptSuite, wanted map[string]bool, out map[string]string) error {
	signed, err := s.Signed()
	if err != nil {
		return err
	}
	var suite *codesign.Suite
	name, refused := "", fmt.Errorf("no archive is trusted: %w", errs.Untrusted)
	for _, a := range l.in.Trust.Archives {
		x, err := archive.VerifyInRelease(signed, a.Keyring, l.e.now())
		if err == nil && len(a.Origins) > 0 && !slices.Contains(a.Origins, x.Origin) {
			err = fmt.Errorf("origin %q: %w", x.Origin, errs.Untrusted)
		}
		if refused = err; err == nil {
			suite, name = x, a.Name
			break
		}
	}
	if suite == nil {
		return refused
	}
	for _, p := range s.Packages {
		found, err := listedPackages(p, suite, wanted)
		if err != nil {
			return err
		}
		for _, k := range found {
			out[k] = name
		}
	}
	return nil
}

// listedPackages are the wanted packages of one index, once it is known to be
// the signed one.
func listedPackages(p host.AptPackages, suite *codesign.Suite, wanted map[string]bool) ([]string, error) {
	want, ok := suite.Files[p.Name]
	if !ok {
		return nil, fmt.Errorf("%s is not listed: %w", p.Name, errs.Untrusted)
	}
	f, err := p.Open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	err = codesign.VerifyIndex(f, want, func(r io.Reader) error {
		return codesign.ParsePackages(r, func(x codesign.Package) error {
			if k := packageKey(x.Package, x.Version, x.Architecture); wanted[k] {
				found = append(found, k)
			}
			return nil
		})
	})
	return found, err
}

// fileList is some files below a root as a source; those that are no code, or
// gone, are left out.
type fileList struct {
	ctx   context.Context //nolint:containedctx // one walk is one call
	root  string
	paths []string
	bad   []string
}

// Walk implements codesign.Source.
func (l *fileList) Walk(visit func(codesign.Member, io.Reader) error) error {
	for _, p := range l.paths {
		if err := l.ctx.Err(); err != nil {
			return err
		}
		disk := filepath.Join(l.root, p)
		if st, err := os.Lstat(disk); err != nil || !st.Mode().IsRegular() {
			continue // a link is no content of its own
		}
		if err := visitCode(disk, strings.TrimPrefix(p, "/"), visit); err != nil && !errors.Is(err, fs.ErrNotExist) {
			l.bad = append(l.bad, fmt.Sprintf("%s: %v", disk, err))
		}
	}
	return nil
}

// unowned measures the code that no package brought.
func (l *learning) unowned(ctx context.Context, paths []string) error {
	slices.Sort(paths)
	list := &fileList{ctx: ctx, root: l.root, paths: paths}
	contents, err := measure(list, codesign.Options{})
	if err != nil {
		return err
	}
	for _, bad := range list.bad {
		l.e.notef("not read: %s", bad)
	}
	for _, m := range contents {
		if m.Flags&codesign.FlagInner != 0 {
			continue
		}
		for _, p := range m.paths {
			l.in.Files = append(l.in.Files, integrity.LearnedFile{SHA256: m.Digest, Path: "/" + p, Kinds: m.Kinds})
		}
	}
	return nil
}

// releases takes what verified releases list out of the files of unknown
// origin, and notes the releases that are here.
func (l *learning) releases(paths []string) error {
	if len(paths) == 0 {
		return nil
	}
	sources, err := loadSources(paths, &integrity.Policy{Trust: l.in.Trust})
	if err != nil {
		return err
	}
	for _, s := range sources {
		lists := map[integrity.Digest]bool{}
		for f := range s.Files {
			lists[f.SHA256] = true
		}
		before := len(l.in.Files)
		l.in.Files = slices.DeleteFunc(l.in.Files, func(f integrity.LearnedFile) bool { return lists[f.SHA256] })
		if len(l.in.Files) < before {
			l.in.Releases = append(l.in.Releases, s.Origin)
		} else {
			l.e.notef("release %s %s: nothing of it is here", s.Origin.Product, s.Origin.Version)
		}
	}
	return nil
}

// maxListed is how many executables of one tree are listed by digest.
const maxListed = 100

// treeOf is the directory that a file's software seems to be installed in; ""
// for a file that lies directly in a directory that everybody uses.
func treeOf(file string) string {
	shared := []string{
		"/usr", "/usr/*", "/usr/lib/*-linux-gnu", "/usr/local/bin", "/usr/local/sbin", "/usr/local/lib", "/usr/local/share",
		"/opt", "/srv", "/etc", "/root", "/home", "/home/*",
	}
	file = path.Clean("/" + file)
	for i := 1; i < len(file); i++ {
		if file[i] != '/' {
			continue
		}
		dir := file[:i]
		if !slices.ContainsFunc(shared, func(s string) bool { ok, err := path.Match(s, dir); return ok && err == nil }) {
			return dir
		}
	}
	return ""
}

// leaveTrees takes big trees out of the files of unknown origin: they are
// software, to be signed as such. It returns the comment that says so.
func (l *learning) leaveTrees() []byte {
	count := map[string]int{}
	for _, f := range l.in.Files {
		count[treeOf(f.Path)]++
	}
	delete(count, "")
	maps.DeleteFunc(count, func(_ string, n int) bool { return n <= maxListed })
	if len(count) == 0 {
		return nil
	}
	l.in.Files = slices.DeleteFunc(l.in.Files, func(f integrity.LearnedFile) bool { return count[treeOf(f.Path)] > 0 })
	var out strings.Builder
	out.WriteString("\n# Not allowed by this policy: trees with too many executables to list. Sign those\n# that should run, and rule own-builds of `ringwall policy init` allows them:\n")
	for _, dir := range sortedKeys(count) {
		fmt.Fprintf(&out, "#   ringwall sign %s --keys DIR --product NAME --version VERSION # %d executables\n", printable(shown(dir)), count[dir])
	}
	return []byte(out.String())
}

// events adds what ran, and what programs did that needs a role.
func (l *learning) events(file string) error {
	type use struct {
		digest integrity.Digest
		path   string
	}
	at := map[use]int{}
	for i, f := range l.in.Files {
		at[use{f.SHA256, f.Path}] = i
	}
	does := map[string]integrity.Role{}
	err := readEventLines(l.e, file, func(r *recorded) error {
		if role := roleFor(r.Reason); role != 0 && r.Process != nil && filepath.IsAbs(r.Process.Program) {
			does[r.Process.Program] |= role
			return nil
		}
		kind, err := integrity.ParseKind(r.Kind)
		key, err2 := integrity.ParseKey(r.Digest)
		if err != nil || err2 != nil || key.Space != integrity.SpaceSHA256 || l.packaged(r.Path) {
			return nil // what its package authorises needs no digest
		}
		u := use{key.Digest, r.Path}
		i, ok := at[u]
		if !ok {
			i = len(l.in.Files)
			at[u] = i
			l.in.Files = append(l.in.Files, integrity.LearnedFile{SHA256: u.digest, Path: u.path})
		}
		l.in.Files[i].Kinds |= integrity.SetOf(kind)
		l.in.Files[i].Uses += max(r.Count, 1)
		return nil
	})
	if err != nil {
		return err
	}
	return l.programs(does)
}

// packaged says whether it is an unaltered file of a package.
func (l *learning) packaged(file string) bool {
	_, ok := l.ownerOf(file)
	return ok && !l.altered[file]
}

// ownerOf finds a file's package. Debian 12's packages still name files in /bin
// and /lib, which are links into /usr.
func (l *learning) ownerOf(file string) (ownedFile, bool) {
	o, ok := l.owner[file]
	if !ok {
		o, ok = l.owner[strings.TrimPrefix(file, "/usr")]
	}
	return o, ok
}

// roleFor is the role that makes an event of this reason go away; 0: none does.
func roleFor(reason string) integrity.Role {
	switch reason {
	case "memory-anonymous", "memory-wx", "memory-file":
		return integrity.RoleJIT
	case "ptrace", "proc-mem":
		return integrity.RoleDebug
	case "bpf-load":
		return integrity.RoleBPF
	case "block-write":
		return integrity.RoleBlock
	}
	return 0
}

func (l *learning) programs(does map[string]integrity.Role) error {
	for file, role := range does {
		p := integrity.LearnedProgram{Path: file, Does: role}
		if o, ok := l.ownerOf(file); ok {
			p.Package, p.Path = o.pkg, "/"+o.name
		} else {
			contents, err := measure(oneFile{filepath.Join(l.root, file)}, codesign.Options{AllFiles: true})
			if err != nil || len(contents) == 0 {
				l.e.notef("program %s is not here any more; no rule is written for it", shown(file))
				continue
			}
			p.SHA256 = contents[0].Digest
		}
		l.in.Programs = append(l.in.Programs, p)
	}
	slices.SortFunc(l.in.Programs, func(a, b integrity.LearnedProgram) int { return cmp.Compare(a.Path, b.Path) })
	return nil
}
