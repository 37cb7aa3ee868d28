package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/agent"
	builds "ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/hypervisor"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// candidateGuest is the guest of one trial run, seen from outside.
type candidateGuest struct {
	*csvRunOptions
	e         *env
	dir       string // for everything that the run makes
	artefact  *artefact
	path      string
	smoke     [][]string
	candidate *csv.SignedRelease
	began     time.Time
	notes     []string
}

// guestStarts is how often a guest is started whose kernel panics before it says
// anything: an emulator on a busy host does that, and nothing was tried by then.
const guestStarts = 3

func (g *candidateGuest) run(ctx context.Context) (*csv.Run, error) {
	m, err := g.machine(ctx)
	if err != nil {
		return nil, fmt.Errorf("csv run: %w", err)
	}
	how := "emulated, which takes a minute or more"
	if hypervisor.HaveKVM() {
		how = "by KVM"
	}
	if !isStatic() {
		g.e.notef("this ringwall needs libraries, and the guest's kernel has none to start it with: build it with ./build, or with CGO_ENABLED=0")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, g.timeout, errTooLong)
	defer cancel()
	for try := 1; ; try++ {
		g.say("starting the guest, %s", how)
		var out *csv.Run
		end, err := m.Run(ctx, func(r io.Reader) (err error) {
			out, err = csv.ParseRun(r, func(step string) { g.say("%s", step) })
			return err
		})
		switch {
		case errors.Is(err, errTooLong):
			return nil, codedError{csv.ExitHold, hint(fmt.Errorf("csv run: the guest did not end within %v", g.timeout), "--timeout gives it longer")}
		case err != nil:
			return nil, fmt.Errorf("csv run: %w", err)
		case end.Panicked() && out.Lines == 0 && try < guestStarts:
			continue
		case out.Lines == 0:
			return nil, codedError{csv.ExitHold, fmt.Errorf("csv run: the guest said nothing; the end of its kernel's messages: %s", lastPart(end.Console, 1500))}
		}
		if !out.Ended && len(out.Failed) == 0 && end.Console != "" {
			g.e.notef("the end of the guest kernel's messages:\n%s", lastPart(end.Console, 3000))
		}
		return out, nil
	}
}

// errTooLong is why a guest that takes too long is stopped.
var errTooLong = errors.New("the guest takes too long")

func lastPart(s string, n int) string {
	s = strings.TrimSpace(s)
	return strings.ToValidUTF8(s[max(0, len(s)-n):], "?")
}

func (g *candidateGuest) say(format string, a ...any) {
	g.e.notef("[%4.0fs] %s", g.e.now().Sub(g.began).Seconds(), fmt.Sprintf(format, a...))
}

func (g *candidateGuest) machine(ctx context.Context) (*hypervisor.Machine, error) {
	kernel, modules, err := g.findKernel()
	if err != nil {
		return nil, err
	}
	disk, err := g.disk(ctx)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", g.image, err)
	}
	payload, err := g.payload(ctx)
	if err != nil {
		return nil, err
	}
	initrd := filepath.Join(g.dir, "initramfs")
	if err := writeGuestInitramfs(initrd, modules); err != nil {
		return nil, err
	}
	return &hypervisor.Machine{
		Kernel: kernel, Initramfs: initrd, CPUs: g.cpus, MemMiB: g.memory,
		// bpf must be among the security modules, whatever the kernel's own choice is
		Cmdline: "lsm=landlock,lockdown,yama,integrity,apparmor,bpf systemd.unit=multi-user.target systemd.show_status=error rdinit=" + guestInit + " -- csv guest",
		Disks: []hypervisor.Disk{
			{Path: disk, Format: "qcow2"},
			{Path: payload, Format: "raw", Serial: payloadDisk, ReadOnly: true},
		},
	}, nil
}

