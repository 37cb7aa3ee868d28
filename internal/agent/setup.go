package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// Setup is everything that a host is given before its agent first runs.
type Setup struct {
	Anchor   Anchor
	Policy   []byte // signed; may be empty: then the agent waits for one
	Releases []ReleaseRequest
	Packages []string // package files to trust
	Root     string   // where the system lies whose apt has their signed indices; "" is /
}

// Prepared says what Prepare did.
type Prepared struct {
	Host     string          `json:"host"`
	Policy   string          `json:"policy,omitempty"`
	Epoch    uint64          `json:"epoch,omitempty"`
	Releases []ReleaseAnswer `json:"releases,omitempty"`
	Packages []PackageResult `json:"packages,omitempty"`
	Floor    string          `json:"epoch_floor"`
}

// Prepare sets a host up in dir, which must not hold one: nothing is enforced
// until the agent starts. What does not verify is an error, and then nothing is
// left behind that an agent would start with.
func Prepare(ctx context.Context, dir string, u Setup, now time.Time) (*Prepared, error) {
	s, err := InitState(dir, u.Anchor)
	if err != nil {
		return nil, err
	}
	out := &Prepared{Host: s.Host()}
	if err := s.prepare(ctx, u, now, out); err != nil {
		err = fmt.Errorf("set up this host: %w", err)
		return nil, errors.Join(err, host.ResetFloor(s.path(dirFloor), u.Anchor.Settings.TPM, nil), host.RemoveFile(s.path(fileAnchor)), host.RemoveFile(s.path(fileAnchorCopy)))
	}
	return out, nil
}

func (s *State) prepare(ctx context.Context, u Setup, now time.Time, out *Prepared) error {
	f, err := host.InitFloor(s.path(dirFloor), u.Anchor.Settings.TPM, nil)
	if err != nil {
		return fmt.Errorf("epoch floor: %w", err)
	}
	out.Floor = f.Describe()
	if len(u.Policy) == 0 {
		return nil
	}
	p, _, err := s.believe(u.Policy)
	if err != nil {
		return err
	}
	out.Policy, out.Epoch = p.Name, p.Epoch
	if err := s.stock(ctx, u, p, now, out); err != nil {
		return err
	}
	return s.confirm(u.Policy)
}

// stock stores releases and packages that a policy trusts.
func (s *State) stock(ctx context.Context, u Setup, p *integrity.Policy, now time.Time, out *Prepared) error {
	for i, r := range u.Releases {
		rel, err := s.addRelease(r.Record, r.Catalogue, r.Names, p)
		if err != nil {
			return fmt.Errorf("release %d: %w", i+1, err)
		}
		out.Releases = append(out.Releases, ReleaseAnswer{rel.Product, rel.Version, rel.Epoch, rel.Record.String()})
	}
	if len(u.Packages) == 0 {
		return nil
	}
	var err error
	out.Packages, _, err = s.trustPackages(ctx, cmp.Or(u.Root, "/"), u.Packages, p.Trust, now)
	return err
}

// AdoptPackages is TrustPackages for a host whose agent does not run yet.
func AdoptPackages(ctx context.Context, dir string, files []string, now time.Time) ([]PackageResult, error) {
	s, err := OpenState(dir)
	if err != nil {
		return nil, err
	}
	bundle, err := readFile(s.path(filePolicy), maxBundle)
	if errors.Is(err, errs.NotFound) {
		return nil, fmt.Errorf("adopt packages: this host has no policy, which would say whose packages to trust: %w", errs.Conflict)
	}
	if err != nil {
		return nil, fmt.Errorf("adopt packages: %w", err)
	}
	p, _, err := s.believe(bundle)
	if err != nil {
		return nil, err
	}
	out, _, err := s.trustPackages(ctx, "/", files, p.Trust, now)
	return out, err
}
