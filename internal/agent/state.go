package agent

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// DefaultStateDir is where a host keeps what it was given and believes.
const DefaultStateDir = "/var/lib/ringwall"

// Names below the state directory. All of it is written by the agent only; the
// kernel refuses everyone else while enforcement is on.
const (
	fileAnchor     = "anchor.json" // who may sign the next policy; settings of this host
	fileAnchorCopy = "anchor.copy.json"
	filePolicy     = "policy.json" // the policy in force, signed
	filePolicyCopy = "policy.copy.json"
	filePrevious   = "policy.previous.json"
	dirFloor       = "floor"       // the epoch below which no policy may fall
	dirReleases    = "releases"    // RECORD.release.json, RECORD.cat, RECORD.names
	dirSupps       = "supplements" // NAME.policy.json
	dirPackages    = "packages"    // SHA256OFDEB.json, .cat, .names
	dirCanary      = "canary"
	dirEvents      = "events"
	dirIncoming    = "incoming"
)

// Bounds of what is read back.
const (
	maxAnchor    = 1 << 20
	maxBundle    = 8 << 20
	maxCatalogue = 320 << 20
	maxStored    = 100_000
)

// Anchor is what a host is given when it is set up: whom it believes before it
// has a policy, and later whom its policy says that it believes.
type Anchor struct {
	Host        string       `json:"host"` // this host's id; break-glass permits name it
	Authorities []AnchorCert `json:"authorities"`
	Timestamps  []AnchorCert `json:"timestamps"`
	Revoked     []Revocation `json:"revoked,omitempty"`
	Settings    Settings     `json:"settings"`
	Suites      []SeenSuite  `json:"suites,omitempty"`
}

// SeenSuite is the newest index of an archive's suite that was seen.
type SeenSuite struct {
	Name string `json:"name"` // archive/codename/suite
	Date int64  `json:"date"` // of its InRelease, Unix seconds
}

// AnchorCert is a certificate with the name that reports give it.
type AnchorCert struct {
	Name string `json:"name"`
	PEM  string `json:"pem"`
}

// Revocation is a certificate that is not believed for signatures from a time on.
type Revocation struct {
	SHA256 string `json:"sha256"`         // fingerprint
	From   int64  `json:"from,omitempty"` // Unix seconds; 0: none of them
}

// Settings are choices of the operator that no policy makes.
type Settings struct {
	Scope   string `json:"scope,omitempty"`   // cgroup v2 directory that alone is governed; "" is the whole host
	Webhook string `json:"webhook,omitempty"` // where alerts are posted; https, or http on loopback
	TPM     string `json:"tpm,omitempty"`     // TPM device for the epoch floor; "" for the first that is there
	// Units of systemd without which nobody reaches or needs this host: a fleet's
	// manifest is taken back when one that was active no longer is. Empty: those of
	// ssh, network and D-Bus.
	Units []string `json:"units,omitempty"`
	// Flips is how many distinct contents a fleet's manifest may deny that the one
	// before allowed; 0: a few.
	Flips int `json:"flips,omitempty"`
}

// State is the state directory. It is used by one goroutine at a time.
type State struct {
	dir    string
	anchor Anchor
	damage []string // found and not told yet
}

// InitState makes a state directory. One that is there already is errs.Conflict.
func InitState(dir string, a Anchor) (*State, error) {
	s := &State{dir: dir, anchor: a}
	if err := s.create(); err != nil {
		return nil, fmt.Errorf("set up %s: %w", dir, err)
	}
	return s, nil
}

func (s *State) create() error {
	if _, err := s.anchor.roots(); err != nil {
		return err
	}
	if len(s.anchor.Authorities) == 0 || len(s.anchor.Timestamps) == 0 {
		return fmt.Errorf("no policy authority or no timestamp authority: %w", errs.Invalid)
	}
	if s.anchor.Host == "" {
		var id [16]byte
		if _, err := rand.Read(id[:]); err != nil {
			return fmt.Errorf("make a host id: %w", err)
		}
		s.anchor.Host = hex.EncodeToString(id[:])
	}
	if err := s.anchor.Settings.check(); err != nil {
		return err
	}
	for _, d := range slices.Concat([]string{"."}, stateDirs(), fleetDirs()) {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o700); err != nil {
			return err
		}
	}
	_, first := os.Lstat(s.path(fileAnchor))
	_, second := os.Lstat(s.path(fileAnchorCopy))
	if !errors.Is(first, fs.ErrNotExist) || !errors.Is(second, fs.ErrNotExist) {
		return fmt.Errorf("this host is set up already; `ringwall host remove` undoes that: %w", errs.Conflict)
	}
	return s.saveAnchor()
}

