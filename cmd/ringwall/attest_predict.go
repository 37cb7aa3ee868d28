package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/attest"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/kernelsig"
)

func newAttestPredictCommand(e *env) *cobra.Command {
	var policy, locks, to string
	c := &cobra.Command{
		Use:   "predict FILE...",
		Short: "Tell what booting a file will measure, before anybody boots it",
		Long: `Reads signed boot images (unified kernel images, boot loaders, shims, kernels with
an EFI stub), initrds, integrity policies (.yaml, as signed), .pcrlock files and its own
output (.json), and prints the reference values that a machine's evidence has if it
boots them: Authenticode digests (PCR 4), sections of a unified image (PCR 11), command
lines and initrds as the kernel measures them (PCR 9), the record by which an agent
shows that it enforces the policy (IMA).
Run it where images are signed, on the signed file: signing pads it, so that the
unsigned one has another digest.

With --policy it prints that attestation policy with the values added, which is how
hosts that get the new image keep being accepted. Values of images that no host
boots any more are taken out by hand. --pcrlock DIR writes each component as
DIR/NAME.pcrlock for systemd-pcrlock.

JSON (always): {"format", "components": [{"name", "file", "image", "kernel",
"sections": [{"name", "digests"}], "options", "loaded", "records"}]}, or the policy`,
		Example: `  ringwall attest predict linux.efi
  ringwall attest predict linux.efi --policy attestation.json -o attestation.json
  ringwall attest predict shimx64.efi grubx64.efi vmlinuz initrd.img --pcrlock /etc/pcrlock.d`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			refs := &attest.References{Format: attest.ReferencesFormat}
			for _, f := range args {
				all, err := predictFile(f)
				if err != nil {
					return fmt.Errorf("%s: %w", f, err)
				}
				refs.Components = append(refs.Components, all...)
			}
			if locks != "" {
				if err := writeLocks(refs, locks); err != nil {
					return err
				}
			}
			var v any = refs
			if policy != "" {
				p, err := readAttestPolicy(policy)
				if err != nil {
					return err
				}
				if err := refs.AddTo(p); err != nil {
					return err
				}
				p.Version++
				v = p
			}
			b, err := json.MarshalIndent(v, "", "  ")
			if err != nil {
				return fmt.Errorf("encode: %w", err)
			}
			return saveOrPrint(e, to, append(b, '\n'))
		},
	}
	f := c.Flags()
	f.StringVar(&policy, "policy", "", "print this attestation policy `FILE` with the values added")
	f.StringVar(&locks, "pcrlock", "", "write each component into this `DIR` too, for systemd-pcrlock")
	f.StringVarP(&to, "out", "o", "", "write to this `FILE`")
	return c
}

const maxBootFile = 1 << 30

// predictFile takes images by what they are, policies and values that were
// predicted before by their names, and everything else as a file that a boot loader reads.
func predictFile(path string) ([]attest.Component, error) {
	b, err := readBounded(path, maxBootFile)
	if err != nil {
		return nil, err
	}
	if strings.HasSuffix(path, ".pcrlock") {
		c, err := attest.ParsePCRLock(stem(path), b)
		if err != nil {
			return nil, err
		}
		return []attest.Component{*c}, nil
	}
	if strings.HasSuffix(path, ".json") {
		r, err := attest.ParseReferences(b)
		if err != nil {
			return nil, err
		}
		return r.Components, nil
	}
	if strings.HasSuffix(path, ".yaml") {
		return []attest.Component{attest.PredictPolicy(stem(path), b)}, nil
	}
	if len(b) < 2 || string(b[:2]) != "MZ" {
		return []attest.Component{attest.PredictFile(stem(path), b)}, nil
	}
	m, err := kernelsig.ParseImage(b)
	if err != nil {
		return nil, err
	}
	var parts []attest.ImagePart
	for _, s := range m.Sections {
		parts = append(parts, attest.ImagePart{Name: s.Name, Data: s.Data})
	}
	var kernel *[32]byte
	if linux, ok := m.Section(".linux"); ok {
		inner, err := kernelsig.ParseImage(linux)
		if err != nil {
			return nil, fmt.Errorf("the kernel in it: %w", err)
		}
		hash := inner.Hash()
		kernel = &hash
	}
	return []attest.Component{attest.Predict(stem(path), b, m.Hash(), parts, kernel)}, nil
}

func writeLocks(refs *attest.References, dir string) error {
	if !isDirectory(dir) {
		return fmt.Errorf("%s is no directory: %w", dir, errs.NotFound)
	}
	for i := range refs.Components {
		c := &refs.Components[i]
		b, err := c.PCRLock()
		if err != nil {
			return err
		}
		if err := host.WriteFile(filepath.Join(dir, c.Name+".pcrlock"), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func newAttestLearnCommand(e *env) *cobra.Command {
	var name, to string
	c := &cobra.Command{
		Use:   "learn FILE --name NAME",
		Short: "Propose a policy from a machine that you know is good",
		Long: `Reads a file of ringwall attest evidence, or of ringwall attest archive, and prints an attestation policy that
accepts what this machine booted: firmware, Secure Boot's keys and lists, boot
programs, sections of its image. It is a proposal: whoever signs it off says that
the machine is good. Only what its quote covers goes in.

Firmware is learned like this, once for each kind of machine. For images prefer
ringwall attest predict, which needs no machine. Fill in by hand: ek_bases (why TPMs
are believed) and policy_record; until then the policy refuses everybody.`,
		Example: `  ringwall attest learn web-1.json --name "R650, BIOS 1.9.2" -o attestation.json`,
		Args:    exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := learnFrom(args[0], name)
			if err != nil {
				return err
			}
			b, err := json.MarshalIndent(p, "", "  ")
			if err != nil {
				return fmt.Errorf("encode: %w", err)
			}
			return saveOrPrint(e, to, append(b, '\n'))
		},
	}
	c.Flags().StringVar(&name, "name", "", "`NAME` of the policy and of the kind of machine")
	c.Flags().StringVarP(&to, "out", "o", "", "write to this `FILE`")
	require(c, "name")
	return c
}

// learnFrom reads evidence as hosts collect it, or as servers keep it.
func learnFrom(path, name string) (*attest.Policy, error) {
	b, err := readZipped(path, attest.MaxArchive)
	if err != nil {
		return nil, err
	}
	var p *attest.Policy
	c, err := attest.ParseCollected(b)
	if err == nil {
		p, err = c.Propose(name)
	} else if archived, err2 := attest.ProposeArchived(b, name); err2 == nil {
		p, err = archived, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}
