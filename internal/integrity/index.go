package integrity

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
)

// index is a policy laid out for look-up. It is derived and never changes.
type index struct {
	p *Policy

	sha256, fsverity, dmverity, release map[Digest]ruleList
	signers                             map[string][]int32 // by authority
	packages                            packageIndex
	allowText                           []string // reasons, by rule
	allowValue                          []string // what a signer rule matched, by rule

	denySHA256, denyRelease map[Digest]ruleList
	denyPackages            packageIndex
	denyText                []string
	revoked                 map[Digest][]revoked
	outdated                map[string][]outdated

	matches []match
	names   nameIndex
	loose   []int32 // matches that name no files
	digests map[Digest][]int32
}

// ruleList is the numbers of rules that name a digest, and the digest in hex.
type ruleList struct {
	rules []int32
	hex   string
}

type revoked struct {
	from time.Time
	rule int32
	text string
	hex  string
}

type outdated struct {
	below uint32
	rule  int32
	text  string
}

// match is one Match of a program or interpreter rule.
type match struct {
	Match
	program, interpreter int32 // number of the rule; the other is -1
	bySHA256             bool  // needs no membership
}

// Prepare lays the policy out for Evaluate and Compile. ParsePolicy and Join
// do this; call it once for a Policy made by hand, before it is shared.
// Without it every Evaluate lays it out again.
func (p *Policy) Prepare() { p.ix = newIndex(p) }

func (p *Policy) index() *index {
	if p.ix != nil {
		return p.ix
	}
	return newIndex(p)
}

func newIndex(p *Policy) *index {
	x := &index{
		p:      p,
		sha256: map[Digest]ruleList{}, fsverity: map[Digest]ruleList{}, dmverity: map[Digest]ruleList{}, release: map[Digest]ruleList{},
		signers: map[string][]int32{}, packages: newPackageIndex(),
		denySHA256: map[Digest]ruleList{}, denyRelease: map[Digest]ruleList{}, denyPackages: newPackageIndex(),
		revoked: map[Digest][]revoked{}, outdated: map[string][]outdated{},
		names: newNameIndex(), digests: map[Digest][]int32{},
	}
	for i := range p.Allow {
		x.addAllow(int32(i), &p.Allow[i])
	}
	for i := range p.Deny {
		x.addDeny(int32(i), &p.Deny[i])
	}
	for i := range p.Programs {
		x.addMatch(match{Match: p.Programs[i].Match, program: int32(i), interpreter: -1})
	}
	for i := range p.Interpreters {
		for _, m := range p.Interpreters[i].Match {
			x.addMatch(match{Match: m, program: -1, interpreter: int32(i)})
		}
	}
	return x
}

func addDigests(m map[Digest]ruleList, ds []Digest, i int32) {
	for _, d := range ds {
		l := m[d]
		if l.rules == nil {
			l.hex = d.String()
		}
		if !slices.Contains(l.rules, i) {
			l.rules = append(l.rules, i)
		}
		m[d] = l
	}
}

func (x *index) addAllow(i int32, r *AllowRule) {
	addDigests(x.sha256, r.SHA256, i)
	addDigests(x.fsverity, r.FSVerity, i)
	addDigests(x.dmverity, r.DMVerity, i)
	addDigests(x.release, r.Releases, i)
	text, value := "authorised by rule "+r.Rule, ""
	if r.Supplement != "" {
		text += " of supplement " + r.Supplement
	}
	if !r.Until.IsZero() {
		text += " until " + r.Until.UTC().Format(time.RFC3339)
	}
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	if s := r.Signer; s != nil {
		x.signers[s.Authority] = append(x.signers[s.Authority], i)
		value = s.String()
	}
	if r.Package != nil {
		x.packages.add(r.Package, i)
	}
	x.allowText, x.allowValue = append(x.allowText, text), append(x.allowValue, value)
}

// String names the signer for people.
func (s *Signer) String() string {
	parts := []string{s.Authority}
	if s.Identity != "" {
		parts = append(parts, s.Identity)
	}
	if s.Product != "" {
		parts = append(parts, "product "+s.Product)
	}
	if s.MinEpoch > 0 {
		parts = append(parts, fmt.Sprintf("epoch %d or later", s.MinEpoch))
	}
	return strings.Join(parts, ", ")
}

