package integrity_test

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/integrity"
)

// dice makes random policies and hosts out of bytes, so that the property
// tests and the fuzzers share one generator. Its world is small: things meet.
type dice struct {
	b []byte
	i int
}

func (d *dice) n(n int) int {
	if d.i >= len(d.b) {
		d.i++
		return 0
	}
	v := int(d.b[d.i]) % n
	d.i++
	return v
}

func (d *dice) one(of ...string) string { return of[d.n(len(of))] }
func (d *dice) maybe() bool             { return d.n(3) == 0 }

func digest(i int) integrity.Digest { return integrity.Digest{byte(i + 1)} }

const digestCount = 6

func (d *dice) digest() integrity.Digest { return digest(d.n(digestCount)) }

func (d *dice) kinds() integrity.KindSet {
	var s integrity.KindSet
	if d.maybe() {
		return s
	}
	if !d.maybe() {
		s = integrity.SetOf(integrity.KindExec)
	}
	for range d.n(3) {
		s |= integrity.SetOf(integrity.Kind(1 + d.n(6)))
	}
	return s
}

// noon is the present of every generated world.
func noon() time.Time { return time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC) }

func (d *dice) time() time.Time { return noon().Add(time.Duration(d.n(3)-1) * time.Hour) }

func (d *dice) packageSet() *integrity.PackageSet {
	return &integrity.PackageSet{Archive: d.one("debian", "own"), Names: []string{d.one("*", "*", "node*", "python3", "[")}}
}

func (d *dice) allow(name string) integrity.AllowRule {
	r := integrity.AllowRule{Rule: name, Kinds: d.kinds()}
	switch d.n(6) {
	case 0:
		r.Signer = &integrity.Signer{Authority: d.one("ca1", "ca2")}
		if d.maybe() {
			r.Signer.Identity = d.one("spiffe://x/a", "spiffe://x/b")
		}
		if d.maybe() {
			r.Signer.Product, r.Signer.MinEpoch = d.one("edged", "web"), uint32(d.n(4))
		}
	case 1:
		r.Package = d.packageSet()
	case 2:
		r.Releases = []integrity.Digest{d.digest()}
	case 3:
		r.SHA256 = []integrity.Digest{d.digest(), d.digest()}
	case 4:
		r.FSVerity = []integrity.Digest{d.digest()}
	case 5:
		r.DMVerity = []integrity.Digest{d.digest()}
	}
	if d.maybe() {
		r.Until, r.Reason = d.time(), "for now"
	}
	return r
}

func (d *dice) deny(name string) integrity.DenyRule {
	r := integrity.DenyRule{Rule: name, Reason: d.one("", "leaked")}
	switch d.n(5) {
	case 0:
		r.SHA256 = []integrity.Digest{d.digest()}
	case 1:
		r.Releases = []integrity.Digest{d.digest()}
	case 2:
		v := integrity.Revocation{Certificate: d.digest()}
		if d.maybe() {
			v.From = d.time()
		}
		r.Certificates = []integrity.Revocation{v}
	case 3:
		r.Products = []integrity.Outdated{{Product: d.one("edged", "web"), BelowEpoch: uint32(d.n(4))}}
	case 4:
		r.Package = d.packageSet()
	}
	return r
}

func (d *dice) match() integrity.Match {
	var m integrity.Match
	if d.n(6) == 0 {
		m.SHA256 = []integrity.Digest{d.digest()}
	}
	if !d.maybe() {
		m.Files = []string{d.one("usr/bin/node", "usr/bin/*", "*/bin/python3*", "usr/bin/*", "usr/bin/[", "opt/x")}
	}
	if d.maybe() {
		m.Package = d.one("*", "node*", "python3")
	}
	if d.maybe() {
		m.Product = d.one("edged", "web")
	}
	return m
}

func (d *dice) policy() *integrity.Policy {
	p := &integrity.Policy{Name: "base", Epoch: 7}
	for k := range p.Modes {
		p.Modes[k] = integrity.Mode(d.n(3))
	}
	for i := range d.n(7) {
		p.Allow = append(p.Allow, d.allow(fmt.Sprintf("a%d", i)))
	}
	for i := range d.n(3) {
		p.Deny = append(p.Deny, d.deny(fmt.Sprintf("d%d", i)))
	}
	for i := range 1 + d.n(4) {
		p.Programs = append(p.Programs, integrity.ProgramRule{Rule: fmt.Sprintf("p%d", i), Match: d.match(), May: integrity.Role(1 << (1 + d.n(6)))})
	}
	for i := range d.n(3) {
		p.Interpreters = append(p.Interpreters, integrity.InterpreterRule{
			Match: []integrity.Match{d.match(), d.match()}, Interpreter: integrity.Interpreter{Name: fmt.Sprintf("i%d", i)},
		})
	}
	for i := range 2 {
		ca := integrity.Authority{Name: fmt.Sprintf("ca%d", i+1)}
		p.Trust.Authorities = append(p.Trust.Authorities, ca)
	}
	p.Trust.Archives = []integrity.Archive{{Name: "debian"}, {Name: "own"}}
	p.Prepare()
	return p
}

