package integrity

import (
	"slices"
	"strconv"
	"time"
)

// Indicators in order of strength: a verdict names the strongest that holds,
// and among equals the rule whose name sorts first. So the order of rules in
// a policy means nothing.
const (
	bySHA256 = iota
	byFSVerity
	byDMVerity
	byRelease
	bySigner
	byPackage
	byCertificate
	byProduct
	noIndicator
)

var indicatorNames = [...]string{
	"sha256", "fsverity", "dmverity", "release", "signer", "package", "certificate", "product", "",
}

// Evaluate decides whether an object may be used as o.Kind says. It is the
// definition of every decision; Compile and the kernel programs follow it.
//
//  1. A deny rule by SHA-256, release or package denies the content, whatever
//     else lists or allows it.
//  2. A deny rule by certificate or product voids the word of the releases
//     that it names. Content with a void origin is allowed only if another of
//     its origins, not void, is allowed for this kind by the base policy; a bare
//     digest or a supplement is not enough.
//  3. An allow rule by signer, release or package authorises content for what
//     that origin classified it as; a bare digest for what the content is
//     classified as, or Unclassified if no origin knows it. The rule's kinds
//     limit both. A rule with Until counts before that time only.
//  4. Everything else is denied.
//
// A program's own code is mapped as a library is, so authorised as exec means
// authorised as library too. KindBPF asks whether the program may run and has
// RoleBPF.
//
// Roles come from program rules that match by the names of an origin which the
// base policy itself allows as exec, or by SHA-256. What makes a program an
// interpreter is a restriction, so the names of every origin count, void or
// not.
//
// It does not allocate when the policy is prepared, and may be called from
// several goroutines.
func Evaluate(p *Policy, o *Object, now time.Time) Verdict {
	x := p.index()
	v := Verdict{}
	if o.Kind < KindExec || o.Kind > KindBPF {
		v.Mode, v.Reason = ModeEnforce, "denied: not a kind that this version knows"
		return v
	}
	v.Mode = p.Modes[o.Kind]
	if f := x.denied(o); f.by != noIndicator {
		f.fill(&v, x.denyText[f.rule], p.Deny[f.rule].Rule)
		return v
	}
	want, asked := SetOf(o.Kind), o.Kind
	switch o.Kind {
	case KindLibrary:
		want |= SetOf(KindExec)
	case KindBPF:
		want, asked = SetOf(KindExec), KindExec
	}
	got := x.allowed(o, want, now)
	if got.best.by == noIndicator {
		x.refuse(&v, o, asked, got, now)
		return v
	}
	v.Allow = true
	got.best.fill(&v, x.allowText[got.best.rule], p.Allow[got.best.rule].Rule)
	if o.Kind == KindExec || o.Kind == KindBPF {
		v.Roles = x.roles(o, now)
	}
	if o.Kind == KindExec || o.Kind == KindBPF || o.Kind == KindLibrary { // libpython makes an interpreter, too
		v.Interpreter = x.interpreter(o)
	}
	if o.Kind == KindBPF && v.Roles&RoleBPF == 0 {
		return Verdict{Mode: v.Mode, Reason: "may run, but no program rule lets it load BPF programs"}
	}
	return v
}

// found is a rule that holds, and by what.
type found struct {
	by    int
	rule  int32
	value string
	text  string // reason, where the rule alone does not say it
}

func (f *found) fill(v *Verdict, text, rule string) {
	if f.text != "" {
		text = f.text
	}
	v.Rule, v.Reason = rule, text
	v.Indicator = Indicator{Type: indicatorNames[f.by], Value: f.value}
}

// betterAllow reports whether a rule is to be named rather than f.
func (x *index) betterAllow(f *found, by int, rule int32) bool {
	if by != f.by {
		return by < f.by
	}
	a, b := x.p.Allow[rule].Rule, x.p.Allow[f.rule].Rule
	return a < b || a == b && rule < f.rule
}

func (x *index) betterDeny(f *found, by int, rule int32) bool {
	if by != f.by {
		return by < f.by
	}
	a, b := x.p.Deny[rule].Rule, x.p.Deny[f.rule].Rule
	return a < b || a == b && rule < f.rule
}

