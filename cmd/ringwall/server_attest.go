package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/attest"
	"ringwall/internal/codesign"
	"ringwall/internal/control"
	"ringwall/internal/control/attestation"
	"ringwall/internal/control/hosts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/httpapi"
	"ringwall/internal/incident"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

// attestOptions are the flags of a server that attests hosts.
type attestOptions struct {
	keys, passphrase, fleet, catalogues string
}

func (o *attestOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.keys, "attest-keys", "", "attest hosts, and sign what they proved: an authority's `DIR` with the keys appraisal-ca and tsa (default: hosts are not attested)")
	f.StringVar(&o.passphrase, "attest-passphrase-file", "", "read the passphrase of those keys from the first line of `FILE` (env:NAME, credential:NAME)")
	f.StringVar(&o.fleet, "attest-domain", "fleet.internal", "`DOMAIN` in the certificates of attested hosts: spiffe://DOMAIN/host/ID")
	f.StringVar(&o.catalogues, "attest-catalogues", "", "`DIR` of *.cat files that hosts' measurements are looked up in, beside the releases of their bundles; read again when it changes")
}

// keepArchives is how long the evidence of accepted rounds is kept. What was
// refused stays.
const keepArchives = 90 * 24 * time.Hour

// withOrders adds what people may do about attestation to the documents of hosts.
func withOrders(kinds []control.Kind) []control.Kind {
	for i := range kinds {
		if kinds[i].Type == fleet.TypeHost {
			all := maps.Clone(kinds[i].Actions)
			maps.Copy(all, attestation.Actions(attestedHost, time.Now))
			kinds[i].Actions = all
		}
	}
	return append(kinds, attestation.Kinds()...)
}

// attestedHost is the name that a host attests under: its id.
func attestedHost(d *resource.Document) (string, error) {
	var h hosts.HostProperties
	if err := json.Unmarshal(d.Properties, &h); err != nil || h.ID == "" {
		return "", fmt.Errorf("%s is no host: %w", d.ID, errors.Join(err, errs.Invalid))
	}
	return h.ID, nil
}

// addAttestation adds the service that hosts prove themselves to, before
// addHosts and after addIncidents.
func (p *serverParts) addAttestation(o *attestOptions, e *env, clients *pki.TLSAuthority) error {
	if o.keys == "" {
		return nil
	}
	a, err := loadAuthority(e, o.keys, o.passphrase)
	if err != nil {
		return err
	}
	signer := &appraisalSigner{authority: a, identity: "spiffe://" + o.fleet + "/attestation", now: e.now}
	if _, err := signer.get(); err != nil {
		return hint(err, "ringwall key add makes the CA that an older authority lacks")
	}
	tree := &attestation.Tree{Store: managed{p.store}, Ring: p.ringOf}
	known := &bundleCatalogues{p: p, roots: a.Roots(pki.PurposeBuild), releases: map[integrity.Digest][]*codesign.Catalogue{}, unions: map[string]*catalogues{}}
	if o.catalogues != "" {
		known.dir = &catalogueDir{dir: o.catalogues}
	}
	tree.Catalogues = known.get
	p.attestation, err = attestation.New(attestation.Config{
		Store: managed{p.store}, Door: p.door, Policies: tree, Results: signer, Hosts: clients, Fleet: o.fleet, Now: e.now,
		Hooks: attestation.Hooks{Quarantined: p.quarantined},
	})
	if err != nil {
		return err
	}
	p.attester = attestation.Wire{Service: p.attestation}
	p.lead("attestation", func(ctx context.Context, _ control.Fence) error {
		tick := time.NewTicker(time.Minute)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
			}
			if n, err := p.attestation.Sweep(ctx); err != nil || n > 0 {
				p.log.WarnContext(ctx, "silent_hosts", slog.Int("quarantined", n), slog.Any("error", err))
			}
			err := p.store.Write(ctx, func(tx *store.Tx) error { return tx.PruneAttestationArchives(ctx, e.now().Add(-keepArchives)) })
			if err != nil {
				p.log.WarnContext(ctx, "archives_not_pruned", slog.Any("error", err))
			}
		}
	})
	p.routes = append(p.routes, httpapi.Route{
		Method: http.MethodGet, Path: attestationPath, Serve: p.serveAttestation, Summary: "What hosts proved of themselves", Answer: attestationList{},
		Query: []httpapi.Query{{Name: "standing", About: "pending, trusted or quarantined"}, {Name: "after", About: "id of the host that the page before ended with"}},
	})
	p.routes = append(p.routes, httpapi.Route{
		Method: http.MethodGet, Path: attestationPath + "/archive", Serve: p.serveArchive, Slow: 10 * time.Minute,
		Summary: "Evidence of a host with its signed result, for ringwall attest verify-archive",
		Query:   []httpapi.Query{{Name: "host", About: "id of the host"}, {Name: "until", About: "the newest that is not later, RFC 3339 (default: now)"}},
	})
	return nil
}

// serveArchive gives the evidence of one round, packed with gzip, to whoever may
// read the host.
func (p *serverParts) serveArchive(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	ctx, q := r.Context(), r.URL.Query()
	until := time.Now()
	if text := q.Get("until"); text != "" {
		var err error
		if until, err = time.Parse(time.RFC3339, text); err != nil {
			return fmt.Errorf("until: %w: %w", err, errs.Invalid)
		}
	}
	var d *resource.Document
	if err := p.store.Read(ctx, func(tx *store.Tx) (err error) { d, err = documentOf(ctx, tx, q.Get("host")); return err }); err != nil {
		return err
	}
	if _, err := p.door.Get(ctx, by, d.ID); err != nil {
		return err
	}
	var blob []byte
	err := p.store.Read(ctx, func(tx *store.Tx) (err error) {
		blob, _, err = tx.AttestationArchive(ctx, q.Get("host"), until)
		return err
	})
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/gzip")
	_, _ = w.Write(blob) // the client may be gone
	return nil
}

