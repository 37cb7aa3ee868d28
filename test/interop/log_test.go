package interop

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"ringwall/internal/codesign"
	"ringwall/internal/pki"
)

const origin = "log.fleet.example"

// twoLeaves is a log with one entry before ours.
type twoLeaves struct {
	key    pki.LogKey
	signer crypto.Signer
	origin string // in the checkpoint
}

func (l *twoLeaves) Append(_ context.Context, b []byte) ([]byte, error) {
	body, err := pki.LogBody(b)
	if err != nil {
		return nil, err
	}
	first, ours := pki.LeafHash([]byte("first")), pki.LeafHash(body)
	note, err := pki.SignCheckpoint(pki.Checkpoint{
		Origin: l.origin, Size: 2, Root: sha256.Sum256(append(append([]byte{1}, first[:]...), ours[:]...)),
	}, l.signer)
	if err != nil {
		return nil, err
	}
	return pki.AttachProof(b, pki.LogProof{LogID: l.key.ID(), Index: 1, Hashes: [][32]byte{first}, Checkpoint: note})
}

// newLoggedWorld is a world whose authority has a log.
func newLoggedWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	dir := t.TempDir()
	o := pki.AuthorityOptions{Name: "Fleet", Now: func() time.Time { return w.at }}
	var err error
	if _, err = pki.CreateAuthority(dir, o); err != nil {
		t.Fatal(err)
	}
	if _, _, err = pki.SaveLog(dir, origin, o); err != nil {
		t.Fatal(err)
	}
	if w.Authority, err = pki.LoadAuthority(dir, nil, o.Now); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) signLogged(t *testing.T, l pki.Recorder) []byte {
	t.Helper()
	s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: w.at})
	if err != nil {
		t.Fatal(err)
	}
	s.Log = l
	b, err := codesign.SignRelease(s, codesign.ReleaseInfo{Product: "edged", Version: "1.0", Epoch: 1}, w.cat, nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// theirsLogged is sigstore-go, told to ask for a proof of the log.
func (w *world) theirsLogged(t *testing.T, b []byte) error {
	t.Helper()
	r, err := w.SigstoreRoot(pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := root.NewTrustedRootFromJSON(r)
	if err != nil {
		t.Fatal(err)
	}
	v, err := verify.NewVerifier(trust, verify.WithSignedTimestamps(1), verify.WithTransparencyLog(1))
	if err != nil {
		t.Fatal(err)
	}
	id, err := verify.NewShortCertificateIdentity("", ".*", identity, "")
	if err != nil {
		t.Fatal(err)
	}
	var parsed bundle.Bundle
	if err := parsed.UnmarshalJSON(b); err != nil {
		return err
	}
	sum := sha256.Sum256(w.cat)
	_, err = v.Verify(&parsed, verify.NewPolicy(verify.WithArtifactDigest("sha256", sum[:]), verify.WithCertificateIdentity(id)))
	return err
}

// sigstore-go verifies a proof of our log with our key, and refuses what we
// refuse.
func TestLog_whoRefusesWhat(t *testing.T) {
	w := newLoggedWorld(t)
	good := &twoLeaves{w.Log.LogKey, w.LogKey, origin}
	stranger, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	edit := func(b []byte, edit func(m, entry map[string]any)) []byte {
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		edit(m, m["verificationMaterial"].(map[string]any)["tlogEntries"].([]any)[0].(map[string]any))
		out, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	b := w.signLogged(t, good)
	var other map[string]any
	edit(w.signLogged(t, good), func(_, e map[string]any) { other = e })
	proof := func(e map[string]any) map[string]any { return e["inclusionProof"].(map[string]any) }
	const accept, refuse = true, false
	var table strings.Builder
	word := map[bool]string{accept: "accepts", refuse: "refuses"}
	for _, c := range []struct {
		name         string
		ours, theirs bool
		bundle       []byte
	}{
		{"in the log", accept, accept, b},
		{"no proof", refuse, refuse, w.signLogged(t, nil)},
		{"proof of another signature", refuse, refuse, edit(b, func(m, _ map[string]any) {
			m["verificationMaterial"].(map[string]any)["tlogEntries"] = []any{other}
		})},
		{"checkpoint signed by another key", refuse, refuse, w.signLogged(t, &twoLeaves{w.Log.LogKey, stranger, origin})},
		{"checkpoint of another origin", refuse, refuse, w.signLogged(t, &twoLeaves{w.Log.LogKey, w.LogKey, "other.example"})},
		{"log id of another key", refuse, refuse, w.signLogged(t, &twoLeaves{pki.LogKey{Origin: origin, Key: &stranger.PublicKey}, stranger, origin})},
		{"other hash", refuse, refuse, edit(b, func(_, e map[string]any) { proof(e)["hashes"].([]any)[0] = proof(e)["rootHash"] })},
		{"no hash", refuse, refuse, edit(b, func(_, e map[string]any) { proof(e)["hashes"] = []any{} })},
		{"index 0 in both places", refuse, refuse, edit(b, func(_, e map[string]any) { proof(e)["logIndex"], e["logIndex"] = "0", "0" })},
		{"the same entry twice", refuse, refuse, edit(b, func(m, e map[string]any) { m["verificationMaterial"].(map[string]any)["tlogEntries"] = []any{e, e} })},
		// What is said twice, and differently.
		{"root hash is not the checkpoint's", refuse, accept, edit(b, func(_, e map[string]any) { proof(e)["rootHash"] = proof(e)["hashes"].([]any)[0] })},
		{"tree size is not the checkpoint's", refuse, accept, edit(b, func(_, e map[string]any) { proof(e)["treeSize"] = "3" })},
		{"body of another entry", refuse, accept, edit(b, func(_, e map[string]any) { e["canonicalizedBody"] = other["canonicalizedBody"] })},
	} {
		o, th := w.ours(c.bundle), w.theirsLogged(t, c.bundle)
		fmt.Fprintf(&table, "%-38s ringwall %s  sigstore-go %s\n", c.name, word[o == nil], word[th == nil])
		if (o == nil) != c.ours {
			t.Errorf("%s: Ringwall: %v", c.name, o)
		}
		if (th == nil) != c.theirs {
			t.Errorf("%s: sigstore-go: %v (the table in docs/design/release-record.md is out of date)", c.name, th)
		}
		if o == nil && th != nil {
			t.Errorf("%s: sigstore-go refuses what Ringwall accepts: %v", c.name, th)
		}
	}
	t.Log("\n" + table.String())
}
