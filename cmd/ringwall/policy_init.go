package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

const (
	debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	maxKeyring    = 1 << 20
)

// profile is what a first policy says besides trust and rules, with the reasons.
type profile struct {
	name, modes, more string
}

func profiles() []profile {
	return []profile{
		{name: "audit", modes: `# Nothing is refused: what would be is an event. Start here, look at
# "ringwall events", and simulate before you enforce.
mode: audit
`},
		{name: "server", modes: `# What is not authorised does not run. These stay events until the host's own
# programs have been seen for a while.
mode: enforce
modes:
  memory: audit # compilers that nobody named under programs
  bpf: audit # monitoring agents
  firmware: audit # devices with vendors' firmware
`},
		{name: "strict", modes: `# What is not authorised does not run, and interpreters run authorised files only.
mode: enforce
`, more: `
# Code on the command line and on standard input is refused, and so is every
# unauthorised file that an interpreter opens outside its data paths: python3 -c,
# curl | sh, cron lines, system(3). Try it with "mode: audit" first. An entry of
# the baseline's name changes only what it says.
interpreters:
  - {name: shell, reads: strict, inline: deny, stdin: [tty, null]}
  - {name: csh, reads: strict, inline: deny, stdin: [tty, null]}
  - {name: fish, reads: strict, inline: deny, stdin: [tty, null]}
  - {name: python, reads: strict, inline: deny}
  - {name: perl, reads: strict, inline: deny}
  - {name: ruby, reads: strict, inline: deny}
  - {name: node, reads: strict, inline: deny}
  - {name: php, reads: strict, inline: deny}
  - {name: lua, reads: strict, inline: deny}
  - {name: tcl, reads: strict, inline: deny}
  - {name: java, reads: strict, inline: deny, stdin: [tty, null]}

knobs:
  - {sysctl: kernel.yama.ptrace_scope, want: "3", rule: at_least, apply: true} # until the next boot
  - {sysctl: user.max_user_namespaces, want: "0", apply: true} # no rootless containers, no browser sandbox
  - {sysctl: vm.memfd_noexec, want: "2", rule: at_least, apply: true, since: "6.3"} # old runc needs executable memfds
`},
	}
}

