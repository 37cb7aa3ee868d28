package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ringwall/internal/attest"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func newAttestCommand(e *env) *cobra.Command {
	c := newGroup("attest", groupHost, "Prove, and look at, what a machine booted and ran",
		`Firmware, boot loader and kernel measure what they start into the TPM's platform
configuration registers (PCRs) and keep a log. The log is a file like any other;
only together with the PCRs does it say what happened. A quote by the TPM proves the
PCRs to others, and a policy says which machines are good.`,
		newAttestLogCommand(e), newAttestIMACommand(e), newAttestEvidenceCommand(e), newAttestVerifyCommand(e), newAttestVerifyArchiveCommand(e),
		newAttestLearnCommand(e), newAttestPredictCommand(e), newAttestMeasureCommand(e),
		newAttestHostsCommand(e), newAttestArchiveCommand(e))
	c.AddCommand(attestOrderCommands(e)...)
	return c
}

type bootEventJSON struct {
	Event    int    `json:"event"`
	PCR      int    `json:"pcr"`
	Type     string `json:"type"`
	Digest   string `json:"digest"`
	Measured *bool  `json:"data_measured,omitempty"`
	Data     string `json:"data"`
}

type pcrJSON struct {
	PCR    int    `json:"pcr"`
	Log    string `json:"log"`
	TPM    string `json:"tpm,omitempty"`
	Agrees *bool  `json:"agrees,omitempty"`
}

type bootLogJSON struct {
	Banks    []string        `json:"banks"`
	Bank     string          `json:"bank"`
	Locality byte            `json:"startup_locality"`
	Events   []bootEventJSON `json:"events"`
	PCRs     []pcrJSON       `json:"pcrs"`
}

func newAttestLogCommand(e *env) *cobra.Command {
	var bank, pcrs string
	c := &cobra.Command{
		Use:   "log FILE",
		Short: "Show a TCG event log, and compare it with PCRs",
		Long: `Prints every event of a firmware event log and the PCRs that it leads to. FILE is
the kernel's binary_bios_measurements, or a copy.

With --pcrs the log is held against a TPM's values: each PCR must be what its
events make of it. PCR 10 is the kernel's IMA list's and not compared; PCR 16 and
23 are anybody's. A digest is of an event's data only where DATA is yes; what
stands behind "no" is what the log says, and the TPM does not confirm it. The PCRs
are believed as they are read: a remote verifier wants them quoted.

Exit code 5 means that a PCR is not what the log leads to.

JSON: {"banks", "bank", "startup_locality", "events": [{"event", "pcr", "type",
"digest", "data_measured", "data"}], "pcrs": [{"pcr", "log", "tpm", "agrees"}]}`,
		Example: `  ringwall attest log /sys/kernel/security/tpm0/binary_bios_measurements
  ringwall attest log /sys/kernel/security/tpm0/binary_bios_measurements \
      --pcrs /sys/class/tpm/tpm0/pcr-sha256
  ringwall attest log copied.bin --bank sha384 --output json`,
		Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			a, err := attest.ParseAlg(bank)
			if err != nil {
				return usage(fmt.Errorf("--bank: %w", err))
			}
			raw, err := readBounded(args[0], attest.MaxLog)
			if err != nil {
				return err
			}
			log, err := attest.ParseLog(raw)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			out, err := describeLog(log, a, pcrs)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return reportLog(e, out)
		},
	}
	c.Flags().StringVar(&bank, "bank", "sha256", "which digests to look at: sha1, sha256, sha384 or sha512")
	c.Flags().StringVar(&pcrs, "pcrs", "", "compare with the PCRs in `DIR`, files named 0 to 23 (the kernel's pcr-sha256)")
	complete(c, "bank", "sha1", "sha256", "sha384", "sha512")
	return c
}

func describeLog(log *attest.Log, a attest.Alg, pcrs string) (*bootLogJSON, error) {
	leads, err := log.LeadsTo(a)
	if err != nil {
		return nil, err
	}
	out := &bootLogJSON{Bank: a.String(), Locality: log.Locality, Banks: []string{}, Events: []bootEventJSON{}}
	for _, b := range log.Algs {
		out.Banks = append(out.Banks, b.String())
	}
	// as if the TPM said so; what it does say is compared below
	boot, err := attest.Replay(log, nil, leads, nil)
	if err != nil {
		return nil, err
	}
	measured := map[int][]byte{}
	for _, ev := range boot.Events {
		measured[ev.Index] = ev.Measured
	}
	for i := range log.Events {
		raw := &log.Events[i]
		j := bootEventJSON{
			Event: raw.Index, PCR: raw.PCR, Type: raw.Type.String(), Digest: hex.EncodeToString(raw.Digest(a)), Data: attest.DataText(raw.Data),
		}
		if data, extends := measured[raw.Index]; extends {
			yes := data != nil
			j.Measured = &yes
			if yes {
				j.Data = attest.DataText(data)
			}
		}
		out.Events = append(out.Events, j)
	}
	for i, v := range leads.Values {
		p := pcrJSON{PCR: i, Log: hex.EncodeToString(v)}
		if pcrs != "" {
			text, err := readBounded(filepath.Join(pcrs, strconv.Itoa(i)), 1024)
			if err != nil {
				return nil, err
			}
			p.TPM = strings.ToLower(strings.TrimSpace(string(text)))
			if i != 10 && i != 16 && i != 23 {
				same := p.TPM == p.Log
				p.Agrees = &same
			}
		}
		out.PCRs = append(out.PCRs, p)
	}
	return out, nil
}

