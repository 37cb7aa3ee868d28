package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/codesign"
	"ringwall/internal/control/hosts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// The files of a bundle's directory.
const (
	bundleManifest = "manifest.json"
	bundleRollback = "rollback.json"
	bundleChunks   = "chunks"
)

func newFleetBundleCommand(e *env) *cobra.Command {
	return newGroup("bundle", "", "Make what hosts get, and bring it to the server",
		`A bundle is a directory: a signed manifest, and below chunks/ what it names, each
file under its SHA-256. It is made and signed where the policy key is, and pushed
from anywhere. With --previous a second manifest is signed that brings the content
before back, so that a rollout can go back by itself while you sleep.`,
		newBundleMakeCommand(e), newBundlePushCommand(e), newBundleListCommand(e), newBundleShowCommand(e))
}

type bundleOptions struct {
	keys, passphraseFile, identity, log, tsa string
	scope, previous, out, notBefore          string
	releases, supplements                    []string
	life                                     time.Duration
	tightens                                 bool
}

// madeBundle is what was made.
type madeBundle struct {
	Dir      string           `json:"dir"`
	Scope    string           `json:"scope"`
	Manifest integrity.Digest `json:"manifest"`
	Epoch    uint64           `json:"epoch"`
	Policy   integrity.Digest `json:"policy"`
	Releases int              `json:"releases"`
	Chunks   int              `json:"chunks"`
	Bytes    int64            `json:"bytes"`
	NotAfter time.Time        `json:"not_after"`
	Rollback *madeRollback    `json:"rollback,omitempty"`
}

type madeRollback struct {
	Manifest integrity.Digest `json:"manifest"`
	Epoch    uint64           `json:"epoch"`
	Of       integrity.Digest `json:"brings_back"` // the manifest whose content it has
}

func newBundleMakeCommand(e *env) *cobra.Command {
	var o bundleOptions
	c := &cobra.Command{
		Use:   "make POLICY --keys DIR --out DIR",
		Short: "Sign a policy and a manifest, with everything that hosts need",
		Long: `Checks the policy and that every release and supplement is one that it trusts, signs
the policy and a manifest over all of it, and writes a directory for push. The
manifest's epoch is the policy's: raise it by two each time, since the number
after it belongs to the manifest that goes back.

With --previous, the directory of the bundle that hosts have now, it also signs
that manifest: the content of --previous under the next epoch, good only for hosts
that were given this one. Nothing else can bring an older policy back.

JSON: {"dir", "scope", "manifest", "epoch", "policy", "releases", "chunks",
"bytes", "not_after", "rollback": {"manifest", "epoch", "brings_back"}}`,
		Example: `  ringwall fleet bundle make base.yaml --keys keys --release releases --out b12
  ringwall fleet bundle make base.yaml --keys keys --release releases --previous b12 --out b14
  ringwall fleet bundle push b14`,
		Args: exactly("POLICY"),
		RunE: func(_ *cobra.Command, args []string) error {
			made, err := o.make(e, args[0])
			if err != nil {
				return err
			}
			return e.emit(made, func(w io.Writer) {
				fmt.Fprintf(w, "manifest %v\n  epoch %d for %s, %d releases, %d chunks, %d bytes, until %s\n", made.Manifest, made.Epoch, made.Scope, made.Releases, made.Chunks, made.Bytes, made.NotAfter.Format(time.RFC3339))
				if r := made.Rollback; r != nil {
					fmt.Fprintf(w, "rollback %v\n  epoch %d, brings back %v\n", r.Manifest, r.Epoch, r.Of)
				}
				fmt.Fprintf(w, "push it: ringwall fleet bundle push %s\n", shown(made.Dir))
			})
		},
	}
	f := c.Flags()
	f.StringVar(&o.keys, "keys", "", "the authority's `DIR`, with the keys policy-ca and tsa")
	passphraseFlag(c, &o.passphraseFile)
	f.StringVar(&o.identity, "identity", "", "who signs, as a `URI`")
	f.StringVar(&o.scope, "scope", "/", "`ID` in the tree below which hosts may take it")
	f.StringArrayVar(&o.releases, "release", nil, "release `FILE` (.release.json, .cat and .names beside it), or a directory of them; repeat")
	f.StringArrayVar(&o.supplements, "supplement", nil, "signed supplemental policy `FILE`; repeat")
	f.StringVar(&o.previous, "previous", "", "`DIR` of the bundle that hosts have now, to go back to")
	f.StringVar(&o.out, "out", "", "write the bundle to this new `DIR`")
	f.StringVar(&o.notBefore, "not-before", "", "hosts begin not before this `TIME` (2031-05-01T12:00:00Z)")
	f.DurationVar(&o.life, "life", 90*24*time.Hour, "how `LONG` a host may begin to use it; what is in force stays")
	f.BoolVar(&o.tightens, "tightens", false, "hosts do not go back by themselves from it; for emergencies only")
	f.StringVar(&o.log, "log", "", "append the signatures to the transparency log in `DIR`")
	f.StringVar(&o.tsa, "tsa", "", "timestamp authority's `URL` (default: the authority's own)")
	require(c, "keys", "out")
	return c
}

