package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

func newLogCommand(e *env) *cobra.Command {
	return newGroup("log", groupSign, "Keep and watch the log of everything that was signed",
		`Every signature of builds, policies and supplements goes into a log that can only
grow, and hosts refuse what has no proof that it is in there: whoever steals the
way to a signature leaves a trace. The log is a directory of plain files, which
anyone may copy or serve by HTTP (C2SP tlog-tiles); reading it takes its key only.

LOG is a directory or a URL. Whom to believe stands in log.pub, in an authority's
directory, or in the trust.logs of a policy.`,
		newLogInitCommand(e), newLogAppendCommand(e), newLogShowCommand(e), newLogVerifyCommand(e),
		newLogMonitorCommand(e), newLogWitnessCommand(e))
}

// logTrust says which log is believed.
type logTrust struct{ trust, origin string }

func (t *logTrust) flags(c *cobra.Command) {
	c.Flags().StringVar(&t.trust, "trust", "", "the log's key: log.pub, an authority's `DIR`, or a policy's YAML")
	c.Flags().StringVar(&t.origin, "origin", "", "the log's `NAME`, where the policy trusts several")
	require(c, "trust")
}

func (t *logTrust) key() (pki.LogKey, error) {
	logs, err := t.logs()
	if err != nil {
		return pki.LogKey{}, err
	}
	var found []pki.LogKey
	for _, l := range logs {
		if t.origin == "" || l.Origin == t.origin {
			found = append(found, l.LogKey)
		}
	}
	switch {
	case len(found) == 0:
		return pki.LogKey{}, fmt.Errorf("trust: %s names no such log: %w", t.trust, errs.NotFound)
	case len(found) > 1:
		return pki.LogKey{}, usage(fmt.Errorf("%s trusts %d logs; --origin says which", t.trust, len(found)))
	}
	return found[0], nil
}

func (t *logTrust) logs() ([]pki.LogAnchor, error) {
	st, err := os.Stat(t.trust)
	if err != nil {
		return nil, fmt.Errorf("trust: %w", err)
	}
	if st.IsDir() {
		a, err := pki.LoadCertificates(t.trust)
		if err != nil || a.Log == nil {
			return nil, err
		}
		return []pki.LogAnchor{*a.Log}, nil
	}
	if strings.HasSuffix(t.trust, ".pub") {
		line, err := readLine(t.trust)
		if err != nil {
			return nil, fmt.Errorf("trust: %w", err)
		}
		k, err := pki.ParseLogKey(line)
		if err != nil {
			return nil, fmt.Errorf("trust %s: %w", t.trust, err)
		}
		return []pki.LogAnchor{{Name: k.Origin, LogKey: *k}}, nil
	}
	p, err := loadPolicy(t.trust)
	if err != nil {
		return nil, err
	}
	return p.Trust.Logs, nil
}

// readLine reads a file of one short line.
func readLine(file string) (string, error) {
	b, err := readBounded(file, 4<<10)
	return strings.TrimSuffix(string(b), "\n"), err
}

// reader opens the log to read.
func (t *logTrust) reader(place string) (*transparency.Reader, pki.LogKey, error) {
	key, err := t.key()
	if err != nil {
		return nil, key, err
	}
	src, err := transparency.OpenSource(place)
	if err != nil {
		return nil, key, usage(err)
	}
	return transparency.NewReader(src, key), key, nil
}

