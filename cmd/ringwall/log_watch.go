package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

const maxAskedFile = 1 << 30

func newLogMonitorCommand(e *env) *cobra.Command {
	var t logTrust
	var state string
	var asked []string
	c := &cobra.Command{
		Use:   "monitor LOG --trust KEY --state FILE --asked PATH...",
		Short: "Find signatures that nobody asked for",
		Long: `Reads what is new in a log since the last run, and compares it with what you know
was asked to be signed. --asked is a signed file, a directory of them (*.json), or
a signer's audit file (*.jsonl, the field log_entry); repeat it.

Reported, with exit code 1:
  a signature in the log that nobody asked for: somebody else can sign
  a signed file that is not in the log: it was made past the log, or the log
  shows different people different things

A log that does not continue what the last run saw, is not complete, or is not
signed by its key is exit code 5; the state file stays as it was, and holds the
log's own signature over what it said before.

A finding is reported at every run until --asked explains it. Run it from a timer,
away from the machine that signs.

JSON: {"from", "size", "unasked": [as in ringwall log show], "missing": [{"name",
"hash", "why"}]}`,
		Example: `  ringwall log monitor https://log.fleet.example --trust log.pub --state monitor.json --asked releases --asked audit.jsonl`,
		Args:    exactly("LOG"),
		RunE: func(c *cobra.Command, args []string) error {
			key, err := t.key()
			if err != nil {
				return err
			}
			src, err := transparency.OpenSource(args[0])
			if err != nil {
				return usage(err)
			}
			known, err := loadAsked(asked)
			if err != nil {
				return err
			}
			before, err := readBounded(state, 64<<20)
			if errors.Is(err, fs.ErrNotExist) {
				before = nil
			} else if err != nil {
				return err
			}
			m, err := transparency.NewMonitor(src, key, before)
			if err != nil {
				return err
			}
			return monitor(c.Context(), e, m, known, state)
		},
	}
	t.flags(c)
	f := c.Flags()
	f.StringVar(&state, "state", "", "remember in `FILE` what was seen")
	f.StringArrayVar(&asked, "asked", nil, "signed file, directory of them, or audit file; repeat")
	require(c, "state")
	return c
}

func monitor(ctx context.Context, e *env, m *transparency.Monitor, known *transparency.Asked, state string) error {
	r, err := m.Run(ctx, known)
	if err != nil {
		return err
	}
	after, err := m.State()
	if err != nil {
		return err
	}
	// The report comes first: a state that is written and a report that is not would lose it.
	if err := e.emit(r, func(w io.Writer) {
		fmt.Fprintf(w, "%d new entries, %d in all\n", r.Size-r.From, r.Size)
		for i := range r.Unasked {
			fmt.Fprintln(w, "nobody asked for:")
			writeEntry(w, &r.Unasked[i])
		}
		for _, x := range r.Missing {
			fmt.Fprintf(w, "not in the log: %s\n        %s\n", shown(x.Name), x.Why)
		}
	}); err != nil {
		return err
	}
	if err := host.WriteFile(state, after, 0o600); err != nil {
		return err
	}
	if r.Found() {
		return fmt.Errorf("%d signatures that nobody asked for, %d signed files that are not in the log: %w", len(r.Unasked), len(r.Missing), errs.Denied)
	}
	return nil
}

// loadAsked reads what is known to have been asked for. A file that cannot be
// read as what it is named is an error: it would explain too little or too much.
func loadAsked(paths []string) (*transparency.Asked, error) {
	known := &transparency.Asked{}
	for _, p := range paths {
		files, _ := filesOf(p, ".json") // reading says what is wrong with the path
		for _, f := range files {
			limit, add := int64(maxBundleFile), func(b []byte) error { return known.AddBundle(f, b) }
			if strings.HasSuffix(f, ".jsonl") {
				limit, add = maxAskedFile, known.AddLines
			}
			b, err := readBounded(f, limit)
			if err == nil {
				err = add(b)
			}
			if err != nil {
				return nil, fmt.Errorf("asked %s: %w", f, err)
			}
		}
	}
	return known, nil
}

