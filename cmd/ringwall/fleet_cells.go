package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"ringwall/internal/api"
	"ringwall/internal/codesign"
	"ringwall/internal/control/hosts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

func newFleetCellsCommand(e *env) *cobra.Command {
	var scope, out, label string
	c := &cobra.Command{
		Use:   "cells --out DIR",
		Short: "Write what hosts run by now, for csv verify",
		Long: `Asks the server what is in force on hosts, fetches those policies, releases and
supplements, checks that they are what the manifest names and that the policy is
signed by whom it trusts, and writes a directory with cells.yaml: what ringwall csv
verify --cells asks before a build ships. A cell is hosts with the same manifest,
agent and ring; the ring is a host's label of that name, or --ring-label.

Hosts that have no manifest are not in it, and are named: what they run by came to
them in another way. Packages that hosts trust are theirs to know.

JSON: {"file", "cells": [{"ring", "hosts", "manifest", "policy", "agent"}], "without": [names]}`,
		Example: `  ringwall fleet cells --scope /subscriptions/ID/resourceGroups/web --out live
  ringwall csv verify edged_4.7.0_amd64.deb --release edged.release.json --cells live/cells.yaml`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			if exists(out) {
				return fmt.Errorf("%s is there already: %w", out, errs.Conflict)
			}
			w := &cellWriter{e: e, client: client, scope: scope, dir: out, label: label, Cells: []*liveCell{}, Without: []string{}}
			if err := w.write(c.Context()); err != nil {
				return err
			}
			return e.emit(w, func(to io.Writer) {
				for _, x := range w.Cells {
					fmt.Fprintf(to, "%-12s %6d hosts  %s\n", shown(x.Ring), x.Hosts, shown(x.Policy))
				}
				if n := len(w.Without); n > 0 {
					fmt.Fprintf(to, "%d hosts have no manifest and are not in it: %s%s\n", n, strings.Join(w.Without[:min(n, 5)], ", "), more(n-5))
				}
				fmt.Fprintf(to, "ask it: ringwall csv verify BUILD --cells %s\n", shown(w.File))
			})
		},
	}
	f := c.Flags()
	f.StringVar(&scope, "scope", "/", "hosts below this `ID`")
	f.StringVar(&out, "out", "", "write to this new `DIR`")
	f.StringVar(&label, "ring-label", "ring", "the `LABEL` that says which ring a host is in")
	require(c, "out")
	return c
}

// liveCell is hosts that decide alike.
type liveCell struct {
	Ring     string           `json:"ring"`
	Hosts    int              `json:"hosts"`
	Manifest integrity.Digest `json:"manifest"`
	Policy   string           `json:"policy"` // file
	Agent    string           `json:"agent,omitempty"`

	supplements []string
	releases    bool
}

type cellWriter struct {
	e      *env
	client *api.Client
	scope  string
	dir    string
	label  string

	File    string      `json:"file"`
	Cells   []*liveCell `json:"cells"`
	Without []string    `json:"without"`
}

func (w *cellWriter) write(ctx context.Context) error {
	list, err := fetchHosts(ctx, w.client, w.scope, "")
	if err != nil {
		return err
	}
	w.group(list.Hosts)
	if len(w.Cells) == 0 {
		return fmt.Errorf("no host below %s has a manifest: %w", shown(w.scope), errs.NotFound)
	}
	if err := os.MkdirAll(w.dir, 0o755); err != nil { //nolint:gosec // signed and public
		return err
	}
	done := map[integrity.Digest]*liveCell{}
	for _, c := range w.Cells {
		if same, ok := done[c.Manifest]; ok {
			c.Policy, c.supplements, c.releases = same.Policy, same.supplements, same.releases
			continue
		}
		if err := w.fetch(ctx, c); err != nil {
			return fmt.Errorf("manifest %v: %w", c.Manifest, err)
		}
		done[c.Manifest] = c
	}
	return w.list()
}

// group puts hosts into cells, those with most hosts last, as rings are.
func (w *cellWriter) group(all []hosts.View) {
	type key struct {
		ring, agent string
		manifest    integrity.Digest
	}
	cells := map[key]*liveCell{}
	for i := range all {
		h := &all[i]
		if h.Revoked {
			continue
		}
		if h.Report.Manifest.IsZero() {
			w.Without = append(w.Without, h.Name)
			continue
		}
		k := key{cmp.Or(h.Labels[w.label], "all"), h.Report.Agent, h.Report.Manifest}
		if cells[k] == nil {
			cells[k] = &liveCell{Ring: k.ring, Manifest: k.manifest, Agent: k.agent}
			w.Cells = append(w.Cells, cells[k])
		}
		cells[k].Hosts++
	}
	slices.SortFunc(w.Cells, func(a, b *liveCell) int {
		return cmp.Or(cmp.Compare(a.Hosts, b.Hosts), strings.Compare(a.Ring, b.Ring), strings.Compare(a.Manifest.String(), b.Manifest.String()))
	})
	slices.Sort(w.Without)
}

