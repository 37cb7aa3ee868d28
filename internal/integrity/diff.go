package integrity

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"ringwall/internal/pki"
)

// Effect is what a change does to what may run.
type Effect string

// The effects, in the order of a report.
const (
	Looser   Effect = "looser"   // allows something, or sees less
	Stricter Effect = "stricter" // refuses something, or sees more
	Changed  Effect = "changed"  // either, or neither: needs a look
)

// Change is one difference between two policies.
type Change struct {
	Effect Effect `json:"effect"`
	Where  string `json:"where"` // as in "allow edged" or "modes script"
	Text   string `json:"text"`  // for people
}

// Diff says what is different in b, the looser things first. Both must be
// parsed or joined policies. The list is empty if they decide alike; names of
// documents, comments and the order of rules make no difference. Whether
// looser and stricter rules make up for each other it does not judge:
// simulate for that.
func Diff(a, b *Policy) []Change {
	d := &differ{}
	if a.Name != b.Name {
		d.add(Changed, "name", "is "+b.Name+", was "+a.Name)
	}
	if b.Epoch < a.Epoch {
		d.add(Changed, "epoch", fmt.Sprintf("goes back from %d to %d: hosts will refuse it", a.Epoch, b.Epoch))
	}
	d.modes(a, b)
	d.trust(&a.Trust, &b.Trust)
	named(a.Allow, b.Allow, func(r *AllowRule) string { return r.Rule }, d.allow)
	named(a.Deny, b.Deny, func(r *DenyRule) string { return r.Rule }, d.deny)
	named(a.Programs, b.Programs, func(r *ProgramRule) string { return r.Rule }, d.program)
	named(a.Interpreters, b.Interpreters, func(r *InterpreterRule) string { return r.Name }, d.interpreter)
	named(a.Knobs, b.Knobs, func(k *Knob) string { return k.Name }, d.knob)
	order := []Effect{Looser, Stricter, Changed}
	slices.SortFunc(d.out, func(x, y Change) int {
		return cmp.Or(slices.Index(order, x.Effect)-slices.Index(order, y.Effect), cmp.Compare(x.Where, y.Where), cmp.Compare(x.Text, y.Text))
	})
	return d.out
}

type differ struct{ out []Change }

func (d *differ) add(e Effect, where, text string) {
	d.out = append(d.out, Change{Effect: e, Where: where, Text: text})
}

// named pairs the entries of two lists by name; a missing one is nil.
func named[T any](a, b []T, name func(*T) string, visit func(name string, a, b *T)) {
	pairs := map[string][2]*T{}
	for i := range a {
		n := name(&a[i])
		pairs[n] = [2]*T{&a[i], pairs[n][1]}
	}
	for i := range b {
		n := name(&b[i])
		pairs[n] = [2]*T{pairs[n][0], &b[i]}
	}
	for _, n := range slices.Sorted(maps.Keys(pairs)) {
		visit(n, pairs[n][0], pairs[n][1])
	}
}

func (d *differ) mode(where string, a, b Mode) {
	switch {
	case a < b:
		d.add(Stricter, where, a.String()+" becomes "+b.String())
	case a > b:
		d.add(Looser, where, a.String()+" becomes "+b.String())
	}
}

func (d *differ) modes(a, b *Policy) {
	for _, k := range Kinds() {
		d.mode("modes "+k.String(), a.Modes[k], b.Modes[k])
	}
	pa, pb := a.Process, b.Process
	ma, mb := pa.modes(), pb.modes()
	for key := range ma {
		d.mode("modes "+key, *ma[key], *mb[key])
	}
}

// set compares two sets of texts: more is what it means that b has more.
func (d *differ) set(where, what string, a, b []string, more Effect) {
	less := Stricter
	switch more {
	case Stricter:
		less = Looser
	case Changed:
		less = Changed
	}
	only := func(x, y []string) []string {
		out := slices.DeleteFunc(slices.Clone(x), func(s string) bool { return slices.Contains(y, s) })
		slices.Sort(out)
		return slices.Compact(out)
	}
	if added := only(b, a); len(added) > 0 {
		d.add(more, where, "adds "+what+" "+enumerate(added))
	}
	if gone := only(a, b); len(gone) > 0 {
		d.add(less, where, "drops "+what+" "+enumerate(gone))
	}
}

// enumerate lists texts, the first few of many.
func enumerate(s []string) string {
	const some = 8
	if len(s) <= some {
		return strings.Join(s, ", ")
	}
	return strings.Join(s[:some], ", ") + fmt.Sprintf(" and %d more", len(s)-some)
}