func reportLog(e *env, out *bootLogJSON) error {
	err := e.emit(out, func(w io.Writer) {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "EVENT\tPCR\tTYPE\tDIGEST\tDATA\t")
		for _, v := range out.Events {
			yes := "-"
			if v.Measured != nil {
				yes = map[bool]string{true: "yes", false: "no"}[*v.Measured]
			}
			fmt.Fprintf(t, "%d\t%d\t%s\t%.16s\t%s\t%.100s\n", v.Event, v.PCR, v.Type, v.Digest, yes, shown(v.Data))
		}
		_ = t.Flush()
		fmt.Fprintf(w, "\nPCRs (%s), started from locality %d\n", out.Bank, out.Locality)
		for _, p := range out.PCRs {
			word := ""
			if p.Agrees != nil {
				word = map[bool]string{true: "  as in the TPM", false: "  NOT: " + p.TPM}[*p.Agrees]
			}
			fmt.Fprintf(w, "%2d  %s%s\n", p.PCR, p.Log, word)
		}
	})
	if err != nil {
		return err
	}
	for _, p := range out.PCRs {
		if p.Agrees != nil && !*p.Agrees {
			err = errors.Join(err, fmt.Errorf("PCR %d is not what the log leads to: %w", p.PCR, errs.Untrusted))
		}
	}
	return err
}

type imaEntryJSON struct {
	Entry    int    `json:"entry"`
	Template string `json:"template"`
	State    string `json:"state"`
	Digest   string `json:"digest,omitempty"`
	Path     string `json:"path"`
}

type imaJSON struct {
	Bank     string         `json:"bank"`
	Entries  []imaEntryJSON `json:"entries"`
	Unknown  int            `json:"unknown"`
	PCR      string         `json:"pcr"`
	TPM      string         `json:"tpm,omitempty"`
	Rest     int            `json:"bytes_after_the_quote"`
	Verified bool           `json:"verified"`
}

func newAttestIMACommand(e *env) *cobra.Command {
	var bank, pcrs string
	var cats []string
	c := &cobra.Command{
		Use:   "ima FILE",
		Short: "Show what the kernel measured, and what of it no catalogue knows",
		Long: `Prints the entries of the kernel's IMA measurement list. FILE is
binary_runtime_measurements, or a copy.

With --pcrs the list is held against PCR 10, which is read first because the list
grows: only entries that lead to the TPM's value are shown. With --catalogue each
entry is looked up; who signed a catalogue is not asked (ringwall verify does).

STATE: known, unknown, boot (the digest of the PCRs before the kernel), violation
(the file changed while it was measured; the path is the host's word), or - without
catalogues. Exit code 1 means that something is unknown or a violation, 5 that the
list does not lead to the TPM's value.

JSON: {"bank", "entries": [{"entry", "template", "state", "digest", "path"}],
"unknown", "pcr", "tpm", "bytes_after_the_quote", "verified"}`,
		Example: `  ringwall attest ima /sys/kernel/security/ima/binary_runtime_measurements
  ringwall attest ima /sys/kernel/security/ima/binary_runtime_measurements \
      --pcrs /sys/class/tpm/tpm0/pcr-sha256 --catalogue edged.cat --catalogue debian.cat`,
		Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			a, err := attest.ParseAlg(bank)
			if err != nil {
				return usage(fmt.Errorf("--bank: %w", err))
			}
			var known attest.Catalogues
			if len(cats) > 0 {
				if known, err = openCatalogues(cats); err != nil {
					return err
				}
			}
			out, err := describeIMA(args[0], a, pcrs, known)
			if err != nil {
				return err
			}
			return reportIMA(e, out, known != nil)
		},
	}
	c.Flags().StringVar(&bank, "bank", "sha256", "which PCR bank: sha1, sha256, sha384 or sha512")
	c.Flags().StringVar(&pcrs, "pcrs", "", "compare with PCR 10 in `DIR`, a file named 10 (the kernel's pcr-sha256)")
	c.Flags().StringArrayVar(&cats, "catalogue", nil, "look entries up in this `FILE.cat`; may be repeated")
	complete(c, "bank", "sha1", "sha256", "sha384", "sha512")
	return c
}

