package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/codesign"
	"ringwall/internal/codesign/archive"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// maxDeb bounds a package file.
const maxDeb = 8 << 30

// keepRemoved is how long the content of a package that was replaced or removed
// stays authorised: its processes may still run and start their old helpers.
const keepRemoved = 24 * time.Hour

// PackageResult is what became of one package file.
type PackageResult struct {
	File    string `json:"file"`
	Package string `json:"package,omitempty"`
	Version string `json:"version,omitempty"`
	State   string `json:"state"` // trusted, known (was trusted before), refused
	Records int    `json:"records,omitempty"`
	Why     string `json:"why,omitempty"` // of refused

	deb integrity.Digest
}

// indexed is a package as a signed index lists it.
type indexed struct {
	codesign.Package
	archive, suite string
	date           time.Time
}

// TrustPackages verifies package files by the signature chain of the archives
// that the policy trusts (InRelease → Packages → file), lists what they bring
// and authorises it before it returns: apt's hook waits for it, so dpkg never
// unpacks what the kernel does not know yet.
//
// It fails closed, file by file: what no signed index lists is refused and
// authorises nothing.
func (a *Agent) TrustPackages(ctx context.Context, files []string) ([]PackageResult, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded == nil {
		return nil, fmt.Errorf("trust packages: no policy is in force: %w", errs.Conflict)
	}
	out, added, err := a.state.trustPackages(ctx, "/", files, a.loaded.policy.Trust, a.opts.Now())
	if err != nil {
		return nil, fmt.Errorf("trust packages: %w", err)
	}
	if added > 0 {
		if err := a.recompile(ctx); err != nil {
			return nil, fmt.Errorf("trust packages: %w", err)
		}
		if a.bytecode.status.State == bytecodeDone {
			a.bytecode.status.State, a.bytecode.status.Why = bytecodeWaiting, "packages were installed"
		}
	}
	if a.measurer != nil { // dpkg is about to write these, those of known packages again
		a.measurer.expect(a.state.scriptsOf(out, a.loaded.policy.Trust))
	}
	for _, r := range out {
		if r.State == "refused" {
			a.pipe.notice(noticePackage, fmt.Sprintf("package file %s is not trusted: %s", r.File, r.Why))
		}
	}
	return out, nil
}

// trustPackages stores what verifies and says how many are new. It is also how
// a host is set up, before an agent runs. apt's signed indices are those of the
// system below root.
func (s *State) trustPackages(ctx context.Context, root string, files []string, t integrity.Trust, now time.Time) ([]PackageResult, int, error) {
	in := &intake{state: s, root: root, trust: t, now: now, wanted: map[integrity.Digest]*indexed{}}
	defer in.clean()
	results := make([]PackageResult, len(files))
	copies := make([]*incoming, len(files))
	for i, f := range files {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		results[i] = PackageResult{File: f, State: "refused"}
		c, err := in.copy(f)
		if err != nil {
			results[i].Why = err.Error()
			continue
		}
		results[i].deb = c.digest
		if p, err := s.packageRecord(c.digest.String()); err == nil {
			results[i].State, results[i].Package, results[i].Version = "known", p.Package, p.Version
			continue
		}
		copies[i] = c
		in.wanted[c.digest] = nil
	}
	if err := in.findAll(); err != nil {
		return nil, 0, err
	}
	added := 0
	for i, c := range copies {
		if c == nil {
			continue
		}
		if err := in.admit(c, &results[i]); err != nil {
			results[i].Why = err.Error()
			continue
		}
		added++
	}
	return results, added, nil
}

// scriptsOf lists where the scripts of packages lie that were not refused.
func (s *State) scriptsOf(list []PackageResult, t integrity.Trust) []string {
	l := loaded{python: map[string][]moduleSource{}}
	for _, r := range list {
		if r.State == "refused" {
			continue
		}
		src, err := s.packageSource(r.deb.String(), t)
		if err != nil {
			continue // load reports it
		}
		for range l.note(src).Files {
			// note does it
		}
	}
	return l.scripts
}

// intake verifies package files.
type intake struct {
	state  *State
	root   string
	trust  integrity.Trust
	now    time.Time
	wanted map[integrity.Digest]*indexed
	copies []*incoming
	// why says for each suite that could not be used what was wrong with it.
	why []string
}

// incoming is a private copy of a package file: what is hashed and what is
// listed must be the same bytes, whatever happens to the original.
type incoming struct {
	path   string
	digest integrity.Digest
}

func (in *intake) clean() {
	for _, c := range in.copies {
		_ = os.Remove(c.path)
	}
}

func (in *intake) copy(name string) (*incoming, error) {
	src, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	if st, err := src.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > maxDeb {
		return nil, fmt.Errorf("%s: no regular file of up to %d bytes: %w", name, int64(maxDeb), errs.Invalid)
	}
	dst, err := os.CreateTemp(in.state.path(dirIncoming), "deb-*")
	if err != nil {
		return nil, err
	}
	c := &incoming{path: dst.Name()}
	in.copies = append(in.copies, c)
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(dst, h), io.LimitReader(src, maxDeb+1))
	h.Sum(c.digest[:0])
	return c, errors.Join(err, dst.Close())
}

// findAll looks for the wanted digests in every index that a trusted archive
// signed.
func (in *intake) findAll() error {
	if len(in.wanted) == 0 {
		return nil
	}
	lists, err := host.ReadAptLists(in.root)
	if err != nil {
		return err
	}
	for _, s := range lists.Suites {
		if err := in.findIn(s); err != nil {
			in.why = append(in.why, filepath.Base(s.InRelease)+": "+err.Error())
		}
	}
	return nil
}

