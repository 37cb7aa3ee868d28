package gate

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/pki"
	"ringwall/internal/strictyaml"
)

const (
	maxAge          = 3650 * 24 * time.Hour
	maxBreakglass   = 24 * time.Hour
	anyNumber       = 1<<31 - 1
	defaultMaxAge   = 7 * 24 * time.Hour
	minApprovers    = 2
	clockSkew       = 5 * time.Minute
	reservedProduct = "product"
	reservedRev     = "revision"
	reservedEpoch   = "epoch"
	reservedRing    = "ring"
)

// Policy is a product's release policy: which gates a build must pass before it
// is signed, and whose word counts. ParsePolicy makes it.
type Policy struct {
	Name     string
	Product  string
	Digest   Digest // SHA-256 of the document
	MinEpoch uint32 // a release's epoch must reach it
	Rings    []string
	Trust    pki.TrustRoots // for Open

	Attesters  []Attester
	Gates      []Gate
	Breakglass *Breakglass // nil: there is none for this product
	// KernelSignatures are made in the same run as the release.
	KernelSignatures []KernelSignature
}

// Attester is somebody whose word can count: a name for an identity, or for a
// key, under one authority.
type Attester struct {
	Name      string
	Authority string
	Identity  string // the certificate's URI; empty if a key is given
	Key       Digest // SHA-256 of the public key (SubjectPublicKeyInfo); zero if an identity is given
}

// Gate is one required check.
type Gate struct {
	Name      string
	Kind      Kind
	Type      string   // of a custom predicate
	Attesters []string // by name
	MaxAge    time.Duration
	Source    bool // evidence is about the source revision, not about the artefact

	AtLeast     int               // tests that passed
	MaxWarned   int               // tests with warnings, skipped ones included
	Reviewers   int               // who are not authors
	AtMost      map[string]int    // findings by level or severity
	DatabaseAge time.Duration     // of the scanner's vulnerability database
	VEX         []string          // attesters whose VEX statements count
	Builders    []string          // of provenance
	BuildTypes  []string          // of provenance; empty: any
	SourceURI   string            // of provenance; empty: any
	Verifiers   []string          // of a verification; empty: any
	Properties  []string          // of a verification
	Require     map[string]string // of a custom predicate
}

// Breakglass says who may let a release past the gates, and how far.
type Breakglass struct {
	Approvers []string // attesters, by name
	Required  int      // how many of them; at least two
	Ring      string   // the furthest that such a release may go
	MaxTime   time.Duration
}