func (x *index) addDeny(i int32, r *DenyRule) {
	addDigests(x.denySHA256, r.SHA256, i)
	addDigests(x.denyRelease, r.Releases, i)
	if r.Package != nil {
		x.denyPackages.add(r.Package, i)
	}
	why := ""
	if r.Reason != "" {
		why = ": " + r.Reason
	}
	x.denyText = append(x.denyText, "denied by rule "+r.Rule+why)
	for _, c := range r.Certificates {
		text := "revoked: a certificate behind its signature is not trusted"
		if !c.From.IsZero() {
			text += " for signatures from " + c.From.UTC().Format(time.RFC3339) + " on"
		}
		x.revoked[c.Certificate] = append(x.revoked[c.Certificate], revoked{from: c.From, rule: i, text: text + why, hex: c.Certificate.String()})
	}
	for _, o := range r.Products {
		text := fmt.Sprintf("outdated: releases of %s below epoch %d are denied%s", o.Product, o.BelowEpoch, why)
		x.outdated[o.Product] = append(x.outdated[o.Product], outdated{below: o.BelowEpoch, rule: i, text: text})
	}
}

func (x *index) addMatch(m match) {
	n := int32(len(x.matches)) //nolint:gosec // a policy is bounded
	empty := len(m.Files) == 0 && m.Package == "" && m.Product == ""
	if empty && len(m.SHA256) == 0 {
		return // says nothing, matches nothing
	}
	m.bySHA256 = empty
	x.matches = append(x.matches, m)
	for _, d := range m.SHA256 {
		if !slices.Contains(x.digests[d], n) {
			x.digests[d] = append(x.digests[d], n)
		}
	}
	switch {
	case empty:
	case len(m.Files) == 0:
		x.loose = append(x.loose, n)
	default:
		for _, f := range m.Files {
			x.names.add(f, n)
		}
	}
}

// particular says whether the content's own digests stand in the policy, so
// that its verdict is not that of its origins alone.
func (x *index) particular(sha256, verity Digest) bool {
	if _, ok := x.sha256[sha256]; ok {
		return true
	}
	if _, ok := x.denySHA256[sha256]; ok {
		return true
	}
	if _, ok := x.digests[sha256]; ok {
		return true
	}
	_, ok := x.fsverity[verity]
	return ok && !verity.IsZero()
}

// packageIndex finds the rules that name a package.
type packageIndex struct {
	exact    map[[2]string][]int32 // archive, package
	patterns map[string][]pattern  // by archive
}

type pattern struct {
	text string
	n    int32
}

func newPackageIndex() packageIndex {
	return packageIndex{exact: map[[2]string][]int32{}, patterns: map[string][]pattern{}}
}

func (x *packageIndex) add(s *PackageSet, i int32) {
	for _, n := range s.Names {
		if strings.ContainsAny(n, `*?[\`) {
			x.patterns[s.Archive] = append(x.patterns[s.Archive], pattern{n, i})
		} else {
			k := [2]string{s.Archive, n}
			x.exact[k] = append(x.exact[k], i)
		}
	}
}

// nameIndex finds the matches that name a file. Most patterns have their stars
// in the last part of the path, and path.Match's stars match no slash: those
// are found by directory.
type nameIndex struct {
	exact map[string][]int32
	byDir map[string][]pattern
	rest  []pattern
}

func newNameIndex() nameIndex {
	return nameIndex{exact: map[string][]int32{}, byDir: map[string][]pattern{}}
}

func (x *nameIndex) add(text string, n int32) {
	dir := path.Dir(text)
	switch {
	case !strings.ContainsAny(text, `*?[\`):
		x.exact[text] = append(x.exact[text], n)
	case !strings.ContainsAny(dir, `*?[\`) && path.Clean(text) == text:
		x.byDir[dir] = append(x.byDir[dir], pattern{text, n})
	default:
		x.rest = append(x.rest, pattern{text, n})
	}
}

// each calls visit with every match that names the file, some perhaps twice.
func (x *nameIndex) each(name string, visit func(int32)) {
	for _, n := range x.exact[name] {
		visit(n)
	}
	for _, list := range [2][]pattern{x.byDir[path.Dir(name)], x.rest} {
		for _, p := range list {
			if globs(p.text, name) {
				visit(p.n)
			}
		}
	}
}

// globs is path.Match; a malformed pattern, which ParsePolicy refuses, matches
// nothing.
func globs(text, name string) bool {
	ok, err := path.Match(text, name)
	return ok && err == nil
}