// denied finds a deny rule that is absolute.
func (x *index) denied(o *Object) found {
	f := found{by: noIndicator}
	x.deniedDigest(&f, bySHA256, x.denySHA256, o.SHA256)
	for i := range o.Memberships {
		g := o.Memberships[i].Origin
		x.deniedDigest(&f, bySHA256, x.denySHA256, o.Memberships[i].SHA256)
		x.deniedDigest(&f, byRelease, x.denyRelease, g.Release)
		if g.Package == "" {
			continue
		}
		for _, r := range x.denyPackages.exact[[2]string{g.Archive, g.Package}] {
			if x.betterDeny(&f, byPackage, r) {
				f = found{by: byPackage, rule: r, value: g.Package}
			}
		}
		for _, p := range x.denyPackages.patterns[g.Archive] {
			if x.betterDeny(&f, byPackage, p.n) && globs(p.text, g.Package) {
				f = found{by: byPackage, rule: p.n, value: g.Package}
			}
		}
	}
	return f
}

func (x *index) deniedDigest(f *found, by int, in map[Digest]ruleList, d Digest) {
	if d.IsZero() {
		return
	}
	l := in[d]
	for _, r := range l.rules {
		if x.betterDeny(f, by, r) {
			*f = found{by: by, rule: r, value: l.hex}
		}
	}
}

// void finds the deny rule that takes away an origin's word.
func (x *index) void(g *Origin) found {
	f := found{by: noIndicator}
	for _, c := range g.Certificates {
		if c.IsZero() {
			continue
		}
		for i := range x.revoked[c] {
			r := &x.revoked[c][i]
			if (r.from.IsZero() || !g.SignedAt.Before(r.from)) && x.betterDeny(&f, byCertificate, r.rule) {
				f = found{by: byCertificate, rule: r.rule, value: r.hex, text: r.text}
			}
		}
	}
	if g.Product != "" {
		for i := range x.outdated[g.Product] {
			r := &x.outdated[g.Product][i]
			if g.Epoch < r.below && x.betterDeny(&f, byProduct, r.rule) {
				f = found{by: byProduct, rule: r.rule, value: g.Product, text: r.text}
			}
		}
	}
	return f
}

// grant is what the allow rules say of an object.
type grant struct {
	best  found   // why it may be used as was asked; noIndicator: it may not
	void  found   // why an origin's word does not count
	other found   // why it may be used as something else
	kinds KindSet // which
	ended found   // an exception that would have allowed it
	base  bool    // a rule of the base policy allows one of its origins
}

func (x *index) allowed(o *Object, want KindSet, now time.Time) grant {
	none := found{by: noIndicator}
	g := grant{best: none, void: none, other: none, ended: none}
	var classified KindSet
	for i := range o.Memberships {
		m := &o.Memberships[i]
		classified |= m.Kinds
		if v := x.void(m.Origin); v.by != noIndicator {
			if g.void.by == noIndicator || x.betterDeny(&g.void, v.by, v.rule) {
				g.void = v
			}
			continue
		}
		x.allowedOrigin(m, want, now, &g)
	}
	if g.void.by != noIndicator && !g.base {
		g.best = none
		return g
	}
	if classified == 0 {
		classified = Unclassified
	}
	if !o.SHA256.IsZero() {
		x.allowedDigest(x.sha256[o.SHA256], bySHA256, classified, want, now, &g)
	}
	if !o.FSVerity.IsZero() {
		x.allowedDigest(x.fsverity[o.FSVerity], byFSVerity, classified, want, now, &g)
	}
	if !o.DMVerity.IsZero() {
		x.allowedDigest(x.dmverity[o.DMVerity], byDMVerity, Unclassified, want, now, &g)
	}
	return g
}

// consider weighs a rule that names the content, for the kinds that it could
// authorise.
func (x *index) consider(g *grant, by int, rule int32, value string, kinds, want KindSet, now time.Time) {
	r := &x.p.Allow[rule]
	if r.Kinds != 0 {
		kinds &= r.Kinds
	}
	to := &g.other
	switch {
	case r.ends(now):
		if kinds&want == 0 {
			return
		}
		to = &g.ended
	case kinds&want != 0:
		to = &g.best
		g.base = g.base || r.Supplement == ""
	case kinds == 0:
		return
	default:
		g.kinds |= kinds
	}
	if x.betterAllow(to, by, rule) {
		*to = found{by: by, rule: rule, value: value}
	}
}