// ParsePolicy reads a release policy, whose name stands in errors. It is strict:
// unknown and repeated keys, wrong types, anchors, aliases, tags and anything
// out of bounds are refused, and the *strictyaml.Error lists every problem with its
// place. docs/design/signing.md describes the format.
func ParsePolicy(name string, doc []byte) (*Policy, error) {
	d := &document{Reader: strictyaml.NewReader(name, limits()), p: &Policy{Digest: sha256.Sum256(doc)}}
	if root := d.Root(doc); root != nil {
		d.policy(root)
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	return d.p, nil
}

type document struct {
	strictyaml.Reader
	p *Policy
}

func (d *document) policy(n *yaml.Node) {
	p := d.p
	var gates, attesters, breakglass *yaml.Node
	keep := func(to **yaml.Node) func(*yaml.Node, string) {
		return func(n *yaml.Node, _ string) { *to = n }
	}
	d.Mapping(n, "", []strictyaml.Field{
		strictyaml.Required("version", func(n *yaml.Node, where string) { d.number(n, where, 1, 1) }),
		strictyaml.Required("name", func(n *yaml.Node, where string) { p.Name = d.label(n, where) }),
		strictyaml.Required("product", func(n *yaml.Node, where string) { p.Product = d.product(n, where) }),
		strictyaml.Optional("min_epoch", func(n *yaml.Node, where string) { p.MinEpoch = uint32(d.number(n, where, 0, 1<<31-1)) }), //nolint:gosec // bounded
		strictyaml.Required("rings", func(n *yaml.Node, where string) {
			p.Rings = d.texts(n, where)
			for _, s := range p.Rings {
				if s != "" && !isLabel(s) {
					d.Problem(n, where, "`"+clip(s)+"` is no ring's name", "use up to 63 lower-case letters, digits, dots, dashes and underscores")
				}
			}
		}),
		strictyaml.Required("trust", d.trust),
		strictyaml.Required("attesters", keep(&attesters)),
		strictyaml.Required("gates", keep(&gates)),
		strictyaml.Optional("breakglass", keep(&breakglass)),
		strictyaml.Optional("kernel_signatures", d.kernelSignatures),
	})
	if attesters == nil || gates == nil {
		return
	}
	// in this order, wherever they stand: each speaks of the one before
	d.list(attesters, "attesters", d.attester)
	d.list(gates, "gates", d.gate)
	if breakglass != nil {
		d.breakglass(breakglass, "breakglass")
	}
	if i := slices.IndexFunc(p.Gates, func(g Gate) bool { return g.Source }); i >= 0 && !slices.ContainsFunc(p.Gates, Gate.tellsRevision) {
		d.Problem(gates, "gates", "no gate says from which revision the artefact was built, so that what gate "+p.Gates[i].Name+" says of a revision would vouch for any artefact",
			"add a gate of kind provenance, or one of kind test or scan without `about: source`")
	}
}

// tellsRevision says whether passing evidence of the gate ties the artefact to
// a source revision.
func (g Gate) tellsRevision() bool { return !g.Source && g.needsRevision() }

// needsRevision says whether evidence without a revision is none.
func (g Gate) needsRevision() bool {
	switch g.Kind {
	case KindTest, KindReview, KindScan, KindProvenance:
		return true
	}
	return false
}

func (d *document) product(n *yaml.Node, where string) string {
	s := d.text(n, where)
	for i, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || i > 0 && (c == '+' || c == '-' || c == '.')) || i >= 64 {
			d.Problem(n, where, "`"+clip(s)+"` is no product", "use the name in the release record: up to 64 of a-z, digits, + - .")
			return ""
		}
	}
	return s
}

func (d *document) certificate(n *yaml.Node, where string) *x509.Certificate {
	c, err := pki.DecodeCertificate([]byte(n.Value))
	if n.Kind != yaml.ScalarNode || err != nil {
		d.Problem(n, where, "must be a PEM certificate", "paste the file, indented, after `certificate: |`")
		return nil
	}
	return c
}

func (d *document) trust(n *yaml.Node, where string) {
	anchors := func(to *[]pki.Anchor) func(*yaml.Node, string) {
		return func(n *yaml.Node, where string) {
			d.list(n, where, func(n *yaml.Node, where string) {
				var a pki.Anchor
				d.Mapping(n, where, []strictyaml.Field{
					strictyaml.Required("name", func(n *yaml.Node, where string) {
						a.Name = d.text(n, where)
						if slices.ContainsFunc(*to, func(b pki.Anchor) bool { return b.Name == a.Name }) {
							d.Problem(n, where, "`"+clip(a.Name)+"` is taken", "choose another name")
						}
					}),
					strictyaml.Required("certificate", func(n *yaml.Node, where string) { a.Cert = d.certificate(n, where) }),
				})
				*to = append(*to, a)
			})
		}
	}
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("authorities", anchors(&d.p.Trust.CAs)),
		strictyaml.Required("timestamps", anchors(&d.p.Trust.TSAs)),
		strictyaml.Optional("revoked", d.revoked),
	})
}