// bundleWriter collects chunks in a directory.
type bundleWriter struct {
	dir    string
	chunks map[integrity.Digest]int
}

func (b *bundleWriter) add(data []byte) (integrity.Digest, error) {
	d := integrity.Digest(sha256.Sum256(data))
	if _, there := b.chunks[d]; there {
		return d, nil
	}
	b.chunks[d] = len(data)
	return d, host.WriteFile(filepath.Join(b.dir, bundleChunks, d.String()), data, 0o644)
}

func (o *bundleOptions) make(e *env, file string) (made *madeBundle, err error) {
	scope, err := resource.ParseID(o.scope)
	if err != nil {
		return nil, err
	}
	from := e.now().UTC().Truncate(time.Second)
	if o.notBefore != "" {
		if from, err = time.Parse(time.RFC3339, o.notBefore); err != nil {
			return nil, usage(fmt.Errorf("--not-before %q: want UTC, such as 2031-05-01T12:00:00Z", o.notBefore))
		}
	}
	if exists(o.out) {
		return nil, hint(fmt.Errorf("%s is there already: %w", o.out, errs.Conflict), "a bundle is made anew, and never changed")
	}
	doc, err := readBounded(file, maxPolicyFile)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return o.makeOf(e, file, doc, scope, from, o.items)
}

// makeOf makes a bundle of a policy's text and what carry gives.
func (o *bundleOptions) makeOf(e *env, file string, doc []byte, scope resource.ID, from time.Time,
	carry func(*integrity.Policy, *bundleWriter) ([]codesign.Item, error),
) (made *madeBundle, err error) {
	p, err := integrity.ParseNamed(file, doc)
	if err != nil {
		return nil, err
	}
	if p.Supplements != "" {
		return nil, fmt.Errorf("policy %s adds to %s: give it with --supplement: %w", p.Name, p.Supplements, errs.Invalid)
	}
	s, closeLog, err := o.signer(e)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeLog()) }()
	if err := os.MkdirAll(filepath.Join(o.out, bundleChunks), 0o755); err != nil { //nolint:gosec // what is published
		return nil, err
	}
	defer func() {
		if err != nil { // half a bundle is none
			err = errors.Join(err, os.RemoveAll(o.out))
		}
	}()
	b := &bundleWriter{dir: o.out, chunks: map[integrity.Digest]int{}}
	items, err := carry(p, b)
	if err != nil {
		return nil, err
	}
	m := codesign.Manifest{Scope: scope.String(), NotBefore: from, NotAfter: from.Add(o.life).Truncate(time.Second), Tightens: o.tightens}
	signed, err := signBundle(s, m, doc, p.Epoch, items, b)
	if err != nil {
		return nil, err
	}
	if err := host.WriteFile(filepath.Join(o.out, bundleManifest), signed.bundle, 0o644); err != nil {
		return nil, err
	}
	made = &madeBundle{Dir: o.out, Scope: m.Scope, Manifest: signed.digest, Epoch: p.Epoch, Policy: signed.policy, NotAfter: m.NotAfter}
	for i := range items {
		if items[i].Release != nil {
			made.Releases++
		}
	}
	if o.previous != "" {
		m.Undoes, m.Tightens = signed.digest, false
		if made.Rollback, err = o.rollback(s, m, p, b); err != nil {
			return nil, err
		}
	}
	for _, n := range b.chunks {
		made.Chunks++
		made.Bytes += int64(n)
	}
	return made, nil
}

