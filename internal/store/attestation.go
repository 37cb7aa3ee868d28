package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/errs"
)

const attestationColumns = "body, version"

func scanAttestation(row interface{ Scan(...any) error }) (*attest.HostRecord, error) {
	var body string
	var r attest.HostRecord
	if err := row.Scan(&body, &r.Version); err != nil {
		return nil, err
	}
	if err := json.Unmarshal([]byte(body), &r); err != nil {
		return nil, fmt.Errorf("stored attestation: %w", err)
	}
	return &r, nil
}

// AttestationHost is what is known of a host's TPM; errs.NotFound if nothing is.
func (t *Tx) AttestationHost(ctx context.Context, host string) (*attest.HostRecord, error) {
	return t.attestation(ctx, "host", host)
}

// AttestationTPM is the host whose TPM that is; errs.NotFound if it is nobody's.
func (t *Tx) AttestationTPM(ctx context.Context, tpm attest.HostID) (*attest.HostRecord, error) {
	return t.attestation(ctx, "tpm", string(tpm))
}

func (t *Tx) attestation(ctx context.Context, column, value string) (*attest.HostRecord, error) {
	r, err := scanAttestation(t.tx.QueryRowContext(ctx, "SELECT "+attestationColumns+" FROM attestation_host WHERE "+column+" = $1", value))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("attestation of %s: %w", value, errs.NotFound)
	}
	return r, err
}

// PutAttestation writes a record. Its version must be the one that is stored, 0
// for a new one, and its TPM nobody else's: otherwise it is errs.Conflict.
func (t *Tx) PutAttestation(ctx context.Context, r *attest.HostRecord) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	other, err := t.AttestationTPM(ctx, r.TPM)
	switch {
	case err == nil && other.Host != r.Host:
		return fmt.Errorf("the TPM %s belongs to host %s: %w", r.TPM, other.Host, errs.Conflict)
	case err != nil && !errors.Is(err, errs.NotFound):
		return err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	good := int64(0)
	if !r.LastGood.IsZero() {
		good = r.LastGood.UnixMicro()
	}
	query := `UPDATE attestation_host SET tpm = $2, standing = $3, good_us = $4, body = $5, version = version + 1 WHERE host = $1 AND version = $6`
	if r.Version == 0 {
		query = `INSERT INTO attestation_host (host, tpm, standing, good_us, body, version) VALUES ($1, $2, $3, $4, $5, $6 + 1) ON CONFLICT (host) DO NOTHING`
	}
	res, err := t.tx.ExecContext(ctx, query, r.Host, string(r.TPM), string(r.Standing), good, string(body), int64(r.Version)) //nolint:gosec // counts from 1
	if err != nil {
		return err
	}
	n, err := res.RowsAffected()
	if err == nil && n == 0 {
		err = fmt.Errorf("attestation of %s has changed meanwhile: %w", r.Host, errs.Conflict)
	}
	return err
}

// Attestations lists records in the order of hosts, after one, at most limit; of
// one standing, or "" for all.
func (t *Tx) Attestations(ctx context.Context, standing attest.Standing, after string, limit int) ([]attest.HostRecord, error) {
	rows, err := t.tx.QueryContext(ctx, "SELECT "+attestationColumns+" FROM attestation_host WHERE host > $1 AND (standing = $2 OR $2 = '') ORDER BY host LIMIT $3",
		after, string(standing), limit)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []attest.HostRecord
	for rows.Next() {
		r, err := scanAttestation(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, *r)
	}
	return out, rows.Err()
}

// PutAttestationChallenge keeps a challenge until it is taken, and forgets those
// that nobody answered in time. A nonce that is there already is errs.Conflict.
func (t *Tx) PutAttestationChallenge(ctx context.Context, c *attest.OpenChallenge) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	issued := c.Challenge.Issued
	if _, err := t.tx.ExecContext(ctx, "DELETE FROM attestation_challenge WHERE issued_us < $1", issued.Add(-2*attest.ChallengeLife).UnixMicro()); err != nil {
		return err
	}
	body, err := json.Marshal(c)
	if err != nil {
		return err
	}
	res, err := t.tx.ExecContext(ctx, "INSERT INTO attestation_challenge (nonce, issued_us, body) VALUES ($1, $2, $3) ON CONFLICT (nonce) DO NOTHING",
		c.Challenge.Nonce, issued.UnixMicro(), string(body))
	if err != nil {
		return err
	}
	n, err := res.RowsAffected()
	if err == nil && n == 0 {
		err = fmt.Errorf("a challenge with this nonce is open: %w", errs.Conflict)
	}
	return err
}

// TakeAttestationChallenge removes a challenge and returns it: of two that ask
// with one nonce, one gets errs.NotFound.
func (t *Tx) TakeAttestationChallenge(ctx context.Context, nonce []byte) (*attest.OpenChallenge, error) {
	if err := t.mayWrite(); err != nil {
		return nil, err
	}
	var body string
	err := t.tx.QueryRowContext(ctx, "DELETE FROM attestation_challenge WHERE nonce = $1 RETURNING body", nonce).Scan(&body)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("no challenge with this nonce is open: %w", errs.NotFound)
	}
	if err != nil {
		return nil, err
	}
	var c attest.OpenChallenge
	if err := json.Unmarshal([]byte(body), &c); err != nil {
		return nil, fmt.Errorf("stored challenge: %w", err)
	}
	return &c, nil
}

// PutAttestationArchive keeps evidence with its result.
func (t *Tx) PutAttestationArchive(ctx context.Context, host string, at time.Time, status attest.Status, blob []byte) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, "INSERT INTO attestation_archive (host, at_us, status, blob) VALUES ($1, $2, $3, $4) ON CONFLICT (host, at_us) DO NOTHING",
		host, at.UnixMicro(), string(status), blob)
	return err
}

// AttestationArchive is the newest archive of a host that is not later than a
// time; errs.NotFound if there is none.
func (t *Tx) AttestationArchive(ctx context.Context, host string, until time.Time) (blob []byte, at time.Time, err error) {
	var us int64
	err = t.tx.QueryRowContext(ctx, "SELECT at_us, blob FROM attestation_archive WHERE host = $1 AND at_us <= $2 ORDER BY at_us DESC LIMIT 1", host, until.UnixMicro()).Scan(&us, &blob)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, at, fmt.Errorf("archive of %s: %w", host, errs.NotFound)
	}
	return blob, time.UnixMicro(us).UTC(), err
}

// PruneAttestationArchives forgets accepted rounds before a time. What was
// refused stays.
func (t *Tx) PruneAttestationArchives(ctx context.Context, before time.Time) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, "DELETE FROM attestation_archive WHERE at_us < $1 AND status = $2", before.UnixMicro(), string(attest.Affirming))
	return err
}
