package attestation_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"ringwall/internal/attest"
	"ringwall/internal/control/attestation"
	"ringwall/internal/store"
)

// simulated is a host without a TPM: it plays one that was enrolled before. Only
// its rounds are real.
type simulated struct {
	name   string
	ak     *ecdsa.PrivateKey
	public []byte // AK
	ek     []byte
	id     attest.HostID
	key    *ecdsa.PrivateKey
	bank   *attest.Bank
	log    []byte
	list   []byte
}

// template fills a template's key in.
func template(t tpm2.TPMTPublic, key *ecdsa.PrivateKey) []byte {
	point, _ := key.PublicKey.Bytes()
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	return tpm2.Marshal(t)
}

func newSimulated(t testing.TB, name string, log []byte, files int) *simulated {
	t.Helper()
	s := &simulated{name: name, ak: newKey(t), key: newKey(t), log: log}
	s.public, s.ek = template(attest.AKTemplate(), s.ak), template(tpm2.ECCEKTemplate, newKey(t))
	ek, err := attest.ParseEK(s.ek)
	if err != nil {
		t.Fatal(err)
	}
	s.id = ek.ID()
	l, err := attest.ParseLog(log)
	if err != nil {
		t.Fatal(err)
	}
	if s.bank, err = l.LeadsTo(attest.SHA256); err != nil {
		t.Fatal(err)
	}
	var whole []byte
	for _, v := range s.bank.Values[:10] {
		whole = append(whole, v...)
	}
	s.measure("boot_aggregate", string(whole))
	s.measure(recordPath, "policy 5")
	for i := range files {
		s.measure(fmt.Sprintf("/usr/lib/package/with/a/usual/path/file-%d", i), "one")
	}
	return s
}

func (s *simulated) measure(path, content string) {
	entry, digest := imaEntry(path, content, false)
	s.list = append(s.list, entry...)
	s.bank.Extend(10, digest)
}