// ringOf is a host's label "ring".
func (p *serverParts) ringOf(ctx context.Context, host string) (string, error) {
	var ring string
	err := p.store.Read(ctx, func(tx *store.Tx) error {
		d, err := documentOf(ctx, tx, host)
		if err != nil {
			return err
		}
		var h hosts.HostProperties
		if err := json.Unmarshal(d.Properties, &h); err != nil {
			return fmt.Errorf("%s: %w: %w", d.ID, err, errs.Invalid)
		}
		if !h.Revoked.IsZero() {
			return fmt.Errorf("host %s is revoked: %w", host, errs.Denied)
		}
		ring = h.Labels["ring"]
		return nil
	})
	return ring, err
}

func documentOf(ctx context.Context, tx *store.Tx, host string) (*resource.Document, error) {
	g, err := tx.Grant(ctx, host)
	if err != nil {
		return nil, err
	}
	return tx.Get(ctx, g.Resource)
}

// quarantined opens an incident. The host's record says the same, so that it is
// found although this were lost.
func (p *serverParts) quarantined(i attestation.Incident) {
	p.log.Warn("host_quarantined", slog.String("host", i.Host), slog.Any("reasons", i.Reasons), slog.String("detail", i.Detail))
	if p.incidents == nil {
		return
	}
	go func() {
		ctx, stop := context.WithTimeout(context.Background(), time.Minute)
		defer stop()
		p.hosts.Signal(ctx, fleet.Signal{Host: i.Host, Name: "attestation", Text: i.Detail, At: i.At})
		scope := ""
		err := p.store.Read(ctx, func(tx *store.Tx) error {
			d, err := documentOf(ctx, tx, i.Host)
			if err == nil {
				scope = d.ID.Parent().String()
			}
			return err
		})
		reason := "attestation"
		if len(i.Reasons) > 0 {
			reason = "attestation: " + string(i.Reasons[0])
		}
		e := incident.Event{
			ID: fmt.Sprintf("attestation/%s/%d", i.Host, i.At.UnixMicro()), Scope: scope, Host: i.Host, Name: p.hosts.Name(i.Host), Kind: "attestation", Path: "host " + p.hosts.Name(i.Host),
			Reason: reason, Mode: string(attest.ModeEnforce), Count: 1, At: i.At,
		}
		if err = errors.Join(err, p.incidents.Blocks(ctx, []incident.Event{e})); err != nil {
			p.log.ErrorContext(ctx, "incident_not_opened", slog.String("host", i.Host), slog.Any("error", err))
		}
	}()
}

const attestationPath = "/ringwall/fleet/attestation"

type attestationList struct {
	Hosts []attestation.Status `json:"hosts"`
	Next  string               `json:"next,omitempty"`
}

// serveAttestation lists the hosts that the actor may read.
func (p *serverParts) serveAttestation(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	const page = 500
	ctx, q := r.Context(), r.URL.Query()
	all, err := p.attestation.List(ctx, attest.Standing(q.Get("standing")), q.Get("after"), page)
	if err != nil {
		return err
	}
	out := attestationList{Hosts: []attestation.Status{}}
	if len(all) == page {
		out.Next = all[page-1].Host
	}
	for i := range all {
		var d *resource.Document
		err := p.store.Read(ctx, func(tx *store.Tx) (err error) { d, err = documentOf(ctx, tx, all[i].Host); return err })
		if err != nil {
			continue // a host that is gone
		}
		if _, err := p.door.Get(ctx, by, d.ID); err == nil {
			out.Hosts = append(out.Hosts, all[i])
		}
	}
	b, err := json.Marshal(out)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_, _ = w.Write(append(b, '\n')) // the client may be gone
	return nil
}

// appraisalSigner signs results with leaves that it makes itself and changes in
// time.
type appraisalSigner struct {
	authority *pki.Authority
	identity  string
	now       func() time.Time

	mu      sync.Mutex
	current *pki.Signer
}

// changeLeaf is how long before its end a leaf is replaced.
const changeLeaf = 24 * time.Hour

func (s *appraisalSigner) get() (*pki.Signer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.current != nil && now.Add(changeLeaf).Before(s.current.Leaf.NotAfter) {
		return s.current, nil
	}
	next, err := s.authority.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAppraisal, Identity: s.identity, Now: now})
	if err != nil {
		return nil, err
	}
	s.current = next
	return next, nil
}

// Sign implements attest.Signer.
func (s *appraisalSigner) Sign(payloadType string, payload []byte) ([]byte, error) {
	signer, err := s.get()
	if err != nil {
		return nil, err
	}
	return signer.Sign(payloadType, payload)
}

// catalogueDir reads the catalogues of a directory, again when names, sizes or
// times of its files differ.
type catalogueDir struct {
	dir string

	mu    sync.Mutex
	state []string
	all   *catalogues
}

func (c *catalogueDir) get() (*catalogues, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	paths, err := filepath.Glob(filepath.Join(c.dir, "*"+extCatalogue))
	if err != nil {
		return nil, err
	}
	var state []string
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		state = append(state, fmt.Sprintf("%s %d %d", p, st.Size(), st.ModTime().UnixNano()))
	}
	if c.all != nil && slices.Equal(state, c.state) {
		return c.all, nil
	}
	all, err := openCatalogues(paths)
	if err != nil {
		return nil, err
	}
	c.all, c.state = all, state
	return all, nil
}
