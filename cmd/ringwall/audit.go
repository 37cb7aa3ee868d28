package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/syslog"
)

func newAuditCommand(e *env) *cobra.Command {
	return newGroup("audit", groupFleet, "Read and verify the server's audit log",
		`Every change, made, failed or refused, is a record that holds the SHA-256
of the one before it. The server publishes the hashes in a log of its own and
signs how far it is: a checkpoint. An export and a checkpoint can be verified
without the server and without trusting it: no record can be edited, dropped,
moved, inserted or cut off. Keep a checkpoint of each verification elsewhere:
it shows that the whole log was written anew, key and all.`,
		newAuditExportCommand(e), newAuditVerifyCommand(e))
}

func newAuditExportCommand(e *env) *cobra.Command {
	var after uint64
	var checkpoint, format string
	c := &cobra.Command{
		Use:   "export",
		Short: "Print the audit log as JSON lines",
		Long: `Prints a JSON object a line: seq, at, actor, action, target, outcome, reason,
detail (a text that holds JSON), prev, hash. With --format ocsf each is an event
API Activity (6003) of OCSF 1.3.

--checkpoint FILE also writes the newest signed checkpoint, for audit verify. It
is taken first, so that the export holds everything that it is about. A server
publishes a second or two after a change.`,
		Example: `  ringwall audit export > audit.jsonl
  ringwall audit export --checkpoint audit.checkpoint > audit.jsonl
  ringwall audit export --after 1200 >> audit.jsonl
  ringwall audit export --format ocsf | jq .message`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if format != "json" && format != "ocsf" {
				return usage(fmt.Errorf("--format %q: want json or ocsf", format))
			}
			client, err := connect(e)
			if err != nil {
				return err
			}
			if checkpoint != "" {
				signed, err := serverCheckpoint(c.Context(), client)
				if err != nil {
					return err
				}
				if err := host.WriteFile(checkpoint, []byte(signed.Checkpoint), 0o644); err != nil {
					return err
				}
			}
			return exportAudit(c.Context(), client, after, func(line []byte) error {
				if format == "ocsf" {
					if line, err = ocsfLine(line); err != nil {
						return err
					}
				}
				_, err := fmt.Fprintf(e.stdout, "%s\n", line)
				return err
			})
		},
	}
	f := c.Flags()
	f.Uint64Var(&after, "after", 0, "begin after this record's `NUMBER`")
	f.StringVar(&checkpoint, "checkpoint", "", "write the newest signed checkpoint to `FILE`")
	f.StringVar(&format, "format", "json", "json or ocsf (`FORMAT`)")
	return c
}

func exportAudit(ctx context.Context, client *api.Client, after uint64, visit func(line []byte) error) error {
	return client.Lines(ctx, "/ringwall/audit?after="+strconv.FormatUint(after, 10), visit)
}

func ocsfLine(line []byte) ([]byte, error) {
	var r audit.Record
	if err := json.Unmarshal(line, &r); err != nil {
		return nil, fmt.Errorf("a record of the server: %w: %w", err, errs.Invalid)
	}
	event := syslog.AuditEvent(&r)
	return event.JSON()
}

// serverCheckpoint is the newest that the server has, with the key that it says.
func serverCheckpoint(ctx context.Context, client *api.Client) (*signedAudit, error) {
	b, _, err := client.Do(ctx, api.Request{Method: http.MethodGet, Path: "/ringwall/audit/checkpoint"})
	if err != nil {
		return nil, err
	}
	var out signedAudit
	if err := pki.UnmarshalStrict(bytes.TrimSpace(b), &out, 64<<10); err != nil {
		return nil, fmt.Errorf("the server's checkpoint: %w", err)
	}
	return &out, nil
}

// pipeAudit is the server's export as a stream.
func pipeAudit(ctx context.Context, client *api.Client) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		w.CloseWithError(exportAudit(ctx, client, 0, func(line []byte) error {
			_, err := w.Write(append(bytes.Clone(line), '\n'))
			return err
		}))
	}()
	return r
}