func (in *intake) findIn(s host.AptSuite) error {
	signed, err := s.Signed()
	if err != nil {
		return err
	}
	suite, name, err := in.verify(signed)
	if err != nil {
		return err
	}
	if err := in.state.seenSuite(name+"/"+suite.Codename+"/"+suite.Suite, suite.Date); err != nil {
		return err
	}
	for _, p := range s.Packages {
		want, ok := suite.Files[p.Name]
		if !ok {
			return fmt.Errorf("%s is not listed: %w", p.Name, errs.Untrusted)
		}
		if err := in.search(p, want, &indexed{archive: name, suite: suite.Codename, date: suite.Date}); err != nil {
			return err
		}
	}
	return nil
}

// verify finds the archive that signed an index.
func (in *intake) verify(signed []byte) (*codesign.Suite, string, error) {
	var all error
	for _, a := range in.trust.Archives {
		suite, err := archive.VerifyInRelease(signed, a.Keyring, in.now)
		if err != nil {
			all = errors.Join(all, fmt.Errorf("archive %s: %w", a.Name, err))
			continue
		}
		if len(a.Origins) > 0 && !slices.Contains(a.Origins, suite.Origin) {
			all = errors.Join(all, fmt.Errorf("archive %s: origin %q: %w", a.Name, suite.Origin, errs.Untrusted))
			continue
		}
		return suite, a.Name, nil
	}
	if all == nil {
		all = fmt.Errorf("the policy trusts no package archive: %w", errs.Untrusted)
	}
	return nil, "", all
}

func (in *intake) search(p host.AptPackages, want codesign.IndexFile, by *indexed) error {
	f, err := p.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	found := map[integrity.Digest]*indexed{}
	err = codesign.VerifyIndex(f, want, func(r io.Reader) error {
		return codesign.ParsePackages(r, func(pkg codesign.Package) error {
			if _, ok := in.wanted[pkg.Digest]; ok {
				x := *by
				x.Package = pkg
				found[pkg.Digest] = &x
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	maps.Copy(in.wanted, found) // only now is the index known to be the signed one
	return nil
}

// admit lists a verified package's content and stores the list.
func (in *intake) admit(c *incoming, r *PackageResult) error {
	x := in.wanted[c.digest]
	if x == nil {
		return fmt.Errorf("no index that a trusted archive signed lists this file (sha256 %s)%s: %w", c.digest, in.reasons(), errs.Untrusted)
	}
	f, err := os.Open(c.path)
	if err != nil {
		return err
	}
	defer f.Close()
	built, err := codesign.Build(codesign.DebSource(f), codesign.Options{AllFiles: true})
	if err != nil {
		return err
	}
	p := &storedPackage{
		Archive: x.archive, Suite: x.suite, Package: x.Package.Package, Version: x.Version, Architecture: x.Architecture,
		Deb: c.digest, Added: in.now.Unix(),
	}
	if err := in.state.addPackage(p, built.Catalogue, built.Names); err != nil {
		return err
	}
	r.State, r.Package, r.Version, r.Records = "trusted", p.Package, p.Version, built.Records
	return nil
}

func (in *intake) reasons() string {
	if len(in.why) == 0 {
		return ""
	}
	return "; " + strings.Join(in.why, "; ")
}

// SettlePackages forgets what is not installed any more and was not added of
// late. dpkg's hook calls it when it is done.
func (a *Agent) SettlePackages(ctx context.Context) (forgotten int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded == nil {
		return 0, nil
	}
	if pid, err := host.DpkgBusy("/"); err == nil && pid != 0 {
		return 0, nil // someone else is at it and will call again
	}
	forgotten, err = a.state.settlePackages(a.opts.Now())
	if err != nil || forgotten == 0 {
		return forgotten, err
	}
	return forgotten, a.recompile(ctx)
}

func (s *State) settlePackages(now time.Time) (int, error) {
	installed, err := host.InstalledPackages("/")
	if err != nil {
		return 0, fmt.Errorf("settle packages: %w", err)
	}
	there := make(map[[3]string]bool, len(installed))
	for _, p := range installed {
		there[[3]string{p.Name, p.Version, p.Arch}] = true
	}
	stems, err := s.stored(dirPackages, ".json")
	if err != nil {
		return 0, fmt.Errorf("settle packages: %w", err)
	}
	n := 0
	for _, stem := range stems {
		p, err := s.packageRecord(stem)
		if err != nil {
			continue // load reports it
		}
		if there[[3]string{p.Package, p.Version, p.Architecture}] || now.Unix()-p.Added < int64(keepRemoved/time.Second) {
			continue
		}
		if err := s.drop(dirPackages, stem, ".json", ".cat", ".names"); err != nil {
			return n, fmt.Errorf("settle packages: %w", err)
		}
		n++
	}
	return n, nil
}

// StoredPackage is a package that this host trusts.
type StoredPackage struct {
	Package      string    `json:"package"`
	Version      string    `json:"version"`
	Architecture string    `json:"architecture"`
	Archive      string    `json:"archive"`
	Suite        string    `json:"suite"`
	SHA256       string    `json:"sha256"` // of the package file
	Added        time.Time `json:"added"`
}

// Packages lists what is stored.
func (s *State) Packages() ([]StoredPackage, error) {
	stems, err := s.stored(dirPackages, ".json")
	if err != nil {
		return nil, err
	}
	var out []StoredPackage
	for _, stem := range stems {
		p, err := s.packageRecord(stem)
		if err != nil {
			return nil, fmt.Errorf("package %s: %w", stem, err)
		}
		out = append(out, StoredPackage{p.Package, p.Version, p.Architecture, p.Archive, p.Suite, stem, time.Unix(p.Added, 0).UTC()})
	}
	return out, nil
}