// signer is who signs policies, with the log that proves it.
func (o *bundleOptions) signer(e *env) (*pki.Signer, func() error, error) {
	a, err := loadAuthority(e, o.keys, o.passphraseFile)
	if err != nil {
		return nil, nil, err
	}
	if o.identity == "" {
		o.identity = defaultIdentity(a, pki.PurposePolicy)
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: o.identity, Now: e.now()})
	if err != nil {
		return nil, nil, err
	}
	if tsa, err := openStamper(a, o.tsa); err != nil {
		return nil, nil, err
	} else if tsa != nil {
		s.Stamper = tsa
	}
	l, closeLog, err := openLog(a, o.log)
	if l != nil {
		s.Log = l
	}
	return s, closeLog, err
}

// items are the policy's releases and supplements, verified as hosts will.
func (o *bundleOptions) items(p *integrity.Policy, b *bundleWriter) ([]codesign.Item, error) {
	var out []codesign.Item
	for _, path := range o.releases {
		files, _ := filesOf(path, extRelease) // reading says what is wrong with the path
		for _, f := range files {
			if _, err := loadReleaseAs(f, func(record, catalogue []byte) (*codesign.Release, *codesign.Catalogue, error) {
				return codesign.VerifyTrusted(record, catalogue, p)
			}); err != nil {
				return nil, err
			}
			raw, err := readRelease(f)
			if err != nil {
				return nil, err
			}
			r := &codesign.ReleaseItem{}
			if r.Record, err = b.add(raw.Record); err != nil {
				return nil, err
			}
			if r.Catalogue, err = b.add(raw.Catalogue); err != nil {
				return nil, err
			}
			if len(raw.Names) > 0 {
				d, err := b.add(raw.Names)
				if err != nil {
					return nil, err
				}
				r.Names = &d
			}
			out = append(out, codesign.Item{Release: r})
		}
	}
	for _, f := range o.supplements {
		raw, err := readBounded(f, maxBundleFile)
		if err != nil {
			return nil, err
		}
		signed, err := codesign.VerifyPolicy(raw, codesign.Roots(p, codesign.SignsSupplement))
		if err != nil {
			return nil, fmt.Errorf("supplement %s: %w", f, err)
		}
		s, err := integrity.ParseNamed(f, signed.YAML)
		if err != nil {
			return nil, err
		}
		if _, err := integrity.Join(p, s); err != nil {
			return nil, fmt.Errorf("supplement %s: %w", f, err)
		}
		d, err := b.add(raw)
		if err != nil {
			return nil, err
		}
		out = append(out, codesign.Item{Supplement: &d})
	}
	return out, nil
}

type signedBundle struct {
	bundle         []byte
	digest, policy integrity.Digest
}

// signBundle signs a policy and a manifest of it.
func signBundle(s *pki.Signer, m codesign.Manifest, policy []byte, epoch uint64, items []codesign.Item, b *bundleWriter) (*signedBundle, error) {
	signed, err := codesign.SignPolicy(s, policy)
	if err != nil {
		return nil, err
	}
	m.Epoch = epoch
	if m.Policy, err = b.add(signed); err != nil {
		return nil, err
	}
	parts, err := codesign.WriteIndex(items)
	if err != nil {
		return nil, err
	}
	m.Index = nil
	for _, part := range parts {
		d, err := b.add(part)
		if err != nil {
			return nil, err
		}
		m.Index = append(m.Index, d)
	}
	out, err := codesign.SignManifest(s, m)
	if err != nil {
		return nil, err
	}
	return &signedBundle{bundle: out, digest: sha256.Sum256(out), policy: m.Policy}, nil
}

// epochLine is where a policy says its epoch: at the top level, once.
var epochLine = regexp.MustCompile(`(?m)^epoch:[ \t]*[0-9]+`)

// bundleDir is the directory of a bundle that was made before.
type bundleDir struct {
	dir      string
	manifest *codesign.Manifest // not verified: what is taken from it is
}

func openBundle(dir string) (*bundleDir, error) {
	raw, err := readBounded(filepath.Join(dir, bundleManifest), codesign.MaxManifest)
	if err != nil {
		return nil, err
	}
	m, err := codesign.UnverifiedManifest(raw)
	return &bundleDir{dir, m}, err
}