func texts[T fmt.Stringer](ds []T) []string {
	out := make([]string, len(ds))
	for i := range ds {
		out[i] = ds[i].String()
	}
	return out
}

func (d *differ) trust(a, b *Trust) {
	named(a.Authorities, b.Authorities, func(x *Authority) string { return x.Name }, func(n string, a, b *Authority) {
		where := "trust authority " + n
		switch {
		case a == nil:
			d.add(Looser, where, "is trusted for "+strings.Join(b.Signs, ", "))
		case b == nil:
			d.add(Stricter, where, "is not trusted any more")
		default:
			d.set(where, "signing of", a.Signs, b.Signs, Looser)
			if !a.Certificate.Equal(b.Certificate) {
				d.add(Changed, where, "has another certificate")
			}
		}
	})
	named(a.Timestamps, b.Timestamps, func(x *Timestamp) string { return x.Name }, func(n string, a, b *Timestamp) {
		where := "trust timestamp " + n
		switch {
		case a == nil:
			d.add(Looser, where, "is trusted")
		case b == nil:
			d.add(Stricter, where, "is not trusted any more")
		case !a.Certificate.Equal(b.Certificate):
			d.add(Changed, where, "has another certificate")
		}
	})
	// One more log is one more place that a signature may be in, but the first is a demand.
	firstLog, lastLog := len(a.Logs) == 0, len(b.Logs) == 0
	named(a.Logs, b.Logs, func(x *pki.LogAnchor) string { return x.Name }, func(n string, a, b *pki.LogAnchor) {
		where := "trust log " + n
		switch {
		case a == nil && firstLog:
			d.add(Stricter, where, "is required of what is signed")
		case a == nil:
			d.add(Looser, where, "is trusted")
		case b == nil && lastLog:
			d.add(Looser, where, "is not required any more: what is signed need be in no log")
		case b == nil:
			d.add(Stricter, where, "is not trusted any more")
		case a.String() != b.String():
			d.add(Changed, where, "has another key")
		}
	})
	named(a.Archives, b.Archives, func(x *Archive) string { return x.Name }, func(n string, a, b *Archive) {
		where := "trust archive " + n
		switch {
		case a == nil:
			d.add(Looser, where, "is trusted")
		case b == nil:
			d.add(Stricter, where, "is not trusted any more")
		default:
			if string(a.Keyring) != string(b.Keyring) {
				d.add(Changed, where, "has another keyring")
			}
			d.narrowed(where, "origins", a.Origins, b.Origins)
		}
	})
}

// narrowed compares sets where none means any.
func (d *differ) narrowed(where, what string, a, b []string) {
	switch {
	case len(a) == 0 && len(b) == 0:
	case len(a) == 0:
		d.add(Stricter, where, "is limited to "+what+" "+enumerate(b))
	case len(b) == 0:
		d.add(Looser, where, "is not limited to "+what+" "+enumerate(a)+" any more")
	default:
		d.set(where, what, a, b, Looser)
	}
}

func kindNamesOf(s KindSet) []string {
	var out []string
	for _, k := range Kinds() {
		if s.Has(k) {
			out = append(out, k.String())
		}
	}
	return out
}

// describe says in words what a rule is about.
func (r *AllowRule) describe() string {
	var out []string
	count := func(n int, what string) {
		if n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, what))
		}
	}
	if r.Signer != nil {
		out = append(out, "releases signed by "+r.Signer.String())
	}
	if r.Package != nil {
		out = append(out, "packages "+enumerate(r.Package.Names)+" of archive "+r.Package.Archive)
	}
	count(len(r.Releases), "releases")
	count(len(r.SHA256), "files by SHA-256")
	count(len(r.FSVerity), "files by fs-verity digest")
	count(len(r.DMVerity), "dm-verity volumes")
	s := strings.Join(out, ", ")
	if r.Kinds != 0 {
		s += " as " + r.Kinds.String()
	}
	if !r.Until.IsZero() {
		s += " until " + r.Until.UTC().Format(time.RFC3339)
	}
	return s
}