// enrolled puts the host into the store as one that has enrolled.
func (s *simulated) enrolled(t testing.TB, l *lab) {
	t.Helper()
	err := l.store.Write(t.Context(), func(tx *store.Tx) error {
		return tx.PutAttestation(t.Context(), &attest.HostRecord{
			Host: s.name, TPM: s.id, Identity: attest.Identity{EK: s.ek, AK: s.public}, Basis: attest.BasisAllowList, Standing: attest.StandingTrusted,
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// quote is what a TPM says (TPMS_ATTEST).
func (s *simulated) quote(qualifying []byte) attest.Quote {
	be := binary.BigEndian
	sized := func(b []byte) []byte { return append(be.AppendUint16(nil, uint16(len(b))), b...) }
	name := sha256.Sum256(s.public)
	full := sha256.Sum256(append(be.AppendUint32(nil, 0x4000000b), append([]byte{0, 0x0b}, name[:]...)...))
	b := be.AppendUint16(be.AppendUint32(nil, 0xff544347), 0x8018)
	b = append(b, sized(append([]byte{0, 0x0b}, full[:]...))...)
	b = append(b, sized(qualifying)...)
	b = be.AppendUint64(be.AppendUint32(be.AppendUint32(be.AppendUint64(b, 1000), 1), 0), 0)
	b = append(b[:len(b)-8], append([]byte{1}, make([]byte, 8)...)...)
	b = append(be.AppendUint16(be.AppendUint32(b, 1), 0x0b), 3, 0xff, 0xff, 0xff)
	h := sha256.New()
	for _, v := range s.bank.Values {
		h.Write(v)
	}
	b = append(b, sized(h.Sum(nil))...)
	sum := sha256.Sum256(b)
	r, x, _ := ecdsa.Sign(rand.Reader, s.ak, sum[:])
	sig := be.AppendUint16(be.AppendUint16(nil, 0x18), 0x0b)
	sig = append(append(sig, sized(r.Bytes())...), sized(x.Bytes())...)
	return attest.Quote{Attest: b, Signature: sig}
}

// round is one, whole when the host sends everything again.
func (s *simulated) round(ctx context.Context, service *attestation.Service, whole bool) (*attest.Reply, error) {
	spki, err := x509.MarshalPKIXPublicKey(s.key.Public())
	if err != nil {
		return nil, err
	}
	q, err := service.Challenge(ctx, s.name, &attest.Request{Identity: attest.Identity{EK: s.ek, AK: s.public}, Key: spki})
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, s.key)
	if err != nil {
		return nil, err
	}
	ev := attest.Evidence{AK: s.public, Bank: "sha256", PCRs: s.bank.Values[:], Quote: s.quote(q.Qualifying(nil)), EventLog: s.log, IMA: s.list}
	if !whole && q.IMAFrom > 0 {
		rest, err := attest.SkipIMA(s.list, 20, q.IMAFrom)
		if err != nil {
			return nil, err
		}
		ev.EventLog, ev.IMA, ev.IMAFrom = nil, rest, q.IMAFrom
	}
	return service.Verify(ctx, s.name, &attest.Answer{Nonce: q.Nonce, CSR: csr, Evidence: ev})
}

// rounds measures whole rounds through the service and its database: challenge,
// appraisal, signature with timestamp, certificate, archive, three transactions.
func rounds(b *testing.B, hosts, files int, whole bool) {
	l := newLab(b)
	l.policy("all", goodPolicy(b), attestation.Enrolment{})
	log := recorded(b, "good").EventLog
	all := make([]*simulated, hosts)
	for i := range all {
		all[i] = newSimulated(b, fmt.Sprintf("host-%d", i), log, files)
		all[i].enrolled(b, l)
		if r, err := all[i].round(b.Context(), l.service, true); err != nil || r.Status != attest.Affirming {
			b.Fatalf("%s, %v", reasonsOf(r), err)
		}
	}
	var next atomic.Int64
	var mu sync.Mutex
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			mu.Lock()
			s := all[int(next.Add(1))%hosts]
			mu.Unlock()
			if r, err := s.round(b.Context(), l.service, whole); err != nil || r.Status != attest.Affirming {
				b.Errorf("%s, %v", reasonsOf(r), err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "rounds/s")
}

// 64 hosts, no new entries; the same of a thousand; and everything again with an
// IMA list of 10,000 entries.
func BenchmarkRound_incremental(b *testing.B) { rounds(b, 64, 100, false) }
func BenchmarkRound_whole(b *testing.B)       { rounds(b, 8, 10_000, true) }

// Hundreds of hosts at once, each with its own state, none in another's way.
func TestManyHosts(t *testing.T) {
	const hosts, each = 20, 2
	l := newLab(t)
	l.policy("all", goodPolicy(t), attestation.Enrolment{})
	log := recorded(t, "good").EventLog
	var wg sync.WaitGroup
	work := make(chan *simulated)
	for range 8 {
		wg.Go(func() {
			for s := range work {
				for i := range each {
					s.measure(fmt.Sprintf("/bin/%d", i), "two")
					if r, err := s.round(t.Context(), l.service, false); err != nil || r.Status != attest.Affirming {
						t.Errorf("%s: %s, %v", s.name, reasonsOf(r), err)
					}
				}
			}
		})
	}
	for i := range hosts {
		s := newSimulated(t, fmt.Sprintf("host-%d", i), log, 5)
		s.enrolled(t, l)
		if i%10 == 9 {
			s.measure("/tmp/rogue", "rogue") // some are bad, and only those
			if r, err := s.round(t.Context(), l.service, false); err != nil || r.Status != attest.Contraindicated {
				t.Errorf("%s, %v", reasonsOf(r), err)
			}
			continue
		}
		work <- s
	}
	close(work)
	wg.Wait()
	for standing, want := range map[attest.Standing]int{attest.StandingTrusted: hosts - hosts/10, attest.StandingQuarantined: hosts / 10} {
		if list, err := l.service.List(t.Context(), standing, "", 1000); err != nil || len(list) != want {
			t.Errorf("%d %s, want %d, %v", len(list), standing, want, err)
		}
	}
}