func newLogWitnessCommand(e *env) *cobra.Command {
	var t logTrust
	var dir, name string
	c := &cobra.Command{
		Use:   "witness LOG --trust KEY --dir DIR",
		Short: "Cosign a log's checkpoint, if it continues the last one",
		Long: `A witness remembers the newest checkpoint of a log and cosigns only one that
continues it (C2SP tlog-cosignature). Who asks for its cosignature knows that the
log showed everybody the same, and how fresh it is: ringwall log verify --cosigned.

DIR holds the witness's key (witness.key, witness.pub) and its last checkpoint
(checkpoint, public). It is made when --name is given. A log that does not
continue that checkpoint is exit code 5 and is not cosigned.

JSON: {"origin", "size", "root", "checkpoint", "witness", "cosigned_at"}`,
		Example: `  ringwall log witness https://log.fleet.example --trust log.pub --dir witness --name witness.example
  ringwall log witness https://log.fleet.example --trust log.pub --dir witness`,
		Args: exactly("LOG"),
		RunE: func(c *cobra.Command, args []string) error {
			r, key, err := t.reader(args[0])
			if err != nil {
				return err
			}
			if name != "" {
				if err := makeWitness(dir, name); err != nil {
					return err
				}
			}
			return witnessOnce(c.Context(), e, r, &key, dir)
		},
	}
	t.flags(c)
	c.Flags().StringVar(&dir, "dir", "", "the witness's `DIR`")
	c.Flags().StringVar(&name, "name", "", "make the witness, with this `NAME`")
	require(c, "dir")
	return c
}

func makeWitness(dir, name string) error {
	private, public, err := transparency.NewWitness(name)
	if err != nil {
		return err
	}
	keyFile := filepath.Join(dir, "witness.key")
	if exists(keyFile) {
		return hint(fmt.Errorf("%s is there already: %w", keyFile, errs.Conflict), "without --name it is used")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // the checkpoint in it is published
		return err
	}
	if err := host.WriteFile(keyFile, private, 0o600); err != nil {
		return err
	}
	return host.WriteFile(filepath.Join(dir, "witness.pub"), []byte(public.String()+"\n"), 0o644)
}

func witnessOnce(ctx context.Context, e *env, r *transparency.Reader, key *pki.LogKey, dir string) error {
	line, err := readLine(filepath.Join(dir, "witness.pub"))
	if err != nil {
		return hint(fmt.Errorf("witness: %w", err), "--name makes one")
	}
	public, err := transparency.ParseWitnessKey(line)
	if err != nil {
		return err
	}
	private, err := readPrivate(filepath.Join(dir, "witness.key"))
	if err != nil {
		return err
	}
	c, note, err := r.Checkpoint(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "checkpoint")
	if exists(file) {
		last, err := continues(ctx, r, key, c, file)
		if err != nil {
			return fmt.Errorf("the log does not continue %s: %w", file, err)
		}
		// A checkpoint that somebody else put there would make the witness forget.
		if _, err := transparency.VerifyCosignature(last, public); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	at := e.now().UTC()
	if note, err = transparency.Cosign(note, private, public, at); err != nil {
		return err
	}
	if err := host.WriteFile(file, note, 0o644); err != nil {
		return err
	}
	out := struct {
		verifiedLog
		Checkpoint string `json:"checkpoint"`
		Witness    string `json:"witness"`
	}{verifiedLog{Origin: key.Origin, Size: c.Size, Root: c.Root, Bundles: []loggedBundle{}, CosignedAt: &at}, file, public.String()}
	return e.emit(out, func(w io.Writer) {
		fmt.Fprintf(w, "cosigned log %s with %d entries: %s\n", key.Origin, c.Size, shown(file))
	})
}

// readPrivate reads a key file that only its owner may read.
func readPrivate(file string) ([]byte, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, hint(fmt.Errorf("%s: mode %04o lets others read it: %w", file, st.Mode().Perm(), errs.Denied), "chmod 0600 %s", file)
	}
	return readBounded(file, 16<<10)
}