// catalogues are the catalogues of releases as references for measurements.
type catalogues struct {
	names    []string
	contents []*codesign.Catalogue
	verity   map[integrity.Digest]bool
}

func openCatalogues(paths []string) (*catalogues, error) {
	c := &catalogues{verity: map[integrity.Digest]bool{}}
	for _, p := range paths {
		blob, err := readBounded(p, maxCatalogueFile)
		if err != nil {
			return nil, err
		}
		cat, err := codesign.ParseCatalogue(blob)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		for _, r := range cat.All() {
			if !r.Verity.IsZero() {
				c.verity[r.Verity] = true
			}
		}
		c.contents = append(c.contents, cat)
		c.names = append(c.names, "sha256:"+cat.Digest().String())
	}
	return c, nil
}

// Knows implements attest.Catalogues: SHA-256 only, which is what catalogues have.
func (c *catalogues) Knows(alg string, digest []byte, verity bool) bool {
	if alg != attest.SHA256.String() || len(digest) != len(integrity.Digest{}) {
		return false
	}
	if verity {
		return c.verity[integrity.Digest(digest)]
	}
	return slices.ContainsFunc(c.contents, func(cat *codesign.Catalogue) bool {
		_, found := cat.Lookup(integrity.Digest(digest))
		return found
	})
}

// Names implements attest.Catalogues.
func (c *catalogues) Names() []string { return c.names }

func describeIMA(path string, a attest.Alg, pcrs string, known attest.Catalogues) (*imaJSON, error) {
	out := &imaJSON{Bank: a.String(), Entries: []imaEntryJSON{}}
	var quoted []byte
	if pcrs != "" {
		text, err := readBounded(filepath.Join(pcrs, "10"), 1024)
		if err != nil {
			return nil, err
		}
		out.TPM = strings.ToLower(strings.TrimSpace(string(text)))
		if quoted, err = hex.DecodeString(out.TPM); err != nil {
			return nil, fmt.Errorf("%s: %w: %w", filepath.Join(pcrs, "10"), err, errs.Invalid)
		}
	}
	list, err := readBounded(path, attest.MaxIMA)
	if err != nil {
		return nil, err
	}
	size := attest.IMADigestSize(list, a)
	if size == 0 && len(list) > 0 {
		return nil, fmt.Errorf("%s: no IMA list: %w", path, errs.Invalid)
	}
	if quoted == nil {
		end, err := attest.IMALeadsTo(list, size, a)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		quoted = end.PCR
	}
	end, rest, err := attest.ReplayIMA(list, size, attest.IMAState{}, a, quoted, func(m *attest.IMAEntry) error {
		out.add(m, known)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	out.PCR, out.Rest, out.Verified = hex.EncodeToString(end.PCR), rest, pcrs != ""
	return out, nil
}

func (o *imaJSON) add(m *attest.IMAEntry, known attest.Catalogues) {
	j := imaEntryJSON{Entry: m.Index, Template: m.Template, State: "-", Path: m.Path}
	if !m.Violation {
		j.Digest = m.Alg + ":" + hex.EncodeToString(m.Digest)
	}
	switch {
	case m.Index == 0:
		j.State = "boot"
	case m.Violation:
		j.State = "violation"
		o.Unknown++
	case known == nil:
	case known.Knows(m.Alg, m.Digest, m.Verity):
		j.State = "known"
	default:
		j.State = "unknown"
		o.Unknown++
	}
	o.Entries = append(o.Entries, j)
}

func reportIMA(e *env, out *imaJSON, looked bool) error {
	err := e.emit(out, func(w io.Writer) {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "ENTRY\tSTATE\tTEMPLATE\tDIGEST\tPATH")
		for _, v := range out.Entries {
			fmt.Fprintf(t, "%d\t%s\t%s\t%.23s\t%s\n", v.Entry, v.State, shown(v.Template), v.Digest, shown(v.Path))
		}
		_ = t.Flush()
		word := "as the list says; nobody vouches for it"
		if out.Verified {
			word = "as in the TPM"
		}
		fmt.Fprintf(w, "\nPCR 10 (%s)  %s  %s\n", out.Bank, out.PCR, word)
	})
	if err == nil && looked && out.Unknown > 0 {
		err = fmt.Errorf("%d of %d entries are in no catalogue, or violations: %w", out.Unknown, len(out.Entries), errs.Denied)
	}
	return err
}
