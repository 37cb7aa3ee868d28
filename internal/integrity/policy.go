package integrity

import (
	"crypto/x509"
	"time"

	"ringwall/internal/pki"
)

// Policy is what may run on a host, and what those programs may do. ParsePolicy
// reads one from YAML; Join adds supplemental ones. A Policy is not changed
// after that and may be used by several goroutines.
//
// Deny beats allow beats the default, which is deny.
type Policy struct {
	Name  string
	Epoch uint64 // only grows; a host refuses a lower one
	// Supplements names the base policy that this one adds to; empty for a base
	// policy. A supplemental policy holds allow rules and exceptions only.
	Supplements string
	Digest      Digest // SHA-256 of the document
	Modes       [8]Mode
	Process     ProcessRules
	Trust       Trust

	Allow        []AllowRule
	Deny         []DenyRule
	Programs     []ProgramRule
	Interpreters []InterpreterRule
	Knobs        []Knob

	ix *index // see Prepare
}

// Trust is who may sign what. It reaches a host only inside a signed policy.
type Trust struct {
	Authorities []Authority
	Timestamps  []Timestamp
	Logs        []pki.LogAnchor // if any: builds, policies and supplements must be in one of them
	Archives    []Archive
}

// Authority is a CA that issues signing certificates.
type Authority struct {
	Name        string
	Signs       []string // "build", "policy", "permit", "supplement"
	Certificate *x509.Certificate
}

// Timestamp is an RFC 3161 authority.
type Timestamp struct {
	Name        string
	Certificate *x509.Certificate
}

// Archive is a package archive in Debian's format.
type Archive struct {
	Name    string
	Keyring []byte   // OpenPGP public keys, ASCII-armoured or binary
	Origins []string // accepted Origin fields of its InRelease files; empty: any
}

// AllowRule authorises content by one kind of indicator.
type AllowRule struct {
	Rule     string  // unique name; stands in verdicts
	Kinds    KindSet // what for; 0: everything that the content was classified as, or that Unclassified says
	Signer   *Signer
	Package  *PackageSet
	Releases []Digest // SHA-256 of signed statements
	SHA256   []Digest // of file contents
	FSVerity []Digest
	DMVerity []Digest // root hashes
	// Until ends the rule (an exception); zero: never. Reason must be given then.
	Until  time.Time
	Reason string
	// Supplement is the supplemental policy that the rule came from, "" for the
	// base policy. Such a rule authorises content but gives no roles.
	Supplement string
}

// ends reports whether r is an exception that is over.
func (r *AllowRule) ends(now time.Time) bool { return !r.Until.IsZero() && !now.Before(r.Until) }

// Unclassified is what a bare digest is authorised for when its rule names no kinds.
const Unclassified = KindSet(1<<KindExec | 1<<KindLibrary | 1<<KindScript)

// Signer is a release by whom and of what.
type Signer struct {
	Authority string // name in Trust.Authorities
	Identity  string // URI of the leaf; "" matches any that the authority certified
	Product   string // "" matches any
	MinEpoch  uint32
}

// PackageSet is packages of an archive.
type PackageSet struct {
	Archive string   // name in Trust.Archives
	Names   []string // binary package names; path.Match patterns
}

// DenyRule refuses content whatever else allows it.
type DenyRule struct {
	Rule         string
	SHA256       []Digest
	Releases     []Digest
	Certificates []Revocation
	Products     []Outdated
	Package      *PackageSet
	Reason       string
}

// Revoked returns every revocation of the policy's deny rules.
func (p *Policy) Revoked() []pki.Revocation {
	var out []pki.Revocation
	for i := range p.Deny {
		for _, c := range p.Deny[i].Certificates {
			out = append(out, pki.Revocation{Fingerprint: c.Certificate, From: c.From})
		}
	}
	return out
}

// Revocation distrusts what was signed from a time on with a certificate, by a
// CA that issued the certificate, or with the timestamp of an authority.
type Revocation struct {
	Certificate Digest    // fingerprint as pki.Fingerprint gives it
	From        time.Time // zero: all of it
}

// Outdated denies releases of a product below an epoch.
type Outdated struct {
	Product    string
	BelowEpoch uint32
}

// Match selects authorised content by the names that its signer gave it, never
// by where it lies on a disk. Every field that is set must match.
type Match struct {
	Files   []string // path.Match patterns over names inside releases and packages, without leading slash
	Package string   // path.Match pattern of the package
	Product string
	SHA256  []Digest
}

// ProgramRule gives roles to the processes of matching programs.
type ProgramRule struct {
	Rule  string
	Match Match
	May   Role
}

// InterpreterRule says which programs are interpreters, and of what.
type InterpreterRule struct {
	Match []Match // any of them
	Interpreter
}

// Knob is a wanted kernel setting. The agent hands it to package host.
type Knob struct {
	Name  string
	Want  string
	Rule  string // exactly, at_least, contains
	Boot  bool
	Apply bool
	Since [2]int
}

// Origin is who vouches for content: a verified release, or a package of a
// verified archive.
type Origin struct {
	// Of a release.
	Release   Digest // SHA-256 of the signed statement
	Authority string
	Identity  string
	// Certificates are the fingerprints of the signing certificate, of its CA
	// and of who signed the timestamp.
	Certificates [3]Digest
	SignedAt     time.Time
	Product      string
	Epoch        uint32
	// NotAfter is when the word of a release that was signed past its gates
	// ends; zero: never.
	NotAfter time.Time
	// Of a package.
	Archive string
	Package string
	// Of both.
	Version string
}

// ended says whether the origin's word counts no more.
func (o *Origin) ended(now time.Time) bool { return !o.NotAfter.IsZero() && !now.Before(o.NotAfter) }

// Membership is one origin's word about one content.
type Membership struct {
	Origin *Origin
	Kinds  KindSet  // what the classifier says it is
	Names  []string // its names there, without leading slash
	// SHA256 is what the origin says that the content's SHA-256 is, where the
	// object is known by another digest only. It can restrict, never allow.
	SHA256 Digest
}

// Object is what is about to be used. Digests that nobody measured are zero.
type Object struct {
	Kind        Kind
	SHA256      Digest
	FSVerity    Digest
	DMVerity    Digest // root of the volume that it lies on
	Memberships []Membership
}

// Indicator is what a verdict rests on.
type Indicator struct {
	Type  string // sha256, fsverity, dmverity, release, signer, package, certificate, product, or "" for the default
	Value string
}

// Verdict is the decision about one object, with the rule and indicator that
// led to it. Refused tells what happens: with Mode audit the object still runs.
type Verdict struct {
	Allow     bool
	Mode      Mode // in force for this kind
	Rule      string
	Indicator Indicator
	Reason    string
	// What a process that executes the object gets; for allowed objects only.
	Roles       Role
	Interpreter string
}