func newPolicyInitCommand(e *env) *cobra.Command {
	var keys, name, chosen, identity, out string
	var archives []string
	c := &cobra.Command{
		Use:   "init --keys DIR --name NAME",
		Short: "Write a first policy, with comments",
		Long: `Writes a policy that trusts an authority's keys and allows what ringwall sign
signs with them, and the packages of an archive. Profiles:

  audit   nothing is refused, everything is logged
  server  programs, libraries, scripts and kernel modules must be authorised;
          code on an interpreter's command line is logged
  strict  interpreters run authorised files only, too

Without --archive it trusts Debian's archive, if its keyring is on this machine
(package debian-archive-keyring); --archive none trusts none.

The output is YAML in either output format.`,
		Example: `  ringwall policy init --keys keys --name base > base.yaml
  ringwall policy init --keys keys --name base --profile server -o base.yaml
  ringwall policy init --keys keys --name base --archive debian=/usr/share/keyrings/debian-archive-keyring.gpg`,
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			var p *profile
			var names []string
			for _, x := range profiles() {
				if names = append(names, x.name); x.name == chosen {
					p = &x
				}
			}
			if p == nil {
				return usage(fmt.Errorf("--profile %q: want one of %s", chosen, strings.Join(names, ", ")))
			}
			a, err := pki.LoadCertificates(keys)
			if err != nil {
				return err
			}
			if identity == "" {
				identity = defaultIdentity(a, pki.PurposeBuild)
			}
			kept, err := readArchives(archives)
			if err != nil {
				return err
			}
			if len(kept) == 0 {
				e.notef("It trusts no package archive: nothing of the distribution will be authorised.")
			}
			doc := firstPolicy(name, *p, a, identity, kept)
			if _, err := integrity.ParseNamed("policy", []byte(doc)); err != nil {
				return err
			}
			return writeDocument(e, out, doc)
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`; its certificates are enough")
	f.StringVar(&name, "name", "", "the policy's `NAME`")
	f.StringVar(&chosen, "profile", "audit", "audit, server or strict")
	f.StringVar(&identity, "identity", "", "the `URI` of the signer whose builds may run")
	f.StringArrayVar(&archives, "archive", nil, "trust a package archive, as `NAME=KEYRING`; repeat")
	f.StringVarP(&out, "out", "o", "", "write to `FILE`, which must not exist")
	require(c, "keys", "name")
	complete(c, "profile", "audit", "server", "strict")
	return c
}

// writeDocument prints a document, or writes it to a file that must be new.
func writeDocument(e *env, file, doc string) error {
	if file == "" {
		if _, err := io.WriteString(e.stdout, doc); err != nil {
			return fmt.Errorf("write result: %w", err)
		}
		return nil
	}
	if exists(file) {
		return fmt.Errorf("%s is there already: %w", file, errs.Conflict)
	}
	return host.WriteFile(file, []byte(doc), 0o644)
}

// keptArchive is an archive that a policy is to trust.
type keptArchive struct {
	name    string
	origins []string
	keyring []byte
}

func readArchives(flags []string) ([]keptArchive, error) {
	if len(flags) == 1 && flags[0] == "none" {
		return nil, nil
	}
	if len(flags) == 0 {
		b, err := readBounded(debianKeyring, maxKeyring)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("archive: %w", err)
		}
		return []keptArchive{{"debian", []string{"Debian"}, b}}, nil
	}
	var out []keptArchive
	for _, f := range flags {
		name, file, ok := strings.Cut(f, "=")
		if !ok || name == "" || file == "" {
			return nil, usage(fmt.Errorf("--archive %q: want NAME=KEYRING, or none", f))
		}
		b, err := readBounded(file, maxKeyring)
		if err != nil {
			return nil, fmt.Errorf("archive: %w", err)
		}
		out = append(out, keptArchive{name: name, keyring: b})
	}
	return out, nil
}

func firstPolicy(name string, p profile, a *pki.Authority, identity string, archives []keptArchive) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# What may run. Everything that no rule allows is refused (mode enforce) or
# logged (mode audit). "ringwall policy check" reads this file as a host does.
version: 1
name: %s
epoch: 1 # raise it with every change: a host refuses a lower one
# Built-in interpreters, JIT compilers and kernel settings; entries of the same
# name in this file replace them. "ringwall policy show" prints all of it.
baseline: 1

%s
# Whom hosts believe. It is all that they believe, so add a new authority here
# before the old one ends.
trust:
`, name, p.modes)
	t := trustOf(a)
	t.writeYAML(&b)
	if len(archives) > 0 {
		fmt.Fprintln(&b, "  archives: # whose packages are verified by their archive's signature")
	}
	for _, x := range archives {
		fmt.Fprintf(&b, "    - name: %s\n", yamlString(x.name))
		if len(x.origins) > 0 {
			fmt.Fprintf(&b, "      origins: [%s]\n", strings.Join(x.origins, ", "))
		}
		fmt.Fprintln(&b, "      keyring: |")
		text := string(x.keyring)
		if !strings.HasPrefix(strings.TrimSpace(text), "-----BEGIN") {
			text = wrap(base64.StdEncoding.EncodeToString(x.keyring), 76)
		}
		for line := range strings.Lines(strings.TrimSpace(text)) {
			fmt.Fprintf(&b, "        %s", line)
		}
		fmt.Fprintln(&b)
	}
	fmt.Fprintf(&b, `
allow:
  # What "ringwall sign" signed as this identity. Add product: and min_epoch: to
  # narrow it down.
  - rule: own-builds
    signer: {authority: %s, identity: %s}
`, yamlString(t.Authorities[0].Name), yamlString(identity))
	for _, x := range archives {
		fmt.Fprintf(&b, "  - rule: %s\n    package: {archive: %s, names: [\"*\"]}\n", yamlString("packages-"+x.name), yamlString(x.name))
	}
	b.WriteString(p.more + `
# Deny beats allow. Examples:
# deny:
#   - {rule: leaked, certificate: [{sha256: …, from: 2031-01-01T00:00:00Z}], reason: stolen laptop}
#   - {rule: old, product: [{name: edged, below_epoch: 12}], reason: CVE-2031-1234}

# Exceptions end by themselves, and say why. Example:
# exceptions:
#   - {rule: vendor, sha256: [], kinds: [exec], until: 2031-05-01T00:00:00Z, reason: ticket 4711}
`)
	return b.String()
}

func wrap(s string, width int) string {
	var b strings.Builder
	for len(s) > width {
		b.WriteString(s[:width] + "\n")
		s = s[width:]
	}
	b.WriteString(s + "\n")
	return b.String()
}