func (d *bundleDir) chunk(sum integrity.Digest, limit int64) ([]byte, error) {
	data, err := readBounded(filepath.Join(d.dir, bundleChunks, sum.String()), limit)
	if err == nil && integrity.Digest(sha256.Sum256(data)) != sum {
		err = fmt.Errorf("chunk %v holds something else: %w", sum, errs.Untrusted)
	}
	return data, err
}

// policy is the policy's text, signed by whom p trusts; p nil: by whom it trusts
// itself. What we sign again must be what we signed.
func (d *bundleDir) policy(p *integrity.Policy) ([]byte, error) {
	signed, err := d.chunk(d.manifest.Policy, maxBundleFile)
	if err != nil {
		return nil, err
	}
	if p == nil {
		claimed, err := unverifiedYAML(signed)
		if err == nil {
			p, err = integrity.ParseNamed(filepath.Join(d.dir, "policy.yaml"), claimed)
		}
		if err != nil {
			return nil, err
		}
	}
	was, err := codesign.VerifyPolicy(signed, codesign.Roots(p, codesign.SignsPolicy))
	if err != nil {
		return nil, err
	}
	return was.YAML, nil
}

// unverifiedYAML is what a signed policy says, whoever signed it.
func unverifiedYAML(signed []byte) ([]byte, error) {
	_, text, err := pki.UnverifiedPayload(signed, maxPolicyFile)
	return text, err
}

// items are its releases and supplements, copied to b.
func (d *bundleDir) items(b *bundleWriter) ([]codesign.Item, error) {
	var items []codesign.Item
	for _, sum := range d.manifest.Index {
		part, err := d.chunk(sum, codesign.MaxIndexPart)
		if err != nil {
			return nil, err
		}
		list, err := codesign.ReadIndex(part)
		if err != nil {
			return nil, err
		}
		items = append(items, list...)
	}
	for i := range items {
		for _, sum := range hosts.Content(&items[i]) {
			data, err := d.chunk(sum, maxCatalogueFile)
			if err != nil {
				return nil, err
			}
			if _, err := b.add(data); err != nil {
				return nil, err
			}
		}
	}
	return items, nil
}

// withEpoch is a policy's text with another epoch.
func withEpoch(policy []byte, epoch uint64) ([]byte, error) {
	if n := len(epochLine.FindAllIndex(policy, -1)); n != 1 {
		return nil, fmt.Errorf("the policy has %d lines that begin with epoch: %w", n, errs.Invalid)
	}
	again := epochLine.ReplaceAll(policy, []byte("epoch: "+strconv.FormatUint(epoch, 10)))
	p, err := integrity.ParseNamed("policy.yaml", again)
	if err == nil && p.Epoch != epoch {
		err = fmt.Errorf("the policy's epoch cannot be raised: %w", errs.Invalid)
	}
	return again, err
}

// rollback signs the content of the bundle before under the epoch after the new
// one.
func (o *bundleOptions) rollback(s *pki.Signer, m codesign.Manifest, p *integrity.Policy, b *bundleWriter) (*madeRollback, error) {
	fail := func(err error) (*madeRollback, error) {
		return nil, fmt.Errorf("previous bundle %s: %w", o.previous, err)
	}
	before, err := openBundle(o.previous)
	if err != nil {
		return fail(err)
	}
	if p.Epoch < before.manifest.Epoch+2 {
		return fail(hint(fmt.Errorf("it has epoch %d and the new policy %d: %w", before.manifest.Epoch, p.Epoch, errs.Conflict),
			"say epoch: %d; the one between is for going back", before.manifest.Epoch+2))
	}
	was, err := before.policy(p)
	if err != nil {
		return fail(err)
	}
	epoch := p.Epoch + 1
	again, err := withEpoch(was, epoch)
	if err != nil {
		return fail(err)
	}
	items, err := before.items(b)
	if err != nil {
		return fail(err)
	}
	out, err := signBundle(s, m, again, epoch, items, b)
	if err != nil {
		return fail(err)
	}
	if err := host.WriteFile(filepath.Join(o.out, bundleRollback), out.bundle, 0o644); err != nil {
		return fail(err)
	}
	return &madeRollback{Manifest: out.digest, Epoch: epoch, Of: before.manifest.Digest}, nil
}

func newBundlePushCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "push DIR",
		Short: "Bring a bundle to the server",
		Long: `Sends what the server does not have yet, and then the manifests. Hosts get nothing by
that: a rollout gives it to them. A second push sends nothing.

JSON: {"pushed", "bytes", "manifests": [ids]}`,
		Example: "  ringwall fleet bundle push b12",
		Args:    exactly("DIR"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			p := &pusher{e: e, client: client, dir: args[0], Manifests: []resource.ID{}}
			if err := p.push(c.Context()); err != nil {
				return err
			}
			return e.emit(p, func(w io.Writer) {
				fmt.Fprintf(w, "%d chunks, %d bytes\n", p.Pushed, p.Bytes)
				for _, id := range p.Manifests {
					fmt.Fprintln(w, id)
				}
			})
		},
	}
}

// pusher brings a directory to a server.
type pusher struct {
	e      *env
	client *api.Client
	dir    string

	Pushed    int           `json:"pushed"`
	Bytes     int64         `json:"bytes"`
	Manifests []resource.ID `json:"manifests"`
}

func (p *pusher) push(ctx context.Context) error {
	var bundles [][]byte
	var manifests []*codesign.Manifest
	for _, name := range []string{bundleManifest, bundleRollback} {
		b, err := readBounded(filepath.Join(p.dir, name), codesign.MaxManifest)
		if errors.Is(err, os.ErrNotExist) && name == bundleRollback {
			continue
		}
		if err != nil {
			return err
		}
		m, err := codesign.UnverifiedManifest(b)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		bundles, manifests = append(bundles, b), append(manifests, m)
	}
	scope, err := resource.ParseID(manifests[0].Scope)
	if err != nil {
		return err
	}
	files, err := os.ReadDir(filepath.Join(p.dir, bundleChunks))
	if err != nil {
		return err
	}
	all := map[integrity.Digest]bool{}
	for _, f := range files {
		d, err := integrity.ParseDigest(f.Name())
		if err != nil {
			return fmt.Errorf("%s in %s: %w", f.Name(), bundleChunks, err)
		}
		all[d] = true
	}
	if err := p.chunks(ctx, scope, slices.Collect(maps.Keys(all))); err != nil {
		return err
	}
	for i, m := range manifests {
		id, err := hosts.ManifestID(m)
		if err != nil {
			return err
		}
		body, err := json.Marshal(map[string]any{"properties": map[string]any{"bundle": bundles[i]}})
		if err != nil {
			return err
		}
		if _, _, err := p.client.Do(ctx, api.Request{Method: http.MethodPut, Path: (&url.URL{Path: id.String()}).EscapedPath(), Body: body}); err != nil {
			return err
		}
		p.Manifests = append(p.Manifests, id)
	}
	return nil
}

// askAtOnce is how many chunks the server is asked about at once.
const askAtOnce = 10_000

func (p *pusher) chunks(ctx context.Context, scope resource.ID, all []integrity.Digest) error {
	for part := range slices.Chunk(all, askAtOnce) {
		body, err := json.Marshal(hosts.Question{Scope: scope, Chunks: part})
		if err != nil {
			return err
		}
		var missing hosts.Question
		if err := ask(ctx, p.client, api.Request{Method: http.MethodPost, Path: "/ringwall/fleet/chunks", Body: body}, &missing); err != nil {
			return err
		}
		for _, d := range missing.Chunks {
			data, err := readBounded(filepath.Join(p.dir, bundleChunks, d.String()), hosts.MaxChunk)
			if err != nil {
				return err
			}
			path := "/ringwall/fleet/chunks/" + d.String() + "?" + url.Values{"scope": {scope.String()}}.Encode()
			if _, _, err := p.client.Do(ctx, api.Request{Method: http.MethodPut, Path: path, Body: data}); err != nil {
				return err
			}
			p.Pushed++
			p.Bytes += int64(len(data))
			if p.Pushed%100 == 0 {
				p.e.notef("%d chunks …", p.Pushed)
			}
		}
	}
	return nil
}

// bundleView is a manifest on the server as people see it.
type bundleView struct {
	ID       resource.ID `json:"id"`
	Manifest string      `json:"manifest"`
	Scope    string      `json:"scope"`
	hosts.ManifestProperties
	Bundle *struct{}      `json:"bundle,omitempty"` // not shown
	Hosts  map[string]int `json:"hosts,omitempty"`  // phase → count, of those that it is meant for
	Meant  int            `json:"meant_for"`
}

