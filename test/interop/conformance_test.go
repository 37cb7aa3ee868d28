package interop

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"ringwall/internal/pki"
)

// The cases of sigstore-conformance's bundle verification that our format can
// express, under their names, made from our own keys. Not expressible: Fulcio
// identities and SCTs, Rekor 1 entries and promises, managed keys, message
// signatures, other media types, other curves.
//
// Each is given to our verifier and to sigstore-go, which is to require a
// timestamp and a proof of the log.
func TestConformance(t *testing.T) {
	w := newLoggedWorld(t)
	c := &conformance{t: t, world: w, log: &twoLeaves{w.Log.LogKey, w.LogKey, origin}}
	good := w.signLogged(t, c.log)
	other := w.signLogged(t, c.log)
	st := c.payload(good)
	enc := base64.StdEncoding.EncodeToString
	const accept, refuse = true, false
	cases := []struct {
		name         string
		ours, theirs bool
		bundle       []byte
	}{
		{"happy-path", accept, accept, good},
		{"dsse-with-hashedrekord-happy-path", accept, accept, c.signed(st, w.TSA)},
		{"dsse-with-hashedrekord-mismatch-envelope_fail", refuse, refuse, c.edit(good, func(b, _ object) {
			b["dsseEnvelope"].(object)["payload"] = enc(bytes.Replace(st, []byte(`"1.0"`), []byte(`"1.1"`), 1))
		})},
		{"dsse-with-hashedrekord-mismatch-sig_fail", refuse, refuse, c.edit(good, func(b, _ object) {
			b["dsseEnvelope"].(object)["signatures"] = c.decode(other)["dsseEnvelope"].(object)["signatures"]
		})},
		{"dsse-with-hashedrekord-invalid-sig_fail", refuse, refuse, c.badSignature(st)},
		{"cve-2022-36056-swapped-tlog-entry_fail", refuse, refuse, c.edit(good, func(b, _ object) {
			b["verificationMaterial"].(object)["tlogEntries"] = c.decode(other)["verificationMaterial"].(object)["tlogEntries"]
		})},
		{"dsse-statement-unknown-type_fail", refuse, accept, c.signed(bytes.Replace(st, []byte("Statement/v1"), []byte("Statement/v9"), 1), w.TSA)},
		{"dsse-statement-missing-type_fail", refuse, accept, c.signed(bytes.Replace(st, []byte(`"_type":"https://in-toto.io/Statement/v1",`), nil, 1), w.TSA)},
		{"artifact-digest-mismatch_fail", refuse, refuse, c.signed(bytes.Replace(st, []byte(`{"sha256":"`), []byte(`{"sha256":"00`), 1)[:len(st)], w.TSA)},
		{"missing-inclusion-proof_fail", refuse, refuse, c.edit(good, func(_, e object) { delete(e, "inclusionProof") })},
		{"invalid-inclusion-proof_fail", refuse, refuse, c.edit(good, func(_, e object) {
			p := e["inclusionProof"].(object)
			p["hashes"] = []any{p["rootHash"]}
		})},
		{"invalid-checkpoint-signature_fail", refuse, refuse, c.checkpoint(good, func(note string) string { return note[:len(note)-8] + "AAAA" + note[len(note)-4:] })},
		{"checkpoint-bad-keyhint_fail", refuse, refuse, c.checkpoint(good, c.otherHint)},
		{"checkpoint-wrong-roothash_fail", refuse, refuse, c.checkpoint(good, func(note string) string {
			lines := strings.SplitN(note, "\n", 4)
			return lines[0] + "\n" + lines[1] + "\n" + enc(make([]byte, 32)) + "\n" + lines[3]
		})},
		{"rekor2-checkpoint-origin-not-first_fail", refuse, refuse, c.checkpoint(good, func(note string) string { return "x\n" + note })},
		{"rekor2-checkpoint-cosigned", accept, accept, c.checkpoint(good, func(note string) string { return note + "\u2014 witness.example AAAABBBBCCCC\n" })},
		{"rekor2-no-timestamp_fail", refuse, refuse, c.edit(good, func(b, _ object) { delete(b["verificationMaterial"].(object), "timestampVerificationData") })},
		{"rekor2-timestamp-outside-validity_fail", refuse, refuse, c.signed(st, c.at(8*24*time.Hour))},
		{"a signature that was dated back", refuse, refuse, c.signedBy(st, w.at.Add(48*time.Hour), w.TSA)},
		{"trust-root-leaf-validity-end-inclusive", accept, accept, c.signed(st, c.at(pki.MaxLeafLifetime-5*time.Minute))},
		{"a second after the leaf's end_fail", refuse, refuse, c.signed(st, c.at(pki.MaxLeafLifetime-5*time.Minute+time.Second))},
		{"rekor2-timestamp-untrusted-tsa_fail", refuse, refuse, c.signed(st, c.strangersTSA())},
		{"rekor2-timestamp-wrong-hash_fail", refuse, refuse, c.edit(good, func(b, _ object) {
			b["verificationMaterial"].(object)["timestampVerificationData"] = c.decode(other)["verificationMaterial"].(object)["timestampVerificationData"]
		})},
		{"a token by a code-signing certificate", refuse, refuse, c.signed(st, c.builderAsTSA())},
		// Two tokens are one too many for us; one good one is enough for sigstore-go 1.3.0.
		{"rekor2-multiple-timestamps-one-outside-cert-validity_fail", refuse, accept, c.twoTimestamps(good, c.at(30*24*time.Hour))},
		{"two timestamps, both good", refuse, accept, c.twoTimestamps(good, w.TSA)},
		{"the same timestamp twice", refuse, accept, c.edit(good, func(b, _ object) {
			d := b["verificationMaterial"].(object)["timestampVerificationData"].(object)
			l := d["rfc3161Timestamps"].([]any)
			d["rfc3161Timestamps"] = append(l, l[0])
		})},
	}
	var table strings.Builder
	word := map[bool]string{accept: "accepts", refuse: "refuses"}
	for _, x := range cases {
		o, th := w.ours(x.bundle), w.theirsLogged(t, x.bundle)
		fmt.Fprintf(&table, "%-58s ringwall %s  sigstore-go %s\n", x.name, word[o == nil], word[th == nil])
		if (o == nil) != x.ours {
			t.Errorf("%s: Ringwall: %v", x.name, o)
		}
		if (th == nil) != x.theirs {
			t.Errorf("%s: sigstore-go: %v", x.name, th)
		}
		if o == nil && th != nil {
			t.Errorf("%s: sigstore-go refuses what Ringwall accepts: %v", x.name, th)
		}
	}
	t.Log("\n" + table.String())
}

