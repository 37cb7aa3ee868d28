package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ringwall/internal/attest"
	"ringwall/internal/errs"
)

func newAttestCommand(e *env) *cobra.Command {
	return newGroup("attest", groupHost, "Look at what a machine measured while it booted",
		`Firmware, boot loader and kernel measure what they start into the TPM's platform
configuration registers (PCRs) and keep a log. The log is a file like any other;
only together with the PCRs does it say what happened.`,
		newAttestLogCommand(e))
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