func newLogInitCommand(e *env) *cobra.Command {
	var keys, origin, passphraseFile, keyURI string
	c := &cobra.Command{
		Use:   "init LOG --keys DIR --origin NAME",
		Short: "Make an empty log, and its key",
		Long: `Makes the log's key in an authority's directory (log.key, log.pub) and an empty
log in the directory LOG. From then on nothing that the authority signs is
believed without a proof from the log; what was signed before is added with
ringwall log append. Put the line that it prints into the trust section of your
policies when all that they name is in the log.

The name is a host name, such as log.fleet.example. It need not exist; it is what
sigstore tools look for in a checkpoint.

JSON: {"log", "origin", "key"}`,
		Example: `  ringwall log init log --keys keys --origin log.fleet.example
  ringwall log init log --keys keys --origin log.fleet.example --passphrase-file /run/secrets/pass`,
		Args: exactly("LOG"),
		RunE: func(_ *cobra.Command, args []string) error {
			if exists(filepath.Join(args[0], "checkpoint")) {
				return fmt.Errorf("%s holds a log already: %w", args[0], errs.Conflict)
			}
			o, err := authorityOptions(e, passphraseFile, []string{keyURI})
			if err != nil {
				return err
			}
			if _, err := pki.LoadCertificates(keys); err != nil {
				return err
			}
			anchor, signer, err := pki.SaveLog(keys, origin, *o)
			if err != nil {
				return err
			}
			if err := transparency.Create(args[0], anchor.LogKey, signer); err != nil {
				return err
			}
			out := struct {
				Log    string `json:"log"`
				Origin string `json:"origin"`
				Key    string `json:"key"`
			}{args[0], origin, anchor.String()}
			if err := e.emit(out, func(w io.Writer) {
				fmt.Fprintf(w, "log %s in %s\n  %s\n", origin, shown(args[0]), out.Key)
			}); err != nil {
				return err
			}
			e.notef("Next: give --log %s to whatever signs, and let others copy the directory.", shown(args[0]))
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`")
	f.StringVar(&origin, "origin", "", "the log's `NAME`, a host name")
	passphraseFlag(c, &passphraseFile)
	f.StringVar(&keyURI, "key-uri", "", "make the key in the token that the pkcs11: `URI` names")
	require(c, "keys", "origin")
	return c
}

func newLogAppendCommand(e *env) *cobra.Command {
	var keys, log, passphraseFile string
	c := &cobra.Command{
		Use:   "append BUNDLE... --log LOG --keys DIR",
		Short: "Add signatures that were made without the log",
		Long: `Verifies signed releases or policies, adds their signatures to the log, and writes
the proofs into the files. What ringwall signs with --log needs no append.

JSON: {"appended": [{"file", "index", "hash"}]}`,
		Example: "  ringwall log append releases/*.release.json base.policy.json --log log --keys keys",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return exactly("BUNDLE")(c, args)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			a, err := loadAuthority(e, keys, passphraseFile)
			if err != nil {
				return err
			}
			l, closeLog, err := openLog(a, log)
			if err != nil {
				return err
			}
			return errors.Join(appendAll(c.Context(), e, a, l, args), closeLog())
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`, with log.key")
	f.StringVar(&log, "log", "", "the log's `DIR`")
	passphraseFlag(c, &passphraseFile)
	require(c, "keys", "log")
	return c
}

type appended struct {
	File  string            `json:"file"`
	Index uint64            `json:"index"`
	Hash  transparency.Hash `json:"hash"`
}

func appendAll(ctx context.Context, e *env, a *pki.Authority, l pki.Recorder, files []string) error {
	out := struct {
		Appended []appended `json:"appended"`
	}{[]appended{}}
	for _, f := range files {
		one, err := appendOne(ctx, a, l, f)
		if err != nil {
			return fmt.Errorf("append %s: %w", f, err)
		}
		out.Appended = append(out.Appended, *one)
	}
	return e.emit(out, func(w io.Writer) {
		for _, x := range out.Appended {
			fmt.Fprintf(w, "%s is entry %d\n", shown(x.File), x.Index)
		}
	})
}

func appendOne(ctx context.Context, a *pki.Authority, l pki.Recorder, file string) (*appended, error) {
	b, err := readBounded(file, maxBundleFile)
	if err != nil {
		return nil, err
	}
	// What the authority did not sign has no business in its log.
	for _, p := range pki.Purposes() {
		roots := a.Roots(p)
		roots.Logs = nil
		if _, err = pki.VerifyBundle(b, roots, p); err == nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	if b, err = l.Append(ctx, b); err != nil {
		return nil, err
	}
	if err := host.WriteFile(file, b, 0o644); err != nil {
		return nil, err
	}
	proof, err := pki.ProofOf(b)
	if err != nil {
		return nil, err
	}
	h, err := transparency.EntryHash(b)
	if err != nil {
		return nil, err
	}
	return &appended{file, proof.Index, h}, nil
}

func newLogShowCommand(e *env) *cobra.Command {
	var t logTrust
	var from uint64
	c := &cobra.Command{
		Use:   "show LOG --trust KEY",
		Short: "List the signatures in a log",
		Long: `Verifies the log's checkpoint and every entry, and lists who signed what kind of
thing. A log holds digests, not contents; the certificate's time is the earliest
that the signature can be of.

JSON: {"origin", "size", "root", "entries": [{"index", "hash", "identity", "purpose",
"issuer", "certificate", "not_before", "not_after", "signed"}]}`,
		Example: "  ringwall log show log --trust keys/log.pub --from 120",
		Args:    exactly("LOG"),
		RunE: func(c *cobra.Command, args []string) error {
			r, key, err := t.reader(args[0])
			if err != nil {
				return err
			}
			cp, _, err := r.Checkpoint(c.Context())
			if err != nil {
				return fmt.Errorf("log %s: %w", args[0], err)
			}
			entries, err := r.Entries(c.Context(), from, cp)
			if err != nil {
				return fmt.Errorf("log %s: %w", args[0], err)
			}
			if entries == nil {
				entries = []transparency.Entry{}
			}
			out := struct {
				Origin  string               `json:"origin"`
				Size    uint64               `json:"size"`
				Root    transparency.Hash    `json:"root"`
				Entries []transparency.Entry `json:"entries"`
			}{key.Origin, cp.Size, cp.Root, entries}
			return e.emit(out, func(w io.Writer) {
				fmt.Fprintf(w, "log %s, %d entries\n", out.Origin, out.Size)
				for i := range entries {
					writeEntry(w, &entries[i])
				}
			})
		},
	}
	t.flags(c)
	c.Flags().Uint64Var(&from, "from", 0, "begin with the entry of that `INDEX`")
	return c
}

func writeEntry(w io.Writer, x *transparency.Entry) {
	if x.Identity == "" {
		fmt.Fprintf(w, "%6d  not understood; entry %s\n", x.Index, x.Hash)
		return
	}
	fmt.Fprintf(w, "%6d  %-10s %s  by %s\n        certificate %s, of %s\n", x.Index, x.Purpose,
		x.NotBefore.Format(time.RFC3339), shown(x.Identity), x.Certificate, shown(x.Issuer))
}

type logVerifyOptions struct {
	logTrust
	bundles              []string
	since, cosigned, wit string
	maxAge               time.Duration
}

func newLogVerifyCommand(e *env) *cobra.Command {
	var o logVerifyOptions
	c := &cobra.Command{
		Use:   "verify LOG --trust KEY",
		Short: "Verify a log, and that signatures are in it",
		Long: `Reads the whole log, or a copy of it, and computes every hash again: an entry that
is missing, changed, added or in another place is exit code 5, and so is a
checkpoint that the log's key did not sign. It needs no network and no clock.

  --bundle FILE      the signature is in the log, at the place that its proof says
  --since FILE       the log continues this checkpoint, kept from an earlier day
  --cosigned FILE    the log continues this checkpoint, which --witness cosigned;
                     with --max-age not longer ago than that

Without one of these an old copy of a log verifies as well as a new one.

JSON: {"origin", "size", "root", "bundles": [{"file", "index"}], "cosigned_at"}`,
		Example: `  ringwall log verify log --trust keys
  ringwall log verify https://log.fleet.example --trust base.yaml --bundle edged_4.7.0.release.json
  ringwall log verify mirror --trust log.pub --cosigned witness/checkpoint --witness witness.pub --max-age 24h`,
		Args: exactly("LOG"),
		RunE: func(c *cobra.Command, args []string) error {
			if (o.cosigned == "") != (o.wit == "") || o.maxAge != 0 && o.wit == "" {
				return usage(errors.New("--cosigned and --witness go together, and --max-age with them"))
			}
			return o.run(c.Context(), e, args[0])
		},
	}
	o.flags(c)
	f := c.Flags()
	f.StringArrayVar(&o.bundles, "bundle", nil, "a signed `FILE` that must be in the log; repeat")
	f.StringVar(&o.since, "since", "", "a checkpoint `FILE` that the log must continue")
	f.StringVar(&o.cosigned, "cosigned", "", "a cosigned checkpoint `FILE` that the log must continue")
	f.StringVar(&o.wit, "witness", "", "the witness's key, `FILE` ending in .pub")
	f.DurationVar(&o.maxAge, "max-age", 0, "how long ago the witness may have cosigned it, such as 24h")
	return c
}

type loggedBundle struct {
	File  string `json:"file"`
	Index uint64 `json:"index"`
}

type verifiedLog struct {
	Origin     string            `json:"origin"`
	Size       uint64            `json:"size"`
	Root       transparency.Hash `json:"root"`
	Bundles    []loggedBundle    `json:"bundles"`
	CosignedAt *time.Time        `json:"cosigned_at,omitempty"`
}

func (o *logVerifyOptions) run(ctx context.Context, e *env, place string) error {
	r, key, err := o.reader(place)
	if err != nil {
		return err
	}
	c, _, err := r.Checkpoint(ctx)
	if err == nil {
		err = r.Verify(ctx, c)
	}
	if err != nil {
		return fmt.Errorf("log %s: %w", place, err)
	}
	out := verifiedLog{Origin: key.Origin, Size: c.Size, Root: c.Root, Bundles: []loggedBundle{}}
	for _, f := range o.bundles {
		index, err := verifyLogged(ctx, r, &key, c, f)
		if err != nil {
			return fmt.Errorf("%s in log %s: %w", f, place, err)
		}
		out.Bundles = append(out.Bundles, loggedBundle{f, index})
	}
	if o.since != "" {
		if _, err := continues(ctx, r, &key, c, o.since); err != nil {
			return fmt.Errorf("log %s since %s: %w", place, o.since, err)
		}
	}
	if o.cosigned != "" {
		if out.CosignedAt, err = o.verifyCosigned(ctx, e, r, &key, c); err != nil {
			return fmt.Errorf("log %s: %w", place, err)
		}
	}
	return e.emit(out, func(w io.Writer) {
		fmt.Fprintf(w, "log %s is whole: %d entries\n", out.Origin, out.Size)
		for _, b := range out.Bundles {
			fmt.Fprintf(w, "  %s is entry %d\n", shown(b.File), b.Index)
		}
		if out.CosignedAt != nil {
			fmt.Fprintf(w, "  it continues what the witness saw at %s\n", out.CosignedAt.Format(time.RFC3339))
		}
	})
}

// verifyLogged checks that a bundle's signature is in the log where it says.
func verifyLogged(ctx context.Context, r *transparency.Reader, key *pki.LogKey, c *pki.Checkpoint, file string) (uint64, error) {
	b, err := readBounded(file, maxBundleFile)
	if err != nil {
		return 0, err
	}
	proof, err := pki.ProofOf(b)
	if err != nil {
		return 0, err
	}
	h, err := transparency.EntryHash(b)
	switch {
	case err != nil:
		return 0, err
	case proof == nil:
		return 0, fmt.Errorf("it has no proof: %w", errs.Untrusted)
	case proof.LogID != key.ID():
		return 0, fmt.Errorf("its proof is of another log: %w", errs.Untrusted)
	}
	older, err := pki.OpenCheckpoint(proof.Checkpoint, key)
	if err != nil {
		return 0, err
	}
	if err := r.Consistent(ctx, older, c); err != nil {
		return 0, err
	}
	_, err = r.Inclusion(ctx, h, proof.Index, c)
	return proof.Index, err
}

// continues checks that a log goes on from a checkpoint in a file.
func continues(ctx context.Context, r *transparency.Reader, key *pki.LogKey, c *pki.Checkpoint, file string) ([]byte, error) {
	note, err := readBounded(file, 64<<10)
	if err != nil {
		return nil, err
	}
	older, err := pki.OpenCheckpoint(note, key)
	if err != nil {
		return nil, err
	}
	return note, r.Consistent(ctx, older, c)
}

func (o *logVerifyOptions) verifyCosigned(ctx context.Context, e *env, r *transparency.Reader, key *pki.LogKey, c *pki.Checkpoint) (*time.Time, error) {
	line, err := readLine(o.wit)
	if err != nil {
		return nil, fmt.Errorf("witness: %w", err)
	}
	witness, err := transparency.ParseWitnessKey(line)
	if err != nil {
		return nil, err
	}
	note, err := continues(ctx, r, key, c, o.cosigned)
	if err != nil {
		return nil, err
	}
	at, err := transparency.VerifyCosignature(note, witness)
	if err != nil {
		return nil, err
	}
	if age := e.now().Sub(at); o.maxAge > 0 && age > o.maxAge {
		return nil, fmt.Errorf("%s cosigned it %v ago, longer than %v: %w", witness.Name, age.Truncate(time.Second), o.maxAge, errs.Untrusted)
	}
	return &at, nil
}