// rekor2-timestamp-wrong-tsa-validity-borrow_fail: an authority whose time is
// over stamps, and another one that is trusted too would be in time.
func TestConformance_validityBorrow(t *testing.T) {
	w := newLoggedWorld(t)
	c := &conformance{t: t, world: w, log: &twoLeaves{w.Log.LogKey, w.LogKey, origin}}
	late := w.TSA.Cert.NotAfter.Add(time.Hour)
	young := c.tsaAt(late)
	expired := *w.TSA
	expired.Now = func() time.Time { return late }
	if _, err := expired.Stamp([]byte("m")); err == nil {
		t.Error("our TSA stamps after its end")
	}
	// Its key does, with a certificate that others do not have.
	forged := *young
	forged.Key = w.TSA.Key
	der, err := forged.Stamp([]byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	trusted := []pki.Anchor{{Name: "old", Cert: w.TSA.Cert}, {Name: "young", Cert: young.Cert}}
	if _, err := pki.VerifyTimestamp(der, []byte("m"), trusted); err == nil {
		t.Error("the old authority's key signs in the name of the young one")
	}
	if der, err = young.Stamp([]byte("m")); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyTimestamp(der, []byte("m"), trusted); err != nil {
		t.Errorf("the young one itself: %v", err)
	}
}

type object = map[string]any

type conformance struct {
	t     *testing.T
	world *world
	log   *twoLeaves
}

func (c *conformance) decode(b []byte) object {
	c.t.Helper()
	var m object
	if err := json.Unmarshal(b, &m); err != nil {
		c.t.Fatal(err)
	}
	return m
}

func (c *conformance) edit(b []byte, edit func(bundle, entry object)) []byte {
	c.t.Helper()
	m := c.decode(b)
	edit(m, m["verificationMaterial"].(object)["tlogEntries"].([]any)[0].(object))
	out, err := json.Marshal(m)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c *conformance) checkpoint(b []byte, edit func(string) string) []byte {
	return c.edit(b, func(_, e object) {
		cp := e["inclusionProof"].(object)["checkpoint"].(object)
		cp["envelope"] = edit(cp["envelope"].(string))
	})
}

// otherHint changes the key hash before the signature.
func (c *conformance) otherHint(note string) string {
	at := strings.LastIndex(note, " ") + 1
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(note[at:]))
	if err != nil {
		c.t.Fatal(err)
	}
	raw[0] ^= 1
	return note[:at] + base64.StdEncoding.EncodeToString(raw) + "\n"
}