// revoked reads certificates whose word counts no more: of attesters, of their
// authorities, of timestamp authorities.
func (d *document) revoked(n *yaml.Node, where string) {
	d.list(n, where, func(n *yaml.Node, where string) {
		var r pki.Revocation
		d.Mapping(n, where, []strictyaml.Field{
			strictyaml.Required("sha256", func(n *yaml.Node, where string) {
				f, err := ParseDigest(n.Value)
				if n.Kind != yaml.ScalarNode || err != nil || f.IsZero() {
					d.Problem(n, where, "must be 64 lower-case hex digits", "the certificate's fingerprint: openssl x509 -noout -fingerprint -sha256 -in FILE, without colons, in lower case")
				}
				r.Fingerprint = f
			}),
			strictyaml.Optional("from", func(n *yaml.Node, where string) { r.From = d.Time(n, where) }),
		})
		d.p.Trust.Revoked = append(d.p.Trust.Revoked, r)
	})
}

func (d *document) attester(n *yaml.Node, where string) {
	var a Attester
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("name", func(n *yaml.Node, where string) {
			a.Name = d.label(n, where)
			if d.attesterIndex(a.Name) >= 0 {
				d.Problem(n, where, "`"+a.Name+"` is taken", "choose another name")
			}
		}),
		strictyaml.Required("authority", func(n *yaml.Node, where string) {
			a.Authority = d.text(n, where)
			var names []string
			for _, c := range d.p.Trust.CAs {
				names = append(names, c.Name)
			}
			if a.Authority != "" && !slices.Contains(names, a.Authority) {
				d.Problem(n, where, "`"+clip(a.Authority)+"` is not in trust.authorities", strictyaml.Suggest(a.Authority, names))
			}
		}),
		strictyaml.Optional("identity", func(n *yaml.Node, where string) {
			a.Identity = d.text(n, where)
			if u, err := url.Parse(a.Identity); a.Identity != "" && (err != nil || u.Scheme == "" || u.Host == "") {
				d.Problem(n, where, "`"+clip(a.Identity)+"` is no identity", "use the certificate's URI, such as spiffe://fleet.example/attest/ci")
			}
		}),
		strictyaml.Optional("key", func(n *yaml.Node, where string) {
			var err error
			if a.Key, err = ParseDigest(n.Value); n.Kind != yaml.ScalarNode || err != nil || a.Key.IsZero() {
				d.Problem(n, where, "must be 64 lower-case hex digits", "SHA-256 of the public key in DER: openssl x509 -pubkey -noout -in FILE | openssl pkey -pubin -outform der | sha256sum")
			}
		}),
	})
	if n.Kind == yaml.MappingNode && (a.Identity == "") == a.Key.IsZero() {
		d.Problem(n, where, "needs either identity or key", "identity is right unless the key is in hardware and stays the same")
	}
	d.p.Attesters = append(d.p.Attesters, a)
}

func (d *document) attesterIndex(name string) int {
	return slices.IndexFunc(d.p.Attesters, func(a Attester) bool { return a.Name == name })
}

// attesters reads names of attesters.
func (d *document) attesters(n *yaml.Node, where string) []string {
	out := d.texts(n, where)
	var names []string
	for _, a := range d.p.Attesters {
		names = append(names, a.Name)
	}
	for _, s := range out {
		if s != "" && !slices.Contains(names, s) {
			d.Problem(n, where, "`"+clip(s)+"` is no attester", strictyaml.Suggest(s, names))
		}
	}
	return out
}

func (d *document) breakglass(n *yaml.Node, where string) {
	b := &Breakglass{Required: minApprovers}
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("approvers", func(n *yaml.Node, where string) { b.Approvers = d.attesters(n, where) }),
		strictyaml.Optional("required", func(n *yaml.Node, where string) { b.Required = d.number(n, where, minApprovers, maxList) }),
		strictyaml.Required("ring", func(n *yaml.Node, where string) { b.Ring = d.Word(n, where, d.p.Rings) }),
		strictyaml.Required("max_time", func(n *yaml.Node, where string) { b.MaxTime = d.duration(n, where, maxBreakglass) }),
	})
	if n.Kind == yaml.MappingNode && len(b.Approvers) < b.Required {
		d.Problem(n, where, fmt.Sprintf("%d approvers are required and %d are named", b.Required, len(b.Approvers)), "name more")
	}
	d.p.Breakglass = b
}
