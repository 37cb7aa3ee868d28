package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	builds "ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/hypervisor"
	"ringwall/internal/integrity"
)

// csvRunOptions are what csv run was asked.
type csvRunOptions struct {
	report  csvOptions // outputs, strict, release, archive, owners
	where   csv.CellSpec
	lists   string
	image   string
	kernel  string
	modules string
	init    string
	into    string
	smoke   []string
	timeout time.Duration
	wait    time.Duration
	memory  int
	cpus    int
}

func newCSVRunCommand(e *env) *cobra.Command {
	var o csvRunOptions
	c := &cobra.Command{
		Use:   "run ARTEFACT --policy FILE --image IMAGE",
		Short: "Install and try a build in a throw-away guest, and report what hosts would refuse",
		Long: `Boots a virtual machine without network, puts the policy in force there in audit
mode, installs the build (a .deb, an .rpm, a tar or a directory), runs the smoke
tests, and judges what the kernel saw: everything that would be refused on a host
is a finding, with whether the build brings it or it was made on the spot. What
ringwall csv verify asks about files, this asks about what they do.

IMAGE is a disk (raw or qcow2) with a root file system, or a directory or tar of
one, such as mmdebstrap makes; it is never written to. With systemd in it the
guest boots by systemd, otherwise the build is tried without an init. A directory
or tar needs root and mke2fs. Kernel and modules are the newest in a directory
IMAGE, else of this machine, unless --kernel says otherwise.

The policy is the YAML that hosts run. The guest gets a copy of it that audits,
signed by a key that is made for this run and thrown away; releases and packages
(--host-release, --host-package) are verified in it as on a host. Without the
packages that the image was made of, the guest's own shell is unknown to the
policy, and what it reads is not seen.

A smoke test is a program with its arguments; no shell looks at them. One that
fails, an installation that fails and a guest that does not report to its end are
exit code 4: cannot be decided. The guest runs the build as root, and so the
report shows what an honest build does; it is no proof against a hostile one.

The report is that of csv verify. svr is not among its forms: a verdict needs
csv verify, which asks about all of a build.`,
		Example: `  ringwall csv run edged_4.7.0_amd64.deb --release edged_4.7.0_amd64.release.json --policy base.yaml --image bookworm.qcow2 --host-package debs --smoke 'edged --version'
  ringwall csv run ./dist --into /opt/edged --policy base.yaml --image ./rootfs --smoke '/opt/edged/bin/edged --selftest' --output text --output junit=run.xml
  ringwall csv run edged.deb --policy base.yaml --image disk.raw --kernel vmlinuz-6.1.0-30-cloud-amd64 --modules lib/modules/6.1.0-30-cloud-amd64`,
		Args: exactly("ARTEFACT"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.where.Policy, "policy", "", "the policy's YAML `FILE`")
	f.StringArrayVar(&o.where.Supplements, "supplement", nil, "a supplemental policy's YAML `FILE`; repeat")
	f.StringArrayVar(&o.where.Releases, "host-release", nil, "a release record `FILE` that hosts have already, or a directory of them; repeat")
	f.StringArrayVar(&o.where.Packages, "host-package", nil, "a Debian package `FILE` that the image has, or a directory of them; repeat")
	f.StringVar(&o.where.Archive, "host-archive", "", "the `NAME` of the archive that they come from (default: the policy's only one)")
	f.StringVar(&o.lists, "host-lists", "", "`DIR` with the signed indices that vouch for them (default: var/lib/apt/lists of a directory IMAGE, else of this machine)")
	f.StringVar(&o.image, "image", "", "`IMAGE` of a host: a disk, a directory or a tar")
	f.StringVar(&o.kernel, "kernel", "", "boot image `FILE` of the guest's kernel")
	f.StringVar(&o.modules, "modules", "", "its `DIR` lib/modules/RELEASE (default: the one beside the kernel)")
	f.StringVar(&o.init, "init", "auto", "what starts the guest's system: auto, systemd or none")
	f.StringVar(&o.into, "into", "/", "where a tar or directory is unpacked in the guest, `DIR`")
	f.StringArrayVar(&o.smoke, "smoke", nil, "`COMMAND` to run after installation; repeat")
	f.DurationVar(&o.timeout, "timeout", 20*time.Minute, "how long the guest may take")
	f.DurationVar(&o.wait, "wait", 2*time.Second, "how long to watch after installation and after each smoke test")
	f.IntVar(&o.memory, "memory", 1024, "the guest's memory in `MIB`")
	f.IntVar(&o.cpus, "cpus", 2, "the guest's processors")
	f.StringVar(&o.report.release, "release", "", "the build's release record `FILE`")
	f.StringVar(&o.report.archive, "from-archive", "", "the build is a package of this archive `NAME`, taken at its word")
	f.StringArrayVar(&o.report.outputs, "output", nil, "write the report as `FORMAT[=FILE]`; repeat (text, json, sarif, junit, markdown)")
	f.BoolVar(&o.report.strict, "strict", false, "warnings are exit code 2")
	o.report.notify.flags(c)
	complete(c, "output", "text", "json", "sarif", "junit", "markdown")
	complete(c, "init", "auto", "systemd", "none")
	_ = c.MarkFlagFilename("policy", "yaml", "yml")
	_ = c.MarkFlagDirname("modules")
	return c
}

// check refuses what cannot be meant, before anything long begins.
func (o *csvRunOptions) check() ([]output, [][]string, error) {
	outputs, err := parseOutputs(o.report.outputs)
	if err != nil {
		return nil, nil, err
	}
	for _, x := range outputs {
		if x.format == "svr" {
			return nil, nil, usage(errors.New("--output svr: a verdict needs ringwall csv verify, which asks about all of a build"))
		}
	}
	switch {
	case o.where.Policy == "" || o.image == "":
		return nil, nil, usage(errors.New("--policy and --image are missing: under what, and in what, the build is tried"))
	case o.report.release != "" && o.report.archive != "":
		return nil, nil, usage(errors.New("a build is signed or comes from an archive: give --release or --from-archive"))
	case o.init != "auto" && o.init != "systemd" && o.init != "none":
		return nil, nil, usage(fmt.Errorf("--init %q: want auto, systemd or none", o.init))
	case !filepath.IsAbs(o.into):
		return nil, nil, usage(fmt.Errorf("--into %q: want an absolute path in the guest", o.into))
	case o.memory < 256 || o.cpus < 1 || o.cpus > 64:
		return nil, nil, usage(errors.New("--memory wants 256 or more, --cpus 1 to 64"))
	case o.timeout <= 0 || o.wait < 0 || o.wait > time.Hour:
		return nil, nil, usage(errors.New("--timeout and --wait want times such as 20m and 2s"))
	case o.modules != "" && o.kernel == "":
		return nil, nil, usage(errors.New("--modules needs --kernel"))
	}
	var smoke [][]string
	for _, s := range o.smoke {
		argv, err := commandWords(s)
		if err != nil {
			return nil, nil, usage(fmt.Errorf("--smoke %q: %w", s, err))
		}
		smoke = append(smoke, argv)
	}
	return outputs, smoke, nil
}

func (o *csvRunOptions) run(ctx context.Context, e *env, path string) error {
	outputs, smoke, err := o.check()
	if err != nil {
		return err
	}
	targets, owners, err := o.report.notify.load()
	if err != nil {
		return err
	}
	if err := hypervisor.Check(); err != nil {
		return hint(err, "apt-get install qemu-system-x86 qemu-utils")
	}
	var release *csv.SignedRelease
	if o.report.release != "" {
		if release, err = readCandidate(o.report.release); err != nil {
			return err
		}
	}
	a, err := openArtefact(ctx, e, path)
	if err != nil {
		return fmt.Errorf("artefact: %w", err)
	}
	defer a.Close()
	tmp, err := os.MkdirTemp("", "ringwall-csv-run-")
	if err != nil {
		return fmt.Errorf("csv run: %w", err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	guest := &candidateGuest{csvRunOptions: o, e: e, dir: tmp, artefact: a, path: path, smoke: smoke, candidate: release, began: e.now()}
	run, err := guest.run(ctx)
	if err != nil {
		return err
	}
	cell, err := cellOf(e, packageCache{}, ".", o.where)
	if err != nil {
		return err
	}
	m := newMeter(e, a, path)
	r, err := csv.JudgeRun(ctx, csv.Trial{
		Candidate: csv.Candidate{Source: m, Subject: func() csv.Subject { return subjectOf(a) }, Release: release, Archive: o.report.archive},
		Cell:      cell, Run: run, Notes: guest.notes,
	}, csv.Options{Now: e.now(), Progress: m.say})
	m.end()
	if err != nil {
		return err
	}
	for _, out := range outputs {
		if err := o.report.write(e, r, out, nil); err != nil { //nolint:contextcheck // writes files only
			return codedError{csv.ExitInternal, fmt.Errorf("report as %s: %w", out.format, err)}
		}
	}
	if err := o.report.notify.tell(ctx, e, targets, owners, r, o.report.strict); err != nil {
		e.notef("ringwall: %v", err)
	}
	return o.report.verdict(r, path)
}

// commandWords splits a command into words at spaces, with ' and " around what is
// to stay together. Nothing else has a meaning: no shell reads it.
func commandWords(s string) ([]string, error) {
	var out []string
	var word strings.Builder
	quote, began := rune(0), false
	for _, c := range s {
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			quote, began = c, true
		case quote == 0 && (c == ' ' || c == '\t' || c == '\n'):
			if began {
				out = append(out, word.String())
				word.Reset()
				began = false
			}
		default:
			word.WriteRune(c)
			began = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("the quote %c is not closed: %w", quote, errs.Invalid)
	}
	if began {
		out = append(out, word.String())
	}
	if len(out) == 0 || out[0] == "" {
		return nil, fmt.Errorf("no command: %w", errs.Invalid)
	}
	return out, nil
}

// installs says how a guest installs a build, and which file it is given.
func installs(f builds.Format) (string, error) {
	switch f {
	case builds.FormatDeb:
		return "deb", nil
	case builds.FormatRPM:
		return "rpm", nil
	case builds.FormatTar, builds.FormatDir:
		return "tar", nil
	}
	return "", fmt.Errorf("a guest cannot install a %s: give a .deb, an .rpm, a tar or a directory: %w", f, errs.Unsupported)
}

// livePolicy reads the policy with its document, which the guest's copy is made of.
func (o *csvRunOptions) livePolicy() ([]byte, *integrity.Policy, error) {
	doc, err := readBounded(o.where.Policy, maxPolicyFile)
	if err != nil {
		return nil, nil, fmt.Errorf("policy: %w", err)
	}
	p, err := loadPolicy(o.where.Policy)
	if err != nil {
		return nil, nil, err
	}
	p, err = joinFiles(p, o.where.Supplements)
	return doc, p, err
}

// plainTar writes a tar without its compression.
func plainTar(to io.Writer, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := codesign.Decompress(f)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(to, r)
	return err
}