func (x *index) allowedDigest(l ruleList, by int, classified, want KindSet, now time.Time, g *grant) {
	for _, r := range l.rules {
		kinds := classified
		if k := x.p.Allow[r].Kinds; k != 0 {
			kinds = k // a bare digest is what the rule says that it is
		}
		x.consider(g, by, r, l.hex, kinds, want, now)
	}
}

func (x *index) allowedOrigin(m *Membership, want KindSet, now time.Time, g *grant) {
	o := m.Origin
	if o.ended(now) {
		return
	}
	if !o.Release.IsZero() {
		l := x.release[o.Release]
		for _, r := range l.rules {
			x.consider(g, byRelease, r, l.hex, m.Kinds, want, now)
		}
		for _, r := range x.signers[o.Authority] {
			if x.p.Allow[r].Signer.covers(o) {
				x.consider(g, bySigner, r, x.allowValue[r], m.Kinds, want, now)
			}
		}
	}
	if o.Package == "" {
		return
	}
	for _, r := range x.packages.exact[[2]string{o.Archive, o.Package}] {
		x.consider(g, byPackage, r, o.Package, m.Kinds, want, now)
	}
	for _, p := range x.packages.patterns[o.Archive] {
		if globs(p.text, o.Package) {
			x.consider(g, byPackage, p.n, o.Package, m.Kinds, want, now)
		}
	}
}

// covers says whether a release is one that the rule means; the authority has
// been compared.
func (s *Signer) covers(o *Origin) bool {
	return (s.Identity == "" || s.Identity == o.Identity) && (s.Product == "" || s.Product == o.Product) && o.Epoch >= s.MinEpoch
}

// refuse fills in why no rule allows the object.
func (x *index) refuse(v *Verdict, o *Object, asked Kind, g grant, now time.Time) {
	switch {
	case g.void.by != noIndicator:
		g.void.fill(v, "", x.p.Deny[g.void.rule].Rule)
	case g.ended.by != noIndicator:
		r := &x.p.Allow[g.ended.rule]
		g.ended.fill(v, "denied: exception "+r.Rule+" ended "+r.Until.UTC().Format(time.RFC3339), r.Rule)
	case g.other.by != noIndicator:
		g.other.fill(v, "authorised as "+g.kinds.String()+", not as "+asked.String(), x.p.Allow[g.other.rule].Rule)
	case len(o.Memberships) > 0:
		v.Reason = x.unwanted(o, asked, now)
	default:
		v.Reason = "no rule authorises it, and no verified release or package lists it"
	}
}

// unwanted says why verified origins do not help.
func (x *index) unwanted(o *Object, asked Kind, now time.Time) string {
	for i := range o.Memberships {
		m := &o.Memberships[i]
		if m.Origin.ended(now) {
			return "break-glass release " + m.Origin.Product + " " + m.Origin.Version + " ended " + m.Origin.NotAfter.UTC().Format(time.RFC3339)
		}
		as := *m
		as.Kinds = ^KindSet(0)
		g := grant{best: found{by: noIndicator}, other: found{by: noIndicator}, ended: found{by: noIndicator}}
		x.allowedOrigin(&as, SetOf(asked), now, &g)
		if g.best.by != noIndicator {
			return "its origin is authorised, but lists it as " + m.Kinds.String() + ", not as " + asked.String()
		}
		for _, r := range x.signers[m.Origin.Authority] {
			s := *x.p.Allow[r].Signer
			s.MinEpoch = 0
			if s.covers(m.Origin) && m.Origin.Epoch < x.p.Allow[r].Signer.MinEpoch {
				return "no rule authorises it: it is of " + m.Origin.Product + " epoch " + strconv.FormatUint(uint64(m.Origin.Epoch), 10) +
					", and rules ask for a later one"
			}
		}
	}
	g := o.Memberships[0].Origin
	if g.Package != "" {
		return "no rule authorises it; package " + g.Package + " of archive " + g.Archive + " lists it"
	}
	return "no rule authorises it; a release of " + g.Product + ", signed by " + g.Identity + ", lists it"
}

