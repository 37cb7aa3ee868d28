package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/errs"
	"ringwall/internal/host"
)

// installedBinary is where the unit and apt's hook look for this program.
const installedBinary = "usr/bin/ringwall"

func newHostInstallCommand(e *env) *cobra.Command {
	var root string
	c := &cobra.Command{
		Use: "install", Short: "Start the agent early at boot, and let apt ask it first",
		Long: `Write a systemd unit, apt's hook, and where initramfs-tools is used a hook and a
script for the initramfs; copy this program to /usr/bin/ringwall if it is not
there. A second run changes nothing. Nothing is started.`,
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			if err := needRoot("host install"); err != nil {
				return err
			}
			if err := installSelf(root); err != nil {
				return err
			}
			r, err := host.InstallBoot(root)
			if err != nil {
				return err
			}
			return e.emit(r, func(w io.Writer) {
				printBoot(w, r)
				fmt.Fprintln(w, "next       systemctl start ringwall-agent")
			})
		},
	}
	c.Flags().StringVar(&root, "root", "/", "directory that stands for / (an image that is being made)")
	return c
}

// installSelf copies the running program to where the unit looks for it.
func installSelf(root string) error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	defer self.Close()
	to := filepath.Join(root, installedBinary)
	if a, err := os.Stat(to); err == nil {
		if b, err := self.Stat(); err == nil && os.SameFile(a, b) {
			return nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil { //nolint:gosec // as the system has it
		return fmt.Errorf("install: %w", err)
	}
	return host.WriteFileFrom(to, self, 0o755)
}

func newHostUpgradeCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "upgrade FILE", Short: "Replace this host's agent by a newer one, without a gap",
		Long: `Hand the agent a new binary of Ringwall. While a policy is in force nobody but the
agent can replace its program: it copies the file, looks whether the policy lets
that content be the agent, installs it in its own place and executes it. What is
in the kernel stays in force throughout, and the new agent takes it over.

The policy has to say whose builds may be the agent, once:

  programs:
    - {rule: agent, match: {product: ringwall, files: ["*"]}, may: [agent]}

and the release of the new binary must be authorised like any other.

An initramfs that starts the agent early holds the old binary until it is made
anew: update-initramfs -u.`,
		Example: `  ringwall host add-release ringwall_1.2.0.release.json
  ringwall host upgrade ./ringwall`,
		Args: exactly("FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			file, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			client := agent.NewClient(d.run)
			var a agent.UpgradeAnswer
			if err := client.Call(c.Context(), "upgrade", agent.UpgradeRequest{File: file}, &a); err != nil {
				return startHint(err)
			}
			if err := tookOver(c.Context(), client, a.SHA256); err != nil {
				return hint(err, "what is in the kernel stays in force; see journalctl -u ringwall-agent")
			}
			return e.emit(&a, func(w io.Writer) {
				fmt.Fprintf(w, "%s is sha256 %s now, and has taken over\n", a.Program, a.SHA256)
			})
		},
	}
	d.flags(c)
	return c
}

// upgradeWait is how long a new agent may take to start.
const upgradeWait = 5 * time.Minute

// tookOver waits until the agent with that content answers.
func tookOver(ctx context.Context, client *agent.Client, sha256 string) error {
	ctx, cancel := context.WithTimeout(ctx, upgradeWait)
	defer cancel()
	again := time.NewTicker(200 * time.Millisecond)
	defer again.Stop()
	for {
		if s, err := client.Status(ctx); err == nil && s.Program == sha256 {
			return nil
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("the new agent is installed and does not answer: %w", ctx.Err())
		}
	}
}

func newHostUninstallCommand(e *env) *cobra.Command {
	var root string
	c := &cobra.Command{
		Use: "uninstall", Short: "Remove what install wrote",
		Long: `Remove the unit and the hooks that install wrote; files that were changed since are
kept and named. What is in the kernel stays until the next boot, or until
` + "`ringwall host remove`" + `. The state directory stays.`,
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			if err := needRoot("host uninstall"); err != nil {
				return err
			}
			r, err := host.RemoveBoot(root)
			if err != nil {
				return err
			}
			return e.emit(r, func(w io.Writer) { printBoot(w, r) })
		},
	}
	c.Flags().StringVar(&root, "root", "/", "directory that stands for /")
	return c
}

func printBoot(w io.Writer, r host.BootReport) {
	for _, p := range r.Changed {
		fmt.Fprintf(w, "changed    %s\n", p)
	}
	for _, p := range r.Unchanged {
		fmt.Fprintf(w, "unchanged  %s\n", p)
	}
	for _, p := range r.Skipped {
		fmt.Fprintf(w, "left out   %s\n", p)
	}
	for _, p := range r.Next {
		fmt.Fprintf(w, "next       %s\n", p)
	}
}

func newHostRemoveCommand(e *env) *cobra.Command {
	var d hostDirs
	var purge bool
	c := &cobra.Command{
		Use: "remove", Short: "Take Ringwall out of the kernel and end the agent",
		Long: `A host whose policy enforces for all of it cannot be opened by root alone: apply
a signed policy with mode audit first. A trial with a scope can be removed at
any time.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("host remove"); err != nil {
				return err
			}
			var none struct{}
			err := agent.NewClient(d.run).Call(c.Context(), "remove", none, &none)
			if err != nil && !(purge && errors.Is(err, errs.NotFound)) {
				return startHint(err)
			}
			if purge {
				if err := os.RemoveAll(d.state); err != nil {
					return fmt.Errorf("remove %s: %w", d.state, err)
				}
			}
			return e.emit(none, func(w io.Writer) { fmt.Fprintln(w, "nothing is enforced on this host any more") })
		},
	}
	d.flags(c)
	c.Flags().BoolVar(&purge, "purge", false, "also delete the state directory with its event log")
	return c
}