func (d *differ) allow(name string, a, b *AllowRule) {
	where := "allow " + name
	switch {
	case a == nil:
		d.add(Looser, where, "new: "+b.describe())
		return
	case b == nil:
		d.add(Stricter, where, "gone: "+a.describe())
		return
	}
	d.signer(where, a.Signer, b.Signer)
	d.packages(where, a.Package, b.Package, Looser)
	d.set(where, "release", texts(a.Releases), texts(b.Releases), Looser)
	d.set(where, "sha256", texts(a.SHA256), texts(b.SHA256), Looser)
	d.set(where, "fsverity", texts(a.FSVerity), texts(b.FSVerity), Looser)
	d.set(where, "dmverity", texts(a.DMVerity), texts(b.DMVerity), Looser)
	if (a.Kinds == 0) != (b.Kinds == 0) && len(a.SHA256)+len(a.FSVerity)+len(a.DMVerity) > 0 {
		// without kinds a digest is what it was classified as: neither set holds the other
		d.add(Changed, where, "is for "+kindsText(b.Kinds)+", was for "+kindsText(a.Kinds))
	} else {
		d.narrowed(where, "kinds", kindNamesOf(a.Kinds), kindNamesOf(b.Kinds))
	}
	if !a.Until.Equal(b.Until) {
		e := Looser
		if a.Until.IsZero() || !b.Until.IsZero() && b.Until.Before(a.Until) {
			e = Stricter
		}
		d.add(e, where, "ends "+endText(b.Until)+", was to end "+endText(a.Until))
	}
	if a.Supplement != b.Supplement {
		e := Looser
		if b.Supplement != "" {
			e = Stricter
		}
		d.add(e, where, "comes from another policy: rules of a supplement give no roles")
	}
}

func kindsText(s KindSet) string {
	if s == 0 {
		return "what the content is"
	}
	return s.String()
}

func endText(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}

func (d *differ) signer(where string, a, b *Signer) {
	switch {
	case a == nil && b == nil:
		return
	case a == nil:
		d.add(Looser, where, "adds releases signed by "+b.String())
		return
	case b == nil:
		d.add(Stricter, where, "drops releases signed by "+a.String())
		return
	}
	if a.Authority != b.Authority {
		d.add(Changed, where, "authority is "+b.Authority+", was "+a.Authority)
	}
	one := func(s string) []string {
		if s == "" {
			return nil
		}
		return []string{s}
	}
	d.narrowed(where, "identity", one(a.Identity), one(b.Identity))
	d.narrowed(where, "product", one(a.Product), one(b.Product))
	if a.MinEpoch != b.MinEpoch {
		e := Stricter
		if b.MinEpoch < a.MinEpoch {
			e = Looser
		}
		d.add(e, where, fmt.Sprintf("asks for epoch %d, was %d", b.MinEpoch, a.MinEpoch))
	}
}

func (d *differ) packages(where string, a, b *PackageSet, more Effect) {
	list := func(s *PackageSet) []string {
		if s == nil {
			return nil
		}
		out := make([]string, len(s.Names))
		for i, n := range s.Names {
			out[i] = s.Archive + ":" + n
		}
		return out
	}
	d.set(where, "packages", list(a), list(b), more)
}

func (d *differ) deny(name string, a, b *DenyRule) {
	where := "deny " + name
	if a == nil {
		a = &DenyRule{}
		d.add(Stricter, where, "new")
	}
	if b == nil {
		b = &DenyRule{}
		d.add(Looser, where, "gone")
	}
	d.set(where, "sha256", texts(a.SHA256), texts(b.SHA256), Stricter)
	d.set(where, "release", texts(a.Releases), texts(b.Releases), Stricter)
	d.packages(where, a.Package, b.Package, Stricter)
	d.set(where, "certificate", certificates(a), certificates(b), Stricter)
	d.products(where, products(a), products(b))
}

func (d *differ) products(where string, a, b map[string]uint32) {
	names := map[string]bool{}
	for n := range a {
		names[n] = true
	}
	for n := range b {
		names[n] = true
	}
	for n := range names {
		switch {
		case a[n] < b[n]:
			d.add(Stricter, where, fmt.Sprintf("product %s must be of epoch %d or later, was %d", n, b[n], a[n]))
		case a[n] > b[n]:
			d.add(Looser, where, fmt.Sprintf("product %s may be of epoch %d or later, was %d", n, b[n], a[n]))
		}
	}
}

func certificates(r *DenyRule) []string {
	out := make([]string, len(r.Certificates))
	for i, c := range r.Certificates {
		out[i] = c.Certificate.String()
		if !c.From.IsZero() {
			out[i] += " from " + c.From.UTC().Format(time.RFC3339)
		}
	}
	return out
}

// products returns the epoch that a rule asks for, by product.
func products(r *DenyRule) map[string]uint32 {
	out := map[string]uint32{}
	for _, p := range r.Products {
		out[p.Product] = max(out[p.Product], p.BelowEpoch)
	}
	return out
}