func stateDirs() []string {
	return []string{dirFloor, dirReleases, dirSupps, dirPackages, dirCanary, dirEvents, dirIncoming}
}

// fleetDirs are there once a host is in a fleet, or could be.
func fleetDirs() []string {
	return []string{dirFleet, dirChunks, dirSpool, dirSpool + "/blocks", dirSpool + "/inventory"}
}

// OpenState opens a state directory; errs.NotFound if the host is not set up.
func OpenState(dir string) (*State, error) {
	s := &State{dir: dir}
	err := s.readAnchor()
	if errors.Is(err, errs.NotFound) {
		return nil, fmt.Errorf("open state: %s does not exist; run `ringwall host init` first: %w", s.path(fileAnchor), errs.NotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	return s, nil
}

func (c Settings) check() error {
	if c.Scope != "" && !filepath.IsAbs(c.Scope) {
		return fmt.Errorf("scope %q is not an absolute path: %w", c.Scope, errs.Invalid)
	}
	if len(c.Units) > maxUnits || c.Flips < 0 {
		return fmt.Errorf("%d units (at most %d), or %d flips: %w", len(c.Units), maxUnits, c.Flips, errs.Invalid)
	}
	for _, u := range c.Units {
		if u == "" || len(u) > 255 || u[0] == '-' || strings.ContainsFunc(u, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' }) {
			return fmt.Errorf("unit %.80q: want a name like ssh.service: %w", u, errs.Invalid)
		}
	}
	if c.Webhook != "" {
		return checkWebhook(c.Webhook)
	}
	return nil
}

func (s *State) path(names ...string) string {
	return filepath.Join(append([]string{s.dir}, names...)...)
}

// Host returns this host's id.
func (s *State) Host() string { return s.anchor.Host }

// Settings returns the operator's choices.
func (s *State) Settings() Settings { return s.anchor.Settings }

func (s *State) saveAnchor() error {
	b, err := json.MarshalIndent(s.anchor, "", "  ")
	if err != nil {
		return err
	}
	b = append(b, '\n')
	return errors.Join(host.WriteFile(s.path(fileAnchor), b, 0o600), host.WriteFile(s.path(fileAnchorCopy), b, 0o600))
}

// roots returns who may sign a policy.
func (a *Anchor) roots() (pki.TrustRoots, error) {
	var r pki.TrustRoots
	for _, list := range []struct {
		from []AnchorCert
		to   *[]pki.Anchor
	}{{a.Authorities, &r.CAs}, {a.Timestamps, &r.TSAs}} {
		for _, c := range list.from {
			cert, err := pki.DecodeCertificate([]byte(c.PEM))
			if err != nil {
				return r, fmt.Errorf("certificate %q: %w", c.Name, err)
			}
			*list.to = append(*list.to, pki.Anchor{Name: c.Name, Cert: cert})
		}
	}
	for _, x := range a.Revoked {
		d, err := integrity.ParseDigest(x.SHA256)
		if err != nil {
			return r, fmt.Errorf("revoked certificate: %w", err)
		}
		v := pki.Revocation{Fingerprint: d}
		if x.From != 0 {
			v.From = time.Unix(x.From, 0)
		}
		r.Revoked = append(r.Revoked, v)
	}
	return r, nil
}

// AnchorFor makes an anchor of certificates.
func AnchorFor(authorities, timestamps []*x509.Certificate) Anchor {
	list := func(cs []*x509.Certificate) []AnchorCert {
		var out []AnchorCert
		for _, c := range cs {
			out = append(out, AnchorCert{Name: c.Subject.CommonName, PEM: string(pki.EncodeCertificate(c))})
		}
		return out
	}
	return Anchor{Authorities: list(authorities), Timestamps: list(timestamps)}
}

// follow takes over whom a confirmed policy trusts to sign the next one.
func (s *State) follow(p *integrity.Policy) error {
	var as, ts []*x509.Certificate
	t := &p.Trust
	for _, a := range t.Authorities {
		if slices.Contains(a.Signs, "policy") {
			as = append(as, a.Certificate)
		}
	}
	for _, x := range t.Timestamps {
		ts = append(ts, x.Certificate)
	}
	next := AnchorFor(as, ts)
	for _, r := range p.Revoked() {
		v := Revocation{SHA256: integrity.Digest(r.Fingerprint).String()}
		if !r.From.IsZero() {
			v.From = r.From.Unix()
		}
		next.Revoked = append(next.Revoked, v)
	}
	if slices.Equal(next.Authorities, s.anchor.Authorities) && slices.Equal(next.Timestamps, s.anchor.Timestamps) && slices.Equal(next.Revoked, s.anchor.Revoked) {
		return nil
	}
	if len(as) == 0 || len(ts) == 0 {
		return fmt.Errorf("the policy names nobody who could sign the next one: %w", errs.Invalid)
	}
	was := s.anchor
	s.anchor.Authorities, s.anchor.Timestamps, s.anchor.Revoked = next.Authorities, next.Timestamps, next.Revoked
	if err := s.saveAnchor(); err != nil {
		s.anchor = was
		return fmt.Errorf("take over the policy's authorities: %w", err)
	}
	return nil
}

// seenSuite notes the date of an archive's index and refuses one that is older
// than what was seen before: a replayed index would bring old, vulnerable
// packages back.
func (s *State) seenSuite(name string, date time.Time) error {
	at := date.Unix()
	i := slices.IndexFunc(s.anchor.Suites, func(x SeenSuite) bool { return x.Name == name })
	if i < 0 {
		s.anchor.Suites = append(s.anchor.Suites, SeenSuite{name, at})
		return s.saveAnchor()
	}
	switch last := s.anchor.Suites[i].Date; {
	case at < last:
		return fmt.Errorf("index of %s is of %s, one of %s was seen before: %w", name, date.UTC().Format(time.RFC3339),
			time.Unix(last, 0).UTC().Format(time.RFC3339), errs.Untrusted)
	case at == last:
		return nil
	}
	s.anchor.Suites[i].Date = at
	return s.saveAnchor()
}

// sweep removes what a crash left half done.
func (s *State) sweep() error {
	var all error
	for _, d := range slices.Concat([]string{"."}, stateDirs(), fleetDirs()) {
		es, err := os.ReadDir(s.path(d))
		all = errors.Join(all, err)
		for _, e := range es {
			// host.WriteFile's, intake.copy's and the canary's names
			half, _ := filepath.Match(".*.tmp-*", e.Name())
			if half || d == dirIncoming || d == dirCanary {
				all = errors.Join(all, os.RemoveAll(s.path(d, e.Name())))
			}
		}
	}
	return all
}

// stored lists the stems of a directory's files with an ending, sorted.
func (s *State) stored(dir, ending string) ([]string, error) {
	es, err := os.ReadDir(s.path(dir))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	var out []string
	for _, e := range es {
		if stem, ok := strings.CutSuffix(e.Name(), ending); ok && e.Type().IsRegular() && !strings.HasPrefix(stem, ".") {
			out = append(out, stem)
		}
	}
	if len(out) > maxStored {
		return nil, fmt.Errorf("list %s: more than %d: %w", dir, maxStored, errs.Invalid)
	}
	return out, nil
}

// put writes files of one stem; the one with the first ending last, since that
// is the one that stored looks for: a crash leaves no half entry.
func (s *State) put(dir, stem string, files map[string][]byte, key string) error {
	for ending, data := range files {
		if ending == key {
			continue
		}
		if err := host.WriteFile(s.path(dir, stem+ending), data, 0o600); err != nil {
			return err
		}
	}
	return host.WriteFile(s.path(dir, stem+key), files[key], 0o600)
}

// drop removes an entry, the file that counts first.
func (s *State) drop(dir, stem, key string, others ...string) error {
	for _, ending := range append([]string{key}, others...) {
		if err := host.RemoveFile(s.path(dir, stem+ending)); err != nil {
			return err
		}
	}
	return nil
}

// readFile reads a bounded regular file; errs.NotFound if there is none.
func readFile(name string, limit int64) ([]byte, error) {
	st, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", name, errs.NotFound)
	}
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: no regular file: %w", name, errs.Invalid) // a FIFO would have us wait
	}
	if st.Size() > limit {
		return nil, fmt.Errorf("%s: %d bytes, at most %d: %w", name, st.Size(), limit, errs.Invalid)
	}
	return os.ReadFile(name)
}
