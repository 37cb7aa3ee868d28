package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

func newHostCommand(e *env) *cobra.Command {
	return newGroup("host", groupHost, "Set this host up, and hand it policies and releases",
		`A host believes signed documents only. It is given its first trust by
`+"`ringwall host init`"+`; from then on its policy says whom it trusts.`,
		newHostInitCommand(e), newHostApplyCommand(e), newHostReleaseCommand(e), newHostSupplementCommand(e), newHostCanaryCommand(e), newHostMeasureCommand(e),
		newHostInstallCommand(e), newHostUpgradeCommand(e), newHostUninstallCommand(e), newHostRemoveCommand(e),
		newHostJoinCommand(e), newHostLeaveCommand(e))
}

func newHostInitCommand(e *env) *cobra.Command {
	var d hostDirs
	var trust, policy, id, scope, webhook, tpm, root string
	var releases, packages, units []string
	var flips int
	c := &cobra.Command{
		Use: "init", Short: "Give this host its first trust, policy and packages",
		Long: `Set this host up. Nothing is enforced until the agent starts.

--trust is a key directory (only its certificates are read) or a PEM file with
the certificates of the policy CA and of the timestamp authority. The host id is
what break-glass permits name.

--packages takes package files or directories of them, such as
/var/cache/apt/archives: those that a signed index of an archive lists which the
policy trusts are authorised.`,
		Example: `  ringwall host init --trust keys --policy base.policy.json --release edged_4.7.0-1.release.json
  ringwall host init --trust keys --policy base.policy.json --packages /var/cache/apt/archives`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("host init"); err != nil {
				return err
			}
			a, err := readAnchor(trust)
			if err != nil {
				return err
			}
			a.Host = id
			a.Settings = agent.Settings{Scope: scope, Webhook: webhook, TPM: tpm, Units: units, Flips: flips}
			u := agent.Setup{Anchor: a, Root: root}
			if policy != "" {
				if u.Policy, err = readBounded(policy, maxBundleFile); err != nil {
					return err
				}
			}
			if u.Releases, err = readReleases(releases); err != nil {
				return err
			}
			if u.Packages, err = debFiles(packages); err != nil {
				return err
			}
			if len(u.Packages) > 0 {
				e.notef("verifying %d packages", len(u.Packages))
			}
			p, err := agent.Prepare(c.Context(), d.state, u, e.now())
			if err != nil {
				return err
			}
			return e.emit(p, func(w io.Writer) { printPrepared(w, p) })
		},
	}
	d.flags(c)
	f := c.Flags()
	f.StringVar(&trust, "trust", "", "key directory or PEM file: who may sign this host's policies")
	f.StringVar(&policy, "policy", "", "signed policy (.policy.json)")
	f.StringSliceVar(&releases, "release", nil, "release record (.release.json, with .cat and .names beside it), or a directory of them; repeat")
	f.StringSliceVar(&packages, "packages", nil, "package files or directories of them; repeat")
	f.StringVar(&root, "root", "/", "directory that stands for /, where apt keeps the signed indices (an image that is being made)")
	f.StringVar(&id, "id", "", "host id; default: made at random")
	f.StringVar(&scope, "scope", "", "cgroup v2 directory: govern its processes only, for trials")
	f.StringVar(&webhook, "webhook", "", "post alerts there as JSON (https, or http to loopback)")
	f.StringVar(&tpm, "tpm", "", "TPM device for the epoch floor; default: /dev/tpmrm0 if it is there")
	f.StringSliceVar(&units, "watch-unit", nil, "in a fleet, take a new manifest back if this systemd `UNIT` goes down under it; repeat (default: ssh, network and D-Bus)")
	f.IntVar(&flips, "max-flips", 0, "in a fleet, take a new manifest back if it refuses more than `N` contents in use (default 5)")
	require(c, "trust")
	return c
}

func printPrepared(w io.Writer, p *agent.Prepared) {
	fmt.Fprintf(w, "host      %s\n", p.Host)
	if p.Policy != "" {
		fmt.Fprintf(w, "policy    %s, epoch %d\n", p.Policy, p.Epoch)
	}
	for _, r := range p.Releases {
		fmt.Fprintf(w, "release   %s %s, epoch %d\n", r.Product, r.Version, r.Epoch)
	}
	printPackages(w, p.Packages, false)
	fmt.Fprintf(w, "floor     %s\n", p.Floor)
	fmt.Fprintln(w, "next      ringwall host install, or for a trial: ringwall agent")
}

