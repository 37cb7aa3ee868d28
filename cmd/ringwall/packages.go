package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/errs"
	"ringwall/internal/host"
)

func newPackagesCommand(e *env) *cobra.Command {
	return newGroup("packages", groupHost, "Trust packages by their archive's signature",
		`A package is authorised when the policy trusts its archive, the archive's signed
index lists the package file, and the file is the one that is listed. The kernel
then knows what the package brings before dpkg unpacks it.`,
		newPackagesAdoptCommand(e), newPackagesTrustCommand(e), newPackagesSettleCommand(e), newPackagesListCommand(e))
}

func newPackagesAdoptCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "adopt PATH…", Short: "Trust package files, or directories of them",
		Long: `Verify package files and authorise what they bring. Without an agent, for a host
that is being set up, it writes to the state directory by itself.

To adopt what is installed already, fetch the same versions first:
  cd "$(mktemp -d)" && apt-get download $(dpkg-query -W -f '${binary:Package}=${Version}\n')`,
		Example: `  ringwall packages adopt /var/cache/apt/archives`,
		Args:    atLeastOne("PATH"),
		RunE: func(c *cobra.Command, args []string) error {
			files, err := debFiles(args)
			if err != nil {
				return err
			}
			e.notef("verifying %d packages", len(files))
			return trustPackages(c.Context(), e, d, files, true)
		},
	}
	d.flags(c)
	return c
}

func newPackagesTrustCommand(e *env) *cobra.Command {
	var d hostDirs
	var apt, aptDone bool
	c := &cobra.Command{
		Use: "trust [FILE…]", Short: "What apt calls before it unpacks packages",
		Long: `With --apt, read what apt says to a DPkg::Pre-Install-Pkgs command and trust the
package files that it names. A package that does not verify stops apt: nothing
of it was unpacked yet. A host without an agent is left alone.`,
		RunE: func(c *cobra.Command, args []string) error {
			if aptDone {
				return settlePackages(c.Context(), e, d)
			}
			files := args
			if apt {
				debs, err := host.ParseAptHook(e.stdin)
				if err != nil {
					return err
				}
				for _, x := range debs {
					files = append(files, x.Path)
				}
			}
			if len(files) == 0 {
				return nil
			}
			err := trustPackages(c.Context(), e, d, files, false)
			if apt && noAgent(err) {
				e.notef("ringwall: no agent runs; packages are not checked here, and a kernel that still enforces refuses them")
				return nil
			}
			return err
		},
	}
	d.flags(c)
	c.Flags().BoolVar(&apt, "apt", false, "read apt's list from standard input")
	c.Flags().BoolVar(&aptDone, "apt-done", false, "what apt calls afterwards: the same as settle")
	return c
}

func trustPackages(ctx context.Context, e *env, d hostDirs, files []string, offline bool) error {
	var out []agent.PackageResult
	err := agent.NewClient(d.run).Call(ctx, "packages", agent.PackagesRequest{Files: files}, &out)
	if noAgent(err) && offline {
		out, err = agent.AdoptPackages(ctx, d.state, files, e.now())
	}
	if err != nil {
		return err
	}
	if err := e.emit(out, func(w io.Writer) { printPackages(w, out, true) }); err != nil {
		return err
	}
	for _, r := range out {
		if r.State == "refused" {
			return fmt.Errorf("not every package is trusted: %w", errs.Untrusted)
		}
	}
	return nil
}

// printPackages counts what is well and names what is not.
func printPackages(w io.Writer, list []agent.PackageResult, always bool) {
	n := map[string]int{}
	for _, r := range list {
		n[r.State]++
		if r.State == "refused" {
			fmt.Fprintf(w, "refused   %s: %s\n", r.File, r.Why)
		}
	}
	if always || len(list) > 0 {
		fmt.Fprintf(w, "packages  %d trusted, %d known before, %d refused\n", n["trusted"], n["known"], n["refused"])
	}
}

func newPackagesSettleCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "settle", Short: "Forget packages that are not installed any more (dpkg's hook)",
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			return settlePackages(c.Context(), e, d)
		},
	}
	d.flags(c)
	return c
}

func settlePackages(ctx context.Context, e *env, d hostDirs) error {
	var a agent.SettleAnswer
	err := agent.NewClient(d.run).Call(ctx, "packages/settle", struct{}{}, &a)
	if noAgent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return e.emit(a, func(w io.Writer) {
		if a.Forgotten > 0 {
			fmt.Fprintf(w, "%d packages forgotten\n", a.Forgotten)
		}
	})
}

func newPackagesListCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "list", Short: "List the packages that this host trusts",
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			s, err := agent.OpenState(d.state)
			if err != nil {
				return err
			}
			list, err := s.Packages()
			if err != nil {
				return err
			}
			return e.emit(list, func(w io.Writer) {
				for _, p := range list {
					fmt.Fprintf(w, "%s %s %s  %s/%s  %.12s\n", p.Package, p.Version, p.Architecture, p.Archive, p.Suite, p.SHA256)
				}
			})
		},
	}
	d.flags(c)
	return c
}