// String names the kinds, joined by commas; "data" for none.
func (s KindSet) String() string {
	out := ""
	for _, k := range Kinds() {
		if s.Has(k) {
			if out != "" {
				out += ", "
			}
			out += k.String()
		}
	}
	if out == "" {
		return "data"
	}
	return out
}

// roles collects what the program rules give to an object that may run.
func (x *index) roles(o *Object, now time.Time) Role {
	if len(x.matches) == 0 {
		return 0
	}
	var out Role
	if !o.SHA256.IsZero() {
		for _, n := range x.digests[o.SHA256] {
			if m := &x.matches[n]; m.bySHA256 && m.program >= 0 {
				out |= x.p.Programs[m.program].May
			}
		}
	}
	for i := range o.Memberships {
		m := &o.Memberships[i]
		var may Role
		x.eachMatch(o, m, func(t *match) {
			if t.program >= 0 {
				may |= x.p.Programs[t.program].May
			}
		})
		if may&^out != 0 && x.vouches(m, now) {
			out |= may
		}
	}
	return out
}

// vouches says whether the base policy itself lets this origin authorise
// programs.
func (x *index) vouches(m *Membership, now time.Time) bool {
	if !m.Kinds.Has(KindExec) || x.void(m.Origin).by != noIndicator {
		return false
	}
	holds := func(r int32) bool {
		a := &x.p.Allow[r]
		return a.Supplement == "" && (a.Kinds == 0 || a.Kinds.Has(KindExec)) && !a.ends(now)
	}
	o := m.Origin
	if !o.Release.IsZero() {
		if slices.ContainsFunc(x.release[o.Release].rules, holds) {
			return true
		}
		for _, r := range x.signers[o.Authority] {
			if holds(r) && x.p.Allow[r].Signer.covers(o) {
				return true
			}
		}
	}
	if o.Package == "" {
		return false
	}
	if slices.ContainsFunc(x.packages.exact[[2]string{o.Archive, o.Package}], holds) {
		return true
	}
	for _, p := range x.packages.patterns[o.Archive] {
		if holds(p.n) && globs(p.text, o.Package) {
			return true
		}
	}
	return false
}

// interpreter returns the name of the rule that makes the object one: a match
// by SHA-256 before any other, then the name that sorts first.
func (x *index) interpreter(o *Object) string {
	if len(x.matches) == 0 {
		return ""
	}
	best, exact := "", false
	weigh := func(t *match) {
		if t.interpreter < 0 {
			return
		}
		name, is := x.p.Interpreters[t.interpreter].Name, len(t.SHA256) > 0
		if best == "" || is && !exact || is == exact && name < best {
			best, exact = name, is
		}
	}
	exactly := func(d Digest) {
		if d.IsZero() {
			return
		}
		for _, n := range x.digests[d] {
			if m := &x.matches[n]; m.bySHA256 {
				weigh(m)
			}
		}
	}
	exactly(o.SHA256)
	for i := range o.Memberships {
		exactly(o.Memberships[i].SHA256)
		x.eachMatch(o, &o.Memberships[i], weigh)
	}
	return best
}

// eachMatch visits the matches that hold for one membership, some perhaps twice.
func (x *index) eachMatch(o *Object, m *Membership, visit func(*match)) {
	try := func(n int32) {
		t := &x.matches[n]
		if (t.Package == "" || m.Origin.Package != "" && globs(t.Package, m.Origin.Package)) &&
			(t.Product == "" || t.Product == m.Origin.Product) && (len(t.SHA256) == 0 || x.lists(o.SHA256, n) || t.interpreter >= 0 && x.lists(m.SHA256, n)) {
			visit(t)
		}
	}
	for _, n := range x.loose {
		try(n)
	}
	for _, name := range m.Names {
		x.names.each(name, try)
	}
}

func (x *index) lists(d Digest, n int32) bool {
	return !d.IsZero() && slices.Contains(x.digests[d], n)
}
