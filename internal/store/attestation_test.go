package store_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/errs"
	"ringwall/internal/store"
)

func TestAttestation(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		put := func(r attest.HostRecord) error {
			return s.Write(ctx, func(tx *store.Tx) error { return tx.PutAttestation(ctx, &r) })
		}
		noon := time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)
		a := attest.HostRecord{
			Host: "web-1", TPM: "aa", Standing: attest.StandingTrusted, LastGood: noon, Basis: attest.BasisAllowList,
			State: &attest.State{EventLog: []byte{1}, IMA: attest.IMAState{Entries: 3}}, BootLog: []byte("log"), Passed: []attest.Check{attest.CheckQuote},
		}
		if err := put(a); err != nil {
			t.Fatal(err)
		}
		for what, r := range map[string]attest.HostRecord{
			"made twice":         a,
			"another's TPM":      {Host: "web-2", TPM: "aa", Standing: attest.StandingPending},
			"of another version": {Host: "web-1", TPM: "aa", Standing: attest.StandingPending, Version: 9},
		} {
			if err := put(r); !errors.Is(err, errs.Conflict) {
				t.Errorf("%s: %v", what, err)
			}
		}
		a.Version, a.Standing, a.Why = 1, attest.StandingQuarantined, "db-entry"
		if err := errors.Join(put(a), put(attest.HostRecord{Host: "web-3", TPM: "cc", Standing: attest.StandingPending})); err != nil {
			t.Fatal(err)
		}
		err := s.Read(ctx, func(tx *store.Tx) error {
			got, err := tx.AttestationTPM(ctx, "aa")
			if err != nil {
				return err
			}
			if got.Host != "web-1" || got.Version != 2 || got.Why != "db-entry" || !got.LastGood.Equal(noon) || got.State.IMA.Entries != 3 || string(got.BootLog) != "log" {
				t.Errorf("%+v", got)
			}
			if _, err := tx.AttestationHost(ctx, "web-9"); !errors.Is(err, errs.NotFound) {
				t.Errorf("no such host: %v", err)
			}
			for standing, want := range map[attest.Standing]int{"": 2, attest.StandingPending: 1, attest.StandingTrusted: 0} {
				if list, err := tx.Attestations(ctx, standing, "", 10); err != nil || len(list) != want {
					t.Errorf("%q: %d, %v", standing, len(list), err)
				}
			}
			list, err := tx.Attestations(ctx, "", "web-1", 10)
			if err != nil || len(list) != 1 || list[0].Host != "web-3" {
				t.Errorf("%+v, %v", list, err)
			}
			if err := tx.PutAttestation(ctx, got); err == nil {
				t.Error("a reading transaction wrote")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		archives(t, s, noon)
	})
}

func archives(t *testing.T, s *store.Store, noon time.Time) {
	t.Helper()
	ctx := t.Context()
	err := s.Write(ctx, func(tx *store.Tx) error {
		return errors.Join(
			tx.PutAttestationArchive(ctx, "web-1", noon, attest.Affirming, []byte("one")),
			tx.PutAttestationArchive(ctx, "web-1", noon.Add(time.Minute), attest.Contraindicated, []byte("two")),
			tx.PutAttestationArchive(ctx, "web-1", noon.Add(2*time.Minute), attest.Affirming, []byte("three")),
			tx.PruneAttestationArchives(ctx, noon.Add(90*time.Second)))
	})
	if err != nil {
		t.Fatal(err)
	}
	err = s.Read(ctx, func(tx *store.Tx) error {
		blob, at, err := tx.AttestationArchive(ctx, "web-1", noon.Add(time.Hour))
		if err != nil || string(blob) != "three" || !at.Equal(noon.Add(2*time.Minute)) {
			t.Errorf("%s, %s, %v", blob, at, err)
		}
		if blob, _, err = tx.AttestationArchive(ctx, "web-1", noon.Add(100*time.Second)); err != nil || string(blob) != "two" {
			t.Errorf("what was refused stays: %s, %v", blob, err)
		}
		if _, _, err = tx.AttestationArchive(ctx, "web-1", noon); !errors.Is(err, errs.NotFound) {
			t.Errorf("an accepted round that is old: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A nonce is good once, whoever asks at the same time.
func TestAttestation_challenges(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		noon := time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)
		nonce := func(b byte) []byte { return bytes.Repeat([]byte{b}, attest.NonceSize) }
		put := func(b byte, at time.Time) error {
			return s.Write(ctx, func(tx *store.Tx) error {
				return tx.PutAttestationChallenge(ctx, &attest.OpenChallenge{Name: "web-1", Challenge: attest.Challenge{Nonce: nonce(b), Issued: at}})
			})
		}
		take := func(b byte) (c *attest.OpenChallenge, err error) {
			err = s.Write(ctx, func(tx *store.Tx) (err error) {
				c, err = tx.TakeAttestationChallenge(ctx, nonce(b))
				return err
			})
			return c, err
		}
		if err := errors.Join(put(1, noon), put(2, noon)); err != nil {
			t.Fatal(err)
		}
		if err := put(1, noon); !errors.Is(err, errs.Conflict) {
			t.Errorf("the same nonce twice: %v", err)
		}
		var won, lost int
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				c, err := take(1)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil && c.Name == "web-1":
					won++
				case errors.Is(err, errs.NotFound):
					lost++
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won != 1 || lost != 7 {
			t.Errorf("%d took it, %d did not", won, lost)
		}
		// what nobody answered is forgotten
		if err := put(3, noon.Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		if _, err := take(2); !errors.Is(err, errs.NotFound) {
			t.Errorf("an hour later: %v", err)
		}
	})
}