// guestModuleNames are what the guest needs to find and mount its disks and to
// report, where its kernel has them as modules.
func guestModuleNames() []string {
	return []string{"virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "crc32c_generic", "crc32c_intel", "libcrc32c", "ext4", "xfs", "btrfs"}
}

func writeGuestInitramfs(path, modules string) error {
	order, err := hypervisor.LoadOrder(modules, guestModuleNames(), hypervisor.ReadModule)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	a := hypervisor.NewInitramfs(f)
	for _, d := range []string{"dev", "proc", "sys", guestRoot, guestModules} {
		a.Dir(d)
	}
	a.Copy(guestInit, "/proc/self/exe")
	for i, m := range order {
		a.File(fmt.Sprintf("%s/%03d-%s", guestModules, i, m.Name), 0o600, m.Data)
	}
	return errors.Join(a.Close(), f.Close())
}

// isStatic says whether this program runs where there are no libraries yet, as it
// must in the guest.
func isStatic() bool {
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// findKernel returns the boot image and its modules.
func (g *candidateGuest) findKernel() (kernel, modules string, err error) {
	if g.kernel != "" {
		kernel, modules = g.kernel, g.modules
		if modules == "" {
			release := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
			modules = filepath.Join(filepath.Dir(kernel), "../lib/modules", release)
		}
		if _, err := os.Stat(kernel); err != nil {
			return "", "", fmt.Errorf("kernel: %w", err)
		}
		if _, err := os.Stat(modules); err != nil {
			return "", "", hint(fmt.Errorf("the kernel's modules: %w", err), "say where they are with --modules")
		}
		return kernel, modules, nil
	}
	roots := []string{"/"}
	if st, err := os.Stat(g.image); err == nil && st.IsDir() {
		roots = []string{g.image, "/"}
	}
	for _, root := range roots {
		found, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
		slices.SortFunc(found, func(a, b string) int { return compareVersions(b, a) })
		for _, k := range found {
			m := filepath.Join(root, "lib/modules", strings.TrimPrefix(filepath.Base(k), "vmlinuz-"))
			if _, err := os.Stat(m); err == nil {
				return k, m, nil
			}
		}
	}
	return "", "", hint(fmt.Errorf("no kernel with its modules in %s: %w", strings.Join(roots, " or "), errs.NotFound), "give --kernel and --modules")
}

// compareVersions compares names by their runs of digits as numbers.
func compareVersions(a, b string) int {
	digits := func(s string) int {
		n := 0
		for n < len(s) && s[n] >= '0' && s[n] <= '9' {
			n++
		}
		return n
	}
	for a != "" && b != "" {
		n, m := digits(a), digits(b)
		if n > 0 && m > 0 {
			x, _ := strconv.ParseUint(a[:n], 10, 64)
			y, _ := strconv.ParseUint(b[:m], 10, 64)
			if c := cmp.Compare(x, y); c != 0 {
				return c
			}
			a, b = a[n:], b[m:]
			continue
		}
		if a[0] != b[0] {
			return cmp.Compare(a[0], b[0])
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

// diskFree is how much a guest can write to a disk that is made for it, in MiB.
const diskFree = 2048

// disk returns an image that takes the guest's writes.
func (g *candidateGuest) disk(ctx context.Context) (string, error) {
	st, err := os.Stat(g.image)
	if err != nil {
		return "", err
	}
	base, tree := g.image, g.image
	isTar := false
	if !st.IsDir() {
		if isTar, err = looksLikeTar(g.image); err != nil {
			return "", err
		}
	}
	if isTar {
		tree = filepath.Join(g.dir, "tree")
		if err := os.Mkdir(tree, 0o700); err != nil {
			return "", err
		}
		// the system's own, for owners, capabilities and devices
		out, err := exec.CommandContext(ctx, "tar", "-x", "-p", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-f", g.image, "-C", tree).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("tar: %w: %s", err, lastOutput(out))
		}
	}
	if st.IsDir() || isTar {
		if err := needRoot("csv run with a directory or tar as image"); err != nil {
			return "", err
		}
		g.say("making a disk of %s", g.image)
		base = filepath.Join(g.dir, "base")
		if err := hypervisor.MakeDisk(ctx, base, tree, diskFree); err != nil {
			return "", err
		}
	}
	over := filepath.Join(g.dir, "overlay")
	return over, hypervisor.Overlay(ctx, over, base)
}

// looksLikeTar tells an archive, compressed or not, from a disk.
func looksLikeTar(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	head := make([]byte, 512)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return false, err
	}
	return codesign.Compression(head[:n]) != "" || n > 262 && string(head[257:262]) == "ustar", nil
}

// payload makes the disk with the host's state, the candidate and the plan: an
// archive as it is, so that the guest needs no file system for it.
func (g *candidateGuest) payload(ctx context.Context) (string, error) {
	format, err := installs(g.artefact.Format)
	if err != nil {
		return "", err
	}
	state := filepath.Join(g.dir, "state")
	supplements, err := g.prepare(ctx, state)
	if err != nil {
		return "", err
	}
	plan := trialPlan{Format: format, File: "candidate." + format, Into: g.into, Smoke: g.smoke, Wait: g.wait.Seconds(), Init: g.init}
	if plan.Files, err = g.files(); err != nil {
		return "", fmt.Errorf("artefact: %w", err)
	}
	file := g.path
	if format == "tar" {
		file = filepath.Join(g.dir, "candidate.tar")
		if err := g.archive(file); err != nil {
			return "", fmt.Errorf("artefact: %w", err)
		}
	}
	out := filepath.Join(g.dir, "payload")
	f, err := os.OpenFile(out, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	t := tar.NewWriter(f)
	err = addTree(t, state, strings.TrimPrefix(agent.DefaultStateDir, "/"))
	in := strings.TrimPrefix(guestDir, "/") + "/"
	if err == nil {
		err = addFile(t, file, in+plan.File)
	}
	for i, s := range supplements {
		name := fmt.Sprintf("supplement-%d", i)
		plan.Adds = append(plan.Adds, name)
		if err == nil {
			err = addBytes(t, s, in+name)
		}
	}
	b, jerr := json.Marshal(plan)
	if err = errors.Join(err, jerr); err == nil {
		err = addBytes(t, b, in+filepath.Base(guestPlan))
	}
	if err = errors.Join(err, t.Close()); err == nil {
		err = padDisk(f)
	}
	return out, errors.Join(err, f.Close())
}

// padDisk makes a file a whole number of sectors, and a disk at all.
func padDisk(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	const unit = 1 << 20
	return f.Truncate((st.Size()/unit + 1) * unit)
}

// files lists where the candidate's code will be in the guest, for kernels that
// must measure it before it is read.
func (g *candidateGuest) files() ([]string, error) {
	into := "/"
	if f := g.artefact.Format; f == builds.FormatTar || f == builds.FormatDir {
		into = g.into
	}
	var out []string
	err := g.artefact.Walk(func(m codesign.Member, r io.Reader) error {
		if r != nil && !m.Install && !m.Nested && m.Mode.IsRegular() {
			out = append(out, filepath.Join(into, m.Path))
		}
		return nil
	})
	return out, err
}

// prepare makes the state of a host that has the policy, its releases and
// packages, and the candidate's release. It returns the supplements, signed.
func (g *candidateGuest) prepare(ctx context.Context, state string) ([][]byte, error) {
	doc, policy, err := g.livePolicy()
	if err != nil {
		return nil, err
	}
	k, err := newTrialKeys(g.e.now())
	if err != nil {
		return nil, err
	}
	copied, err := csv.AuditCopy(doc, k.ca, k.tsa)
	if err != nil {
		return nil, err
	}
	u := agent.Setup{Anchor: k.anchor()}
	u.Anchor.Settings.TPM = host.NoTPM // never this machine's
	if u.Policy, err = codesign.SignPolicy(k.signer, copied); err != nil {
		return nil, err
	}
	if u.Releases, err = g.hostReleases(policy); err != nil {
		return nil, err
	}
	if u.Packages, err = debFiles(g.where.Packages); err != nil {
		return nil, err
	}
	if u.Root, err = g.listsRoot(); err != nil {
		return nil, err
	}
	if len(u.Packages) > 0 {
		g.say("verifying %d packages", len(u.Packages))
	}
	p, err := agent.Prepare(ctx, state, u, g.e.now())
	if err != nil {
		return nil, err
	}
	g.packageNotes(p.Packages)
	var out [][]byte
	for _, f := range g.where.Supplements {
		b, err := readBounded(f, maxPolicyFile)
		if err != nil {
			return nil, fmt.Errorf("supplement: %w", err)
		}
		if b, err = codesign.SignPolicy(k.signer, b); err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

func (g *candidateGuest) packageNotes(list []agent.PackageResult) {
	refused := 0
	first := ""
	for _, r := range list {
		if r.State == "refused" {
			if refused++; first == "" {
				first = filepath.Base(r.File) + ": " + r.Why
			}
		}
	}
	if refused > 0 {
		g.notes = append(g.notes, fmt.Sprintf("%d of %d packages that the guest did not believe, such as %s", refused, len(list), first))
	}
}

// hostReleases are what hosts have, and the candidate's own where the policy
// believes it; judging says so where it does not.
func (g *candidateGuest) hostReleases(p *integrity.Policy) ([]agent.ReleaseRequest, error) {
	if _, err := loadSources(g.where.Releases, p); err != nil {
		return nil, err
	}
	out, err := readReleases(g.where.Releases)
	if err != nil || g.candidate == nil {
		return out, err
	}
	c := g.candidate
	rel, cat, err := codesign.VerifyTrusted(c.Bundle, c.Catalogue, p)
	if err == nil {
		_, err = rel.VerifyNames(c.Names, cat)
	}
	if err == nil {
		out = append(out, agent.ReleaseRequest{Record: c.Bundle, Catalogue: c.Catalogue, Names: c.Names})
	}
	return out, nil //nolint:nilerr // csv.JudgeRun reports a release that is not believed
}

// listsRoot is a directory that stands for / where apt's signed indices are.
func (g *candidateGuest) listsRoot() (string, error) {
	if g.lists == "" {
		if st, err := os.Stat(g.image); err == nil && st.IsDir() {
			return g.image, nil
		}
		return "/", nil
	}
	abs, err := filepath.Abs(g.lists)
	if err != nil {
		return "", err
	}
	root := filepath.Join(g.dir, "root")
	if err := os.MkdirAll(root+"/var/lib/apt", 0o700); err != nil {
		return "", err
	}
	return root, os.Symlink(abs, root+"/var/lib/apt/lists")
}

// trialKeys sign the guest's policy. They exist in memory only, and no host
// trusts them.
type trialKeys struct {
	ca, tsa *x509.Certificate
	signer  *pki.Signer
}

func newTrialKeys(now time.Time) (*trialKeys, error) {
	now = now.Add(-5 * time.Minute) // the guest's clock may be a little behind
	var keys [3]*ecdsa.PrivateKey
	for i := range keys {
		k, err := pki.NewKey()
		if err != nil {
			return nil, err
		}
		keys[i] = k
	}
	root, err := pki.NewRoot("csv run root", keys[0], now)
	if err != nil {
		return nil, err
	}
	ca, err := root.IssueCA(pki.PurposePolicy, "csv run policy CA", keys[1], now)
	if err != nil {
		return nil, err
	}
	tsa, err := root.IssueTSA("csv run TSA", keys[2], now)
	if err != nil {
		return nil, err
	}
	a := pki.Authority{Issuers: map[pki.Purpose]*pki.Issuer{pki.PurposePolicy: ca}, TSA: &pki.TSA{Cert: tsa, Key: keys[2], Now: func() time.Time { return now }}}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: "spiffe://csv-run.invalid/policy/trial", Now: now})
	if err != nil {
		return nil, err
	}
	return &trialKeys{ca: ca.Cert, tsa: tsa, signer: s}, nil
}

func (k *trialKeys) anchor() agent.Anchor {
	return agent.AnchorFor([]*x509.Certificate{k.ca}, []*x509.Certificate{k.tsa})
}

// archive makes a plain tar of the candidate.
func (g *candidateGuest) archive(to string) error {
	f, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if g.artefact.Format == builds.FormatTar {
		return errors.Join(plainTar(f, g.path), f.Close())
	}
	t := tar.NewWriter(f)
	return errors.Join(addTree(t, g.path, "."), t.Close(), f.Close())
}

// addTree adds a directory under another name; root owns all of it.
func addTree(t *tar.Writer, dir, as string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		link := ""
		switch {
		case st.Mode()&fs.ModeSymlink != 0:
			if link, err = os.Readlink(path); err != nil {
				return err
			}
		case !st.IsDir() && !st.Mode().IsRegular():
			return nil // runs nothing
		}
		h, err := tar.FileInfoHeader(st, link)
		if err != nil {
			return err
		}
		h.Name, h.Uid, h.Gid, h.Uname, h.Gname = filepath.Join(as, rel), 0, 0, "", ""
		if err := t.WriteHeader(h); err != nil || !st.Mode().IsRegular() {
			return err
		}
		return copyFile(t, path)
	})
}

func addFile(t *tar.Writer, path, as string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: as, Mode: 0o644, Size: st.Size(), ModTime: st.ModTime()}); err != nil {
		return err
	}
	return copyFile(t, path)
}

func addBytes(t *tar.Writer, b []byte, as string) error {
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: as, Mode: 0o600, Size: int64(len(b))}); err != nil {
		return err
	}
	_, err := io.Copy(t, bytes.NewReader(b))
	return err
}

func copyFile(to io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(to, f)
	return err
}
