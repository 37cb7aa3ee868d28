package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

// auditVerify is what `ringwall audit verify` was asked.
type auditVerify struct {
	server      bool
	trust, kept string
	from        string
	marks       []string // NUMBER:HASH
	signed      []string // notes, log directories, URLs

	key *pki.LogKey
}

func newAuditVerifyCommand(e *env) *cobra.Command {
	var v auditVerify
	c := &cobra.Command{
		Use:   "verify FILE | DIR | --server",
		Short: "Check that the audit log is whole and unchanged",
		Long: `FILE is an export (- for standard input), DIR a copy of the published log, --server
the server that you are logged in to.

An export's chain shows any record that was edited, dropped, moved or inserted.
That nothing was cut off at its end, and that it was not all written anew, needs
something that was kept elsewhere: --signed, a checkpoint that the server signed
or the published log itself, with --trust, the server's audit-log.pub; or
--checkpoint, a NUMBER:HASH as this command prints it. Give all that you have.

With a published log, every tile of it is checked too, and that it holds exactly
the export's records. DIR alone is checked for itself: it has the records' hashes
and not what they say.

--server compares what the server says now. Without --trust its own word is taken
for the key. --keep FILE keeps the newest checkpoint when all is well, and holds
the next run against it: a server that has lost or rewritten anything since does
not pass.

JSON: {"records", "from", "to": {"seq", "hash"}, "refused", "signed"}; signed is how
many records a signed checkpoint is about.`,
		Example: `  ringwall audit verify audit.jsonl --signed audit.checkpoint --trust audit-log.pub
  ringwall audit verify audit.jsonl --checkpoint 1200:5bb9c2f4…
  ringwall audit verify audit.jsonl --signed /srv/copy/audit-log --trust audit-log.pub
  ringwall audit verify /srv/copy/audit-log --trust audit-log.pub
  ringwall audit verify --server --trust audit-log.pub --keep last.checkpoint`,
		Args: func(_ *cobra.Command, args []string) error {
			if v.server != (len(args) == 0) || len(args) > 1 {
				return usage(errors.New("want one of FILE, DIR and --server"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			rep, err := v.run(c.Context(), e, append(args, "")[0])
			if err != nil {
				return err
			}
			return e.emit(rep, func(w io.Writer) { writeAuditReport(w, rep) })
		},
	}
	f := c.Flags()
	f.BoolVar(&v.server, "server", false, "verify the server that you are logged in to")
	f.StringVar(&v.trust, "trust", "", "the key of the published log: the server's audit-log.pub (`FILE`)")
	f.StringArrayVar(&v.signed, "signed", nil, "`FILE` with a signed checkpoint, or a published log's directory or URL; repeat")
	f.StringVar(&v.kept, "keep", "", "`FILE` with the signed checkpoint of the last run, if there was one; the newest takes its place")
	f.StringArrayVar(&v.marks, "checkpoint", nil, "a `NUMBER:HASH` that must be in the log; repeat")
	f.StringVar(&v.from, "from", "", "the `NUMBER:HASH` that the export begins after (default: the beginning)")
	return c
}

func writeAuditReport(w io.Writer, rep *audit.Report) {
	fmt.Fprintf(w, "%d records, %d of them refusals: the chain is whole\n", rep.Records, rep.Refused)
	switch {
	case rep.Signed == 0:
		fmt.Fprintln(w, "nothing signed to hold it against: that its end was not cut off is not shown")
	case rep.Signed < rep.To.Seq:
		fmt.Fprintf(w, "signed: the first %d; the last %d are newer\n", rep.Signed, rep.To.Seq-rep.Signed)
	default:
		fmt.Fprintf(w, "signed: all %d\n", rep.Signed)
	}
	fmt.Fprintf(w, "checkpoint: %s\n", rep.To)
}

func (v *auditVerify) run(ctx context.Context, e *env, place string) (*audit.Report, error) {
	if v.trust != "" {
		line, err := readLine(v.trust)
		if err != nil {
			return nil, fmt.Errorf("trust: %w", err)
		}
		if v.key, err = pki.ParseLogKey(line); err != nil {
			return nil, fmt.Errorf("trust %s: %w", v.trust, err)
		}
	}
	if v.kept != "" && exists(v.kept) {
		v.signed = append(v.signed, v.kept)
	}
	var kept []audit.Checkpoint
	for _, k := range v.marks {
		c, err := audit.ParseCheckpoint(k)
		if err != nil {
			return nil, err
		}
		kept = append(kept, c)
	}
	if v.server {
		client, err := connect(e)
		if err != nil {
			return nil, err
		}
		return v.ofServer(ctx, client, kept)
	}
	if st, err := os.Stat(place); place != "-" && err == nil && st.IsDir() {
		return v.ofLog(ctx, place, kept)
	}
	in := io.NopCloser(e.stdin)
	if place != "-" {
		f, err := os.Open(place)
		if err != nil {
			return nil, err
		}
		in = f
	}
	defer func() { _ = in.Close() }()
	return v.ofExport(ctx, in, nil, kept)
}

// ofServer takes the checkpoint before the records, so that they hold what it is
// about.
func (v *auditVerify) ofServer(ctx context.Context, client *api.Client, kept []audit.Checkpoint) (*audit.Report, error) {
	now, err := serverCheckpoint(ctx, client)
	if err != nil {
		return nil, err
	}
	if v.key == nil {
		if v.key, err = pki.ParseLogKey(now.Key); err != nil {
			return nil, fmt.Errorf("the server's key: %w", err)
		}
	}
	in := pipeAudit(ctx, client)
	defer func() { _ = in.Close() }()
	return v.ofExport(ctx, in, []byte(now.Checkpoint), kept)
}

// ofExport verifies records against all that was given; note is a signed
// checkpoint beside those.
func (v *auditVerify) ofExport(ctx context.Context, in io.Reader, note []byte, kept []audit.Checkpoint) (*audit.Report, error) {
	signed, newest, err := v.open(ctx, note)
	if err != nil {
		return nil, err
	}
	var rep *audit.Report
	if v.from != "" {
		if len(signed) > 0 {
			return nil, usage(errors.New("--from: a signed checkpoint is about the log from its first record on; export all of it"))
		}
		var from audit.Checkpoint
		if from, err = audit.ParseCheckpoint(v.from); err == nil {
			rep, err = audit.Verify(in, from, kept...)
		}
	} else {
		rep, err = audit.VerifySigned(in, signed, kept...)
	}
	if err != nil {
		return nil, err
	}
	return rep, v.keep(newest)
}

// open verifies what is signed, and returns the newest note of it. Logs are read
// whole.
func (v *auditVerify) open(ctx context.Context, note []byte) ([]pki.Checkpoint, []byte, error) {
	if len(v.signed) > 0 && v.key == nil {
		return nil, nil, usage(errors.New("--signed needs --trust FILE, the server's audit-log.pub"))
	}
	var out []pki.Checkpoint
	var newest []byte
	most := uint64(0)
	add := func(what string, c *pki.Checkpoint, note []byte, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if newest == nil || c.Size >= most {
			newest, most = note, c.Size
		}
		out = append(out, *c)
		return nil
	}
	if note != nil {
		c, err := pki.OpenCheckpoint(note, v.key)
		if err := add("the server's checkpoint", c, note, err); err != nil {
			return nil, nil, err
		}
	}
	for _, place := range v.signed {
		if st, err := os.Stat(place); err == nil && st.Mode().IsRegular() {
			b, err := readBounded(place, 64<<10)
			if err != nil {
				return nil, nil, err
			}
			c, err := pki.OpenCheckpoint(b, v.key)
			if err := add(place, c, b, err); err != nil {
				return nil, nil, err
			}
			continue
		} else if err != nil && !strings.Contains(place, "://") {
			return nil, nil, err
		}
		c, b, err := v.log(ctx, place, func(audit.Checkpoint) error { return nil })
		if err := add(place, c, b, err); err != nil {
			return nil, nil, err
		}
	}
	return out, newest, nil
}

// log reads a published log whole and verifies it.
func (v *auditVerify) log(ctx context.Context, place string, visit func(audit.Checkpoint) error) (*pki.Checkpoint, []byte, error) {
	src, err := transparency.OpenSource(place)
	if err != nil {
		return nil, nil, usage(err)
	}
	r := transparency.NewReader(src, *v.key)
	c, note, err := r.Checkpoint(ctx)
	if err != nil {
		return nil, nil, err
	}
	err = r.Each(ctx, c, func(index uint64, entry []byte) error {
		at, err := audit.ParseCheckpoint(string(entry))
		if err != nil || at.Seq != index+1 {
			return fmt.Errorf("entry %d is not record %d's: %w", index, index+1, errs.Untrusted)
		}
		return visit(at)
	})
	return c, note, err
}

// ofLog verifies a published log by itself.
func (v *auditVerify) ofLog(ctx context.Context, place string, kept []audit.Checkpoint) (*audit.Report, error) {
	if v.key == nil || v.from != "" {
		return nil, usage(errors.New("a published log needs --trust FILE, the server's audit-log.pub, and is read from its beginning"))
	}
	rep := &audit.Report{}
	open := map[uint64]audit.Hash{}
	for _, k := range kept {
		open[k.Seq] = k.Hash
	}
	c, note, err := v.log(ctx, place, func(at audit.Checkpoint) error {
		if h, ok := open[at.Seq]; ok && h != at.Hash {
			return fmt.Errorf("record %d is not the one of the checkpoint: the log was written anew: %w", at.Seq, errs.Untrusted)
		}
		delete(open, at.Seq)
		rep.Records, rep.From, rep.To = rep.Records+1, 1, at
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", place, err)
	}
	for seq := range open {
		if seq > 0 {
			return nil, fmt.Errorf("%s: a checkpoint knows record %d, the log ends at %d: it was cut off: %w", place, seq, rep.To.Seq, errs.Untrusted)
		}
	}
	older, _, err := v.open(ctx, nil)
	if err != nil {
		return nil, err
	}
	for i := range older {
		if older[i].Size > c.Size {
			return nil, fmt.Errorf("%s: %d records were published, the log has %d: it was cut off: %w", place, older[i].Size, c.Size, errs.Untrusted)
		}
		if err := transparency.NewReader(transparency.Dir(place), *v.key).Consistent(ctx, &older[i], c); err != nil {
			return nil, fmt.Errorf("%s: %w", place, err)
		}
	}
	rep.Signed = c.Size
	return rep, v.keep(note)
}

func (v *auditVerify) keep(note []byte) error {
	switch {
	case v.kept == "":
		return nil
	case note == nil:
		return usage(errors.New("--keep: there is no signed checkpoint to keep"))
	}
	return host.WriteFile(v.kept, note, 0o644)
}