func (d *dice) supplement() *integrity.Policy {
	p := &integrity.Policy{Name: "extra", Supplements: "base"}
	for i := range 1 + d.n(3) {
		p.Allow = append(p.Allow, d.allow(fmt.Sprintf("s%d", i)))
	}
	return p
}

// file is a File of one origin, by number.
type file struct {
	origin int
	integrity.File
}

// host is what a host holds.
type host struct {
	origins []integrity.Origin
	files   []file
}

func (d *dice) host() *host {
	h := &host{}
	for range 1 + d.n(4) {
		o := integrity.Origin{Version: "1"}
		if d.maybe() {
			o.Archive, o.Package = d.one("debian", "own"), d.one("nodejs", "python3", "node-x")
		} else {
			o.Release, o.SignedAt = d.digest(), d.time()
			o.Certificates = [3]integrity.Digest{d.digest(), d.digest(), d.digest()}
			o.Authority, o.Identity = d.one("ca1", "ca2"), d.one("spiffe://x/a", "spiffe://x/b")
			o.Product, o.Epoch = d.one("edged", "web"), uint32(d.n(4))
		}
		h.origins = append(h.origins, o)
	}
	for range d.n(14) {
		f := file{origin: d.n(len(h.origins)), File: integrity.File{SHA256: d.digest(), Kinds: d.kinds()}}
		if d.maybe() {
			f.Verity = d.digest()
		}
		for range d.n(4) {
			f.Names = append(f.Names, d.one("usr/bin/node", "usr/bin/python3.11", "opt/x", "lib/y"))
		}
		h.files = append(h.files, f)
	}
	return h
}

func (h *host) sources() []integrity.Source {
	var out []integrity.Source
	for i := range h.origins {
		out = append(out, integrity.Source{Origin: h.origins[i], Files: func(yield func(integrity.File) bool) {
			for _, f := range h.files {
				if f.origin == i && !yield(f.File) {
					return
				}
			}
		}})
	}
	return out
}

// object is the plain way to what Compiled.Object does.
func (h *host) object(kind integrity.Kind, k integrity.Key) integrity.Object {
	o := integrity.Object{Kind: kind}
	for i := range h.origins {
		for _, f := range h.files {
			if f.origin != i {
				continue
			}
			m := integrity.Membership{Origin: &h.origins[i], Kinds: f.Kinds, Names: f.Names}
			switch {
			case k.Space == integrity.SpaceSHA256 && f.SHA256 == k.Digest:
			case k.Space == integrity.SpaceFSVerity && f.Verity == k.Digest:
				m.SHA256 = f.SHA256
			default:
				continue
			}
			o.Memberships = append(o.Memberships, m)
		}
	}
	slices.SortStableFunc(o.Memberships, func(a, b integrity.Membership) int { return bytes.Compare(a.SHA256[:], b.SHA256[:]) })
	switch k.Space {
	case integrity.SpaceSHA256:
		o.SHA256 = k.Digest
	case integrity.SpaceFSVerity:
		o.FSVerity = k.Digest
	case integrity.SpaceDMVerity:
		o.DMVerity = k.Digest
	}
	return o
}

// objects is every object that the world knows, and some that it does not.
func (h *host) objects() []integrity.Object {
	var out []integrity.Object
	for i := range digestCount + 1 {
		for _, s := range []integrity.Space{integrity.SpaceSHA256, integrity.SpaceFSVerity, integrity.SpaceDMVerity} {
			for _, k := range integrity.Kinds() {
				out = append(out, h.object(k, integrity.Key{Space: s, Digest: digest(i)}))
			}
		}
	}
	// all three digests at once, as an agent may have measured them
	for i := range digestCount {
		o := h.object(integrity.KindExec, integrity.Key{Digest: digest(i)})
		o.FSVerity, o.DMVerity = digest((i+1)%digestCount), digest((i+2)%digestCount)
		for _, k := range integrity.Kinds() {
			o.Kind = k
			out = append(out, o)
		}
	}
	return out
}

func shuffle[T any](d *dice, s []T) []T {
	s = slices.Clone(s)
	for i := len(s) - 1; i > 0; i-- {
		j := d.n(i + 1)
		s[i], s[j] = s[j], s[i]
	}
	return s
}