func viewBundle(d *resourceDoc) (*bundleView, error) {
	v := &bundleView{ID: d.ID, Manifest: d.ID.Name(), Scope: d.ID.Parent().String()}
	return v, d.read(&v.ManifestProperties)
}

func newBundleListCommand(e *env) *cobra.Command {
	var scope string
	c := &cobra.Command{
		Use:     "list",
		Short:   "List the manifests that the server has",
		Long:    "Lists manifests, the highest epoch first.\n\nJSON: {\"bundles\": [{\"id\", \"manifest\", \"scope\", \"epoch\", \"notBefore\", \"notAfter\",\n\"policy\", \"undoes\", \"tightens\"}]}",
		Example: "  ringwall fleet bundle list",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			out := struct {
				Bundles []*bundleView `json:"bundles"`
			}{[]*bundleView{}}
			err = listBelow(c.Context(), client, scope, fleet.TypeManifest, func(d *resourceDoc) error {
				v, err := viewBundle(d)
				out.Bundles = append(out.Bundles, v)
				return err
			})
			if err != nil {
				return err
			}
			slices.SortFunc(out.Bundles, func(a, b *bundleView) int { return int(b.Epoch) - int(a.Epoch) }) //nolint:gosec // for showing
			return e.emit(out, func(w io.Writer) {
				t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
				fmt.Fprintln(t, "MANIFEST\tEPOCH\tSCOPE\tUNTIL\tUNDOES")
				for _, b := range out.Bundles {
					undoes := "-"
					if b.Undoes != nil {
						undoes = b.Undoes.String()[:16]
					}
					fmt.Fprintf(t, "%.16s\t%d\t%s\t%s\t%s\n", b.Manifest, b.Epoch, shown(b.Scope), b.NotAfter.Format("2006-01-02"), undoes)
				}
				_ = t.Flush() // to the writer that emit checks
			})
		},
	}
	c.Flags().StringVar(&scope, "scope", "/", "list manifests below this `ID`")
	return c
}

func newBundleShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "show MANIFEST",
		Short:   "Show a manifest, and which hosts have it",
		Long:    "Shows a manifest, named by the beginning of its SHA-256 (8 digits at least). What it\nsays was not verified by the server; hosts do that.\n\nJSON: as of bundle list, and \"meant_for\", \"hosts\": {PHASE: COUNT}",
		Example: "  ringwall fleet bundle show 5bb9c2f4",
		Args:    exactly("MANIFEST"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			var found []*bundleView
			err = listBelow(c.Context(), client, "/", fleet.TypeManifest, func(d *resourceDoc) error {
				if len(args[0]) < 8 || !strings.HasPrefix(d.ID.Name(), args[0]) {
					return nil
				}
				v, err := viewBundle(d)
				found = append(found, v)
				return err
			})
			switch {
			case err != nil:
				return err
			case len(found) != 1:
				return fmt.Errorf("%d manifests begin with %s: %w", len(found), args[0], errs.NotFound)
			}
			v := found[0]
			l, err := fetchHosts(c.Context(), client, v.Scope, "")
			if err != nil {
				return err
			}
			v.Hosts = map[string]int{}
			for i := range l.Hosts {
				h := &l.Hosts[i]
				if h.Assigned != v.Manifest {
					continue
				}
				v.Meant++
				state := "not yet"
				if h.Report.Manifest.String() == v.Manifest || h.Report.Failed.String() == v.Manifest {
					state = string(h.Report.Phase)
				}
				v.Hosts[state]++
			}
			return e.emit(v, func(w io.Writer) {
				fmt.Fprintf(w, "manifest   %s\nscope      %s\nepoch      %d\npolicy     %v\nusable     %s to %s\n", v.Manifest, shown(v.Scope), v.Epoch, v.Policy, v.NotBefore.Format(time.RFC3339), v.NotAfter.Format(time.RFC3339))
				if v.Undoes != nil {
					fmt.Fprintf(w, "undoes     %v\n", v.Undoes)
				}
				fmt.Fprintf(w, "meant for  %d hosts\n", v.Meant)
				for _, k := range slices.Sorted(maps.Keys(v.Hosts)) {
					fmt.Fprintf(w, "  %-12s %d\n", k, v.Hosts[k])
				}
			})
		},
	}
}