// manifest finds a signed manifest and the scope that it is below.
func (w *cellWriter) manifest(ctx context.Context, digest integrity.Digest) (m *codesign.Manifest, scope string, err error) {
	var bundle []byte
	err = listBelow(ctx, w.client, "/", fleet.TypeManifest, func(d *resourceDoc) error {
		if d.ID.Name() != digest.String() {
			return nil
		}
		var p hosts.ManifestProperties
		err := d.read(&p)
		bundle, scope = p.Bundle, d.ID.Parent().String()
		return err
	})
	if err == nil && bundle == nil {
		err = fmt.Errorf("the server does not have it any more: %w", errs.NotFound)
	}
	if err != nil {
		return nil, "", err
	}
	m, err = codesign.UnverifiedManifest(bundle)
	return m, scope, err
}

// content fetches a chunk.
type content func(d integrity.Digest) ([]byte, error)

// fetch gets what a manifest brings, as files that csv verify reads.
func (w *cellWriter) fetch(ctx context.Context, c *liveCell) error {
	m, scope, err := w.manifest(ctx, c.Manifest)
	if err != nil {
		return err
	}
	stem := c.Manifest.String()[:12]
	tmp := &bundleDir{dir: filepath.Join(w.dir, stem), manifest: m}
	if err := os.MkdirAll(filepath.Join(tmp.dir, bundleChunks), 0o755); err != nil { //nolint:gosec // signed and public
		return err
	}
	into := &bundleWriter{dir: tmp.dir, chunks: map[integrity.Digest]int{}}
	get := func(d integrity.Digest) ([]byte, error) {
		b, _, err := w.client.Do(ctx, api.Request{Method: http.MethodGet, Path: "/ringwall/fleet/chunks/" + d.String() + "?" + url.Values{"scope": {scope}}.Encode()})
		if err != nil {
			return nil, err
		}
		if got, err := into.add(b); err != nil || got != d {
			return nil, errors.Join(err, fmt.Errorf("chunk %v: the server sends something else: %w", d, errs.Untrusted))
		}
		return b, nil
	}
	if _, err := get(m.Policy); err != nil {
		return err
	}
	text, err := tmp.policy(nil)
	if err != nil {
		return err
	}
	c.Policy = stem + ".yaml"
	if err := host.WriteFile(filepath.Join(w.dir, c.Policy), text, 0o644); err != nil {
		return err
	}
	if err := w.items(c, m, stem, get); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(tmp.dir, bundleChunks))
}

func (w *cellWriter) items(c *liveCell, m *codesign.Manifest, dir string, get content) error {
	for _, d := range m.Index {
		part, err := get(d)
		if err != nil {
			return err
		}
		items, err := codesign.ReadIndex(part)
		if err != nil {
			return err
		}
		for i := range items {
			if err := w.item(c, &items[i], dir, get); err != nil {
				return err
			}
		}
	}
	return nil
}

// item writes a release or a supplement.
func (w *cellWriter) item(c *liveCell, it *codesign.Item, dir string, get content) error {
	save := func(d integrity.Digest, name string) error {
		b, err := get(d)
		if err != nil {
			return err
		}
		return host.WriteFile(filepath.Join(w.dir, name), b, 0o644)
	}
	if it.Supplement != nil {
		signed, err := get(*it.Supplement)
		if err != nil {
			return err
		}
		text, err := unverifiedYAML(signed)
		if err != nil {
			return err
		}
		name := filepath.Join(dir, it.Supplement.String()[:12]+".yaml")
		c.supplements = append(c.supplements, name)
		return host.WriteFile(filepath.Join(w.dir, name), text, 0o644)
	}
	c.releases = true
	stem := filepath.Join(dir, it.Release.Record.String()[:12])
	err := errors.Join(save(it.Release.Record, stem+extRelease), save(it.Release.Catalogue, stem+extCatalogue))
	if it.Release.Names != nil {
		err = errors.Join(err, save(*it.Release.Names, stem+extNames))
	}
	return err
}

// list writes cells.yaml.
func (w *cellWriter) list() error {
	type cell struct {
		Ring        string   `yaml:"ring"`
		Hosts       int      `yaml:"hosts"`
		Policy      string   `yaml:"policy"`
		Supplements []string `yaml:"supplements,omitempty"`
		Releases    []string `yaml:"releases,omitempty"`
		Agent       string   `yaml:"agent,omitempty"`
	}
	doc := struct {
		Version int      `yaml:"version"`
		Taken   string   `yaml:"taken"`
		Rings   []string `yaml:"rings"`
		Cells   []cell   `yaml:"cells"`
	}{Version: 1, Taken: w.e.now().UTC().Format(time.RFC3339)}
	for _, c := range w.Cells {
		if !slices.Contains(doc.Rings, c.Ring) {
			doc.Rings = append(doc.Rings, c.Ring)
		}
		x := cell{Ring: c.Ring, Hosts: c.Hosts, Policy: c.Policy, Supplements: c.supplements, Agent: c.Agent}
		if c.releases {
			x.Releases = []string{strings.TrimSuffix(c.Policy, ".yaml")}
		}
		doc.Cells = append(doc.Cells, x)
	}
	b, err := yaml.Marshal(doc)
	if err != nil {
		return err
	}
	w.File = filepath.Join(w.dir, "cells.yaml")
	return host.WriteFile(w.File, b, 0o644)
}
