package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
)

func newAuditCommand(e *env) *cobra.Command {
	return newGroup("audit", groupFleet, "Read and verify the server's audit log",
		`Every change, made, failed or refused, is a record that holds the SHA-256
of the one before it. An export can be verified without the server and without
trusting it: no record can be edited, dropped, moved or inserted. Keep the last
checkpoint of each verification somewhere else: it shows when the log's end was
cut off or all of it was written anew.`,
		newAuditExportCommand(e), newAuditVerifyCommand(e))
}

func newAuditExportCommand(e *env) *cobra.Command {
	var after uint64
	c := &cobra.Command{
		Use:     "export",
		Short:   "Print the audit log as JSON lines",
		Long:    "Prints a JSON object a line: seq, at, actor, action, target, outcome, reason,\ndetail (a text that holds JSON), prev, hash.",
		Example: "  ringwall audit export > audit.jsonl\n  ringwall audit export --after 1200 >> audit.jsonl",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			return client.Lines(c.Context(), "/ringwall/audit?after="+strconv.FormatUint(after, 10), func(line []byte) error {
				_, err := fmt.Fprintf(e.stdout, "%s\n", line)
				return err
			})
		},
	}
	c.Flags().Uint64Var(&after, "after", 0, "begin after this record's `NUMBER`")
	return c
}

func newAuditVerifyCommand(e *env) *cobra.Command {
	var kept []string
	var from string
	c := &cobra.Command{
		Use:   "verify FILE",
		Short: "Check that an export is the whole, unchanged log",
		Long: `Reads an export and checks the chain of its records. A checkpoint is NUMBER:HASH,
as this command prints it; give those that you kept.

JSON: {"records", "from", "to": {"seq", "hash"}, "refused"}`,
		Example: `  ringwall audit verify audit.jsonl
  ringwall audit verify audit.jsonl --checkpoint 1200:5bb9c2f4…`,
		Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			var start audit.Checkpoint
			var err error
			if from != "" {
				if start, err = parseCheckpoint(from); err != nil {
					return err
				}
			}
			var marks []audit.Checkpoint
			for _, k := range kept {
				m, err := parseCheckpoint(k)
				if err != nil {
					return err
				}
				marks = append(marks, m)
			}
			in := io.NopCloser(e.stdin)
			if args[0] != "-" {
				if in, err = os.Open(args[0]); err != nil {
					return err
				}
				defer func() { _ = in.Close() }()
			}
			rep, err := audit.Verify(in, start, marks...)
			if err != nil {
				return err
			}
			return e.emit(rep, func(w io.Writer) {
				fmt.Fprintf(w, "%d records, %d of them refusals: the chain is whole\ncheckpoint: %d:%s\n", rep.Records, rep.Refused, rep.To.Seq, rep.To.Hash)
			})
		},
	}
	f := c.Flags()
	f.StringArrayVar(&kept, "checkpoint", nil, "a `NUMBER:HASH` that must be in the log; repeat")
	f.StringVar(&from, "from", "", "the `NUMBER:HASH` that the export begins after (default: the beginning)")
	return c
}

func parseCheckpoint(s string) (audit.Checkpoint, error) {
	var c audit.Checkpoint
	number, hash, ok := strings.Cut(s, ":")
	n, err := strconv.ParseUint(number, 10, 64)
	if !ok || err != nil || json.Unmarshal([]byte(strconv.Quote(hash)), &c.Hash) != nil {
		return c, fmt.Errorf("checkpoint %.100q: want NUMBER:HASH: %w", s, errs.Invalid)
	}
	c.Seq = n
	return c, nil
}