func (c *conformance) payload(b []byte) []byte {
	p, err := base64.StdEncoding.DecodeString(c.decode(b)["dsseEnvelope"].(object)["payload"].(string))
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// signed is a logged bundle over any payload.
func (c *conformance) signed(payload []byte, stamper pki.Stamper) []byte {
	c.t.Helper()
	return c.signedBy(payload, c.world.at, stamper)
}

// signedBy is one by a leaf that was issued at a time.
func (c *conformance) signedBy(payload []byte, issued time.Time, stamper pki.Stamper) []byte {
	c.t.Helper()
	s, err := c.world.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: issued})
	if err != nil {
		c.t.Fatal(err)
	}
	s.Stamper, s.Log = stamper, c.log
	b, err := s.Sign("application/vnd.in-toto+json", payload)
	if err != nil {
		c.t.Fatal(err)
	}
	return b
}

// badSignature is a bundle whose signature was never good, but is stamped and
// logged as it is.
func (c *conformance) badSignature(payload []byte) []byte {
	c.t.Helper()
	b := c.decode(c.signed(payload, c.world.TSA))
	digest := sha256.Sum256([]byte("something else"))
	k, err := pki.NewKey()
	if err != nil {
		c.t.Fatal(err)
	}
	sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		c.t.Fatal(err)
	}
	stamp, err := c.world.TSA.Stamp(sig)
	if err != nil {
		c.t.Fatal(err)
	}
	enc := base64.StdEncoding.EncodeToString
	b["dsseEnvelope"].(object)["signatures"] = []any{object{"sig": enc(sig)}}
	m := b["verificationMaterial"].(object)
	m["timestampVerificationData"] = object{"rfc3161Timestamps": []any{object{"signedTimestamp": enc(stamp)}}}
	delete(m, "tlogEntries")
	out, err := json.Marshal(b)
	if err != nil {
		c.t.Fatal(err)
	}
	if out, err = c.log.Append(c.t.Context(), out); err != nil {
		c.t.Fatal(err)
	}
	return out
}

// at is the fleet's authority at another time.
func (c *conformance) at(d time.Duration) *pki.TSA {
	return &pki.TSA{Cert: c.world.TSA.Cert, Key: c.world.TSA.Key, Now: func() time.Time { return c.world.at.Add(d) }}
}

// tsaAt is another authority of the fleet, made at a time.
func (c *conformance) tsaAt(at time.Time) *pki.TSA {
	c.t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := c.world.Root.IssueTSA("young TSA", k, at)
	if err != nil {
		c.t.Fatal(err)
	}
	return &pki.TSA{Cert: cert, Key: k, Now: func() time.Time { return at }}
}

func (c *conformance) strangersTSA() *pki.TSA {
	c.t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		c.t.Fatal(err)
	}
	root, err := pki.NewRoot("stranger", k, c.world.at)
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := root.IssueTSA("Fleet TSA", k, c.world.at)
	if err != nil {
		c.t.Fatal(err)
	}
	return &pki.TSA{Cert: cert, Key: k, Now: func() time.Time { return c.world.at }}
}

func (c *conformance) builderAsTSA() *pki.TSA {
	c.t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		c.t.Fatal(err)
	}
	leaf, err := c.world.Issuers[pki.PurposeBuild].IssueLeaf(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: c.world.at}, k.Public())
	if err != nil {
		c.t.Fatal(err)
	}
	return &pki.TSA{Cert: leaf, Key: k, Now: func() time.Time { return c.world.at }}
}

func (c *conformance) twoTimestamps(b []byte, second pki.Stamper) []byte {
	c.t.Helper()
	return c.edit(b, func(m, _ object) {
		sig, err := base64.StdEncoding.DecodeString(m["dsseEnvelope"].(object)["signatures"].([]any)[0].(object)["sig"].(string))
		if err != nil {
			c.t.Fatal(err)
		}
		der, err := second.Stamp(sig)
		if err != nil {
			c.t.Fatal(err)
		}
		d := m["verificationMaterial"].(object)["timestampVerificationData"].(object)
		d["rfc3161Timestamps"] = append(d["rfc3161Timestamps"].([]any), object{"signedTimestamp": base64.StdEncoding.EncodeToString(der)})
	})
}