// readAnchor reads whom a host shall trust to sign policies.
func readAnchor(path string) (agent.Anchor, error) {
	st, err := os.Stat(path)
	if err != nil {
		return agent.Anchor{}, fmt.Errorf("trust: %w", err)
	}
	files := []string{path}
	if st.IsDir() {
		files = []string{filepath.Join(path, "policy-ca.crt"), filepath.Join(path, "tsa.crt")}
	}
	var cas, tsas []*x509.Certificate
	for _, f := range files {
		b, err := readBounded(f, 1<<20)
		if err != nil {
			return agent.Anchor{}, fmt.Errorf("trust: %w", err)
		}
		for rest := strings.TrimSpace(string(b)); rest != ""; {
			one, more, _ := strings.Cut(rest, "-----END CERTIFICATE-----")
			rest = strings.TrimSpace(more)
			cert, err := pki.DecodeCertificate([]byte(one + "-----END CERTIFICATE-----\n"))
			if err != nil {
				return agent.Anchor{}, fmt.Errorf("trust %s: %w", f, err)
			}
			if cert.IsCA {
				cas = append(cas, cert)
			} else {
				tsas = append(tsas, cert)
			}
		}
	}
	if len(cas) == 0 || len(tsas) == 0 {
		return agent.Anchor{}, fmt.Errorf("trust %s: want the certificates of a policy CA and of a timestamp authority: %w", path, errs.Invalid)
	}
	return agent.AnchorFor(cas, tsas), nil
}

// readReleases reads the three files of each release, unverified: who receives
// them verifies.
func readReleases(paths []string) ([]agent.ReleaseRequest, error) {
	var out []agent.ReleaseRequest
	for _, p := range paths {
		files, _ := filesOf(p, extRelease) // reading says what is wrong with the path
		for _, f := range files {
			r, err := readRelease(f)
			if err != nil {
				return nil, fmt.Errorf("release %s: %w", f, err)
			}
			out = append(out, r)
		}
	}
	return out, nil
}

// readRelease reads NAME.release.json with NAME.cat and NAME.names beside it.
func readRelease(file string) (r agent.ReleaseRequest, err error) {
	stem, ok := strings.CutSuffix(file, extRelease)
	if !ok {
		return r, fmt.Errorf("want a file that ends in %s: %w", extRelease, errs.Invalid)
	}
	if r.Record, err = readBounded(file, maxBundleFile); err != nil {
		return r, err
	}
	for ending, to := range map[string]*[]byte{extCatalogue: &r.Catalogue, extNames: &r.Names} {
		if *to, err = readBounded(stem+ending, maxCatalogueFile); err != nil {
			return r, hint(err, "a release's three files lie side by side")
		}
	}
	return r, nil
}

func newHostApplyCommand(e *env) *cobra.Command {
	var d hostDirs
	var releases []string
	var force bool
	c := &cobra.Command{
		Use: "apply FILE.policy.json", Short: "Put a signed policy in force",
		Long: `Hand a signed policy to the agent of this host. The agent verifies it, refuses an
older one than any before, compiles it, puts it into the kernel in one step,
proves it with a canary, and only then keeps it. On any failure the policy
before stays in force.

A policy that enforces and would refuse this host's own init is refused, unless
--force is given.`,
		Example: `  ringwall host apply base.policy.json
  ringwall host apply base.policy.json --release edged_4.7.0-1.release.json`,
		Args: exactly("FILE.policy.json"),
		RunE: func(c *cobra.Command, args []string) error {
			q := agent.PolicyRequest{Force: force}
			var err error
			if q.Policy, err = readBounded(args[0], maxBundleFile); err != nil {
				return err
			}
			if q.Releases, err = readReleases(releases); err != nil {
				return err
			}
			var s agent.Status
			if err := agent.NewClient(d.run).Call(c.Context(), "policy", q, &s); err != nil {
				return startHint(err)
			}
			return e.emit(&s, func(w io.Writer) { fmt.Fprintf(w, "%s: %s\n", s.State, s.Text) })
		},
	}
	d.flags(c)
	c.Flags().StringSliceVar(&releases, "release", nil, "release record to hand in with it; repeat")
	c.Flags().BoolVar(&force, "force", false, "also if this host's own init would be refused")
	return c
}

func startHint(err error) error {
	if noAgent(err) {
		return hint(err, "start it: systemctl start ringwall-agent, or `ringwall agent`; `ringwall status` looks into the kernel without it")
	}
	return err
}

func newHostReleaseCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "add-release FILE.release.json…", Short: "Authorise signed releases that the policy trusts",
		Example: `  ringwall host add-release edged_4.7.0-1.release.json`,
		Args:    atLeastOne("FILE.release.json"),
		RunE: func(c *cobra.Command, args []string) error {
			list, err := readReleases(args)
			if err != nil {
				return err
			}
			var out []agent.ReleaseAnswer
			for _, r := range list {
				var a agent.ReleaseAnswer
				if err := agent.NewClient(d.run).Call(c.Context(), "release", r, &a); err != nil {
					return startHint(err)
				}
				out = append(out, a)
			}
			return e.emit(out, func(w io.Writer) {
				for _, r := range out {
					fmt.Fprintf(w, "%s %s, epoch %d: authorised as far as the policy says\n", r.Product, r.Version, r.Epoch)
				}
			})
		},
	}
	d.flags(c)
	return c
}

func newHostSupplementCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "add-supplement FILE.policy.json", Short: "Add a signed supplemental policy",
		Long: `Hand in a policy that supplements the one in force: it can only allow more, and
never what the base policy denies.`,
		Args: exactly("FILE.policy.json"),
		RunE: func(c *cobra.Command, args []string) error {
			b, err := readBounded(args[0], maxBundleFile)
			if err != nil {
				return err
			}
			var s agent.Status
			if err := agent.NewClient(d.run).Call(c.Context(), "supplement", agent.DocumentRequest{Document: b}, &s); err != nil {
				return startHint(err)
			}
			return e.emit(&s, func(w io.Writer) { fmt.Fprintf(w, "%s: %s\n", s.State, s.Text) })
		},
	}
	d.flags(c)
	return c
}

func newHostCanaryCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "canary", Short: "Prove now that the kernel refuses what is not listed",
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			var a agent.Canary
			if err := agent.NewClient(d.run).Call(c.Context(), "canary", struct{}{}, &a); err != nil {
				return startHint(err)
			}
			return e.emit(&a, func(w io.Writer) { fmt.Fprintln(w, "an unlisted program was refused and a listed one ran") })
		},
	}
	d.flags(c)
	return c
}

// atLeastOne wants one or more arguments.
func atLeastOne(name string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return fmt.Errorf("%s: %s is missing; see %[1]s --help", c.CommandPath(), name)
		}
		return nil
	}
}

// debFiles lists package files; a directory stands for those in it.
func debFiles(paths []string) ([]string, error) {
	var out []string
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil, fmt.Errorf("packages: %w", err)
		}
		if !st.IsDir() {
			abs, err := filepath.Abs(p)
			if err != nil {
				return nil, fmt.Errorf("packages: %w", err)
			}
			out = append(out, abs)
			continue
		}
		es, err := os.ReadDir(p)
		if err != nil {
			return nil, fmt.Errorf("packages: %w", err)
		}
		n := len(out)
		for _, x := range es {
			if strings.HasSuffix(x.Name(), ".deb") && x.Type().IsRegular() {
				abs, err := filepath.Abs(filepath.Join(p, x.Name()))
				if err != nil {
					return nil, fmt.Errorf("packages: %w", err)
				}
				out = append(out, abs)
			}
		}
		if len(out) == n {
			return nil, errors.Join(fmt.Errorf("packages: no .deb file in %s: %w", p, errs.NotFound))
		}
	}
	return out, nil
}

func newHostMeasureCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "measure PATH…", Short: "Let an older kernel know scripts before they are read (Linux before 6.9)",
		Long: `Before Linux 6.9 the kernel cannot hash a file at the moment at which an
interpreter opens it. The agent measures the scripts of packages by itself; call
this for what you deploy elsewhere and start as "python3 FILE" or "sh FILE". It
authorises nothing, and newer kernels need none of it.`,
		Example: `  ringwall host measure /opt/edged`,
		Args:    atLeastOne("PATH"),
		RunE: func(c *cobra.Command, args []string) error {
			q := agent.PackagesRequest{}
			for _, p := range args {
				abs, err := filepath.Abs(p)
				if err != nil {
					return err
				}
				q.Files = append(q.Files, abs)
			}
			var a agent.MeasureAnswer
			if err := agent.NewClient(d.run).Call(c.Context(), "measure", q, &a); err != nil {
				return startHint(err)
			}
			return e.emit(&a, func(w io.Writer) {
				if !a.Needed {
					fmt.Fprintln(w, "not needed: this kernel measures what is opened by itself")
					return
				}
				fmt.Fprintf(w, "%d files measured\n", a.Measured)
			})
		},
	}
	d.flags(c)
	return c
}
