package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"ringwall/internal/api"
	"ringwall/internal/codesign"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/test/fleet/sim"
)

const (
	subscription = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group        = subscription + "/resourceGroups/web"
)

// operator signs what hosts should have, away from the server.
type operator struct {
	s      *sim.Server
	trust  string // YAML of whom the policies believe
	signer *pki.Signer
	epoch  uint64
	// hashes is how many contents a policy lists: what makes it large.
	hashes int
}

func newOperator(ctx context.Context, s *sim.Server, hashes int) (*operator, error) {
	keys := filepath.Join(s.Dir, "keys")
	if _, err := s.Ringwall(ctx, "", "-q", "key", "init", keys, "--name", "Simulated Fleet"); err != nil {
		return nil, err
	}
	trust, err := s.Ringwall(ctx, "", "key", "trust", keys)
	if err != nil {
		return nil, err
	}
	a, err := pki.LoadAuthority(keys, nil, time.Now)
	if err != nil {
		return nil, err
	}
	o := &operator{s: s, trust: trust, hashes: hashes}
	o.signer, err = a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: "https://fleet.example/operator", Now: time.Now()})
	return o, err
}

// policy is a policy of the next epoch that differs from others by one content.
func (o *operator) policy(what string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "version: 1\nname: simulated\nepoch: %d\nbaseline: 1\nmode: enforce\n%sallow:\n", o.epoch, o.trust)
	for i := range o.hashes {
		name := fmt.Sprintf("common-%d", i)
		if i == 0 {
			name = what
		}
		fmt.Fprintf(&b, "  - {rule: rule-%d, sha256: [%x]}\n", i, sha256.Sum256([]byte(name)))
	}
	return []byte(b.String())
}

// signed is a manifest and what it names.
type signed struct {
	digest   integrity.Digest
	manifest []byte
	chunks   [][]byte
	epoch    uint64
}

// sign makes the next manifest; undoes: the one that it takes back.
func (o *operator) sign(what string, undoes *signed) (*signed, error) {
	o.epoch++
	policy, err := codesign.SignPolicy(o.signer, o.policy(what))
	if err != nil {
		return nil, err
	}
	m := codesign.Manifest{
		Scope: group, Epoch: o.epoch, NotBefore: time.Now().Add(-time.Minute).UTC().Truncate(time.Second),
		NotAfter: time.Now().Add(24 * time.Hour).UTC().Truncate(time.Second), Policy: sha256.Sum256(policy),
	}
	if undoes != nil {
		m.Undoes = undoes.digest
	}
	out := &signed{chunks: [][]byte{policy}, epoch: o.epoch}
	if out.manifest, err = codesign.SignManifest(o.signer, m); err != nil {
		return nil, err
	}
	out.digest = sha256.Sum256(out.manifest)
	return out, nil
}

// push uploads it.
func (o *operator) push(ctx context.Context, b *signed) error {
	for _, c := range b.chunks {
		_, _, err := o.s.Client.Do(ctx, api.Request{Method: http.MethodPut, Path: fmt.Sprintf("/ringwall/fleet/chunks/%x?scope=%s", sha256.Sum256(c), group), Body: c})
		if err != nil {
			return err
		}
	}
	return o.s.Put(ctx, group+"/providers/"+fleet.TypeManifest+"/"+b.digest.String(), map[string]any{"bundle": b.manifest})
}

// change is a signed change and the way back from it.
func (o *operator) change(ctx context.Context, what string) (next, back *signed, err error) {
	if next, err = o.sign(what, nil); err != nil {
		return nil, nil, err
	}
	if back, err = o.sign("before", next); err != nil {
		return nil, nil, err
	}
	if err = o.push(ctx, next); err == nil {
		err = o.push(ctx, back)
	}
	return next, back, err
}
