package integrity

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sort"
	"time"

	"ringwall/internal/errs"
)

// Source is the content of one verified release or package.
type Source struct {
	Origin Origin
	Files  iter.Seq[File] // ranged over once
}

// File is one content of a source.
type File struct {
	SHA256 Digest // of the content; never zero
	Verity Digest // its fs-verity digest, if known
	Kinds  KindSet
	Names  []string // without leading slash; copied
	// Data: it is no code by itself and is listed for interpreters that may read
	// authorised files only. Compile makes no difference.
	Data bool
}

// CompileOptions are what a host adds to its policy.
type CompileOptions struct {
	// Self is the agent's own binary, and SelfVerity its fs-verity digest if it
	// has one, as measured. It may run and gets RoleAgent, whether a rule lists
	// it or not; a policy that denies it by digest, release or package is
	// refused.
	Self, SelfVerity Digest
	// Canary is a program that the agent runs to see that what is authorised
	// runs. It may run, on the same condition.
	Canary Digest
	// Script is what the agent has an interpreter read, its compiler of byte
	// code. It may be read, on the same condition.
	Script Digest
	Now    time.Time // for exceptions
}

// Compiled is a policy applied to the sources of one host. It is not changed
// after Compile and may be used by several goroutines.
type Compiled struct {
	Policy *Policy
	Table  *Table
	// NextChange is when the first exception or break-glass release that holds
	// now ends: compile again then. Zero: never.
	NextChange time.Time

	options  CompileOptions
	origins  []Origin
	records  []record         // in order of SHA-256
	byVerity []int32          // records with a verity digest, in its order
	names    []byte           // of records: a count, and each name with its length before it
	numbers  map[string]uint8 // of interpreters
}

// record is one file of one source. A million of them must fit.
type record struct {
	sha256, verity Digest
	names          uint64 // offset into Compiled.names
	origin         uint32
	kinds          KindSet
}

// Bounds of what Compile takes; a host's packages have some hundred thousand
// files.
const (
	maxRecords  = 16 << 20
	maxNameLen  = 4096
	maxNameList = 4096
)

// Compile applies a policy to the content of verified sources. Its table holds
// what Evaluate says of each content, by its SHA-256 and by its fs-verity
// digest; content that a deny rule bans has an entry without kinds, so that
// nobody adds it later.
// Errors: errs.Invalid for input out of bounds, errs.Denied if the policy
// denies the agent itself.
//
// It takes time and memory in proportion to the number of files: about 300
// bytes each.
func Compile(p *Policy, sources []Source, o CompileOptions) (*Compiled, error) {
	if p.ix == nil {
		q := *p
		q.Prepare()
		p = &q
	}
	c := &Compiled{Policy: p, options: o}
	if err := c.read(sources); err != nil {
		return nil, fmt.Errorf("compile policy %s: %w", p.Name, err)
	}
	if err := c.build(); err != nil {
		return nil, fmt.Errorf("compile policy %s: %w", p.Name, err)
	}
	ends := func(t time.Time) {
		if o.Now.Before(t) && (c.NextChange.IsZero() || t.Before(c.NextChange)) {
			c.NextChange = t
		}
	}
	for i := range p.Allow {
		ends(p.Allow[i].Until)
	}
	for i := range c.origins {
		ends(c.origins[i].NotAfter)
	}
	return c, nil
}

func (c *Compiled) read(sources []Source) error {
	c.origins = make([]Origin, len(sources))
	var verity int
	for i := range sources {
		c.origins[i] = sources[i].Origin
		for f := range sources[i].Files {
			if f.SHA256.IsZero() || len(f.Names) > maxNameList || len(c.records) == maxRecords {
				return fmt.Errorf("content %v: no digest, or more than %d names or %d contents: %w", f.SHA256, maxNameList, maxRecords, errs.Invalid)
			}
			if !f.Verity.IsZero() {
				verity++
			}
			c.records = append(c.records, record{
				sha256: f.SHA256, verity: f.Verity, names: uint64(len(c.names)), origin: uint32(i), kinds: f.Kinds, //nolint:gosec // bounded
			})
			c.names = binary.AppendUvarint(c.names, uint64(len(f.Names)))
			for _, n := range f.Names {
				if len(n) > maxNameLen {
					return fmt.Errorf("content %v: name of %d bytes: %w", f.SHA256, len(n), errs.Invalid)
				}
				c.names = append(binary.AppendUvarint(c.names, uint64(len(n))), n...)
			}
		}
	}
	slices.SortFunc(c.records, func(a, b record) int {
		if n := bytes.Compare(a.sha256[:], b.sha256[:]); n != 0 {
			return n
		}
		if a.origin != b.origin {
			return int(a.origin) - int(b.origin)
		}
		return int(int64(a.names) - int64(b.names)) //nolint:gosec // offsets
	})
	c.byVerity = make([]int32, 0, verity)
	for i := range c.records {
		if !c.records[i].verity.IsZero() {
			c.byVerity = append(c.byVerity, int32(i))
		}
	}
	slices.SortFunc(c.byVerity, func(a, b int32) int {
		if n := bytes.Compare(c.records[a].verity[:], c.records[b].verity[:]); n != 0 {
			return n
		}
		return int(a - b)
	})
	return nil
}

// ruling is what Evaluate says of a content for every kind.
type ruling struct {
	kinds       KindSet
	roles       Role
	interpreter string
	banned      bool // denied by a rule, not for want of one
}

func (c *Compiled) rule(o *Object) ruling {
	var r ruling
	for _, k := range Kinds() {
		o.Kind = k
		v := c.Evaluate(o, c.options.Now)
		if !v.Allow {
			continue
		}
		r.kinds |= SetOf(k)
		switch k {
		case KindExec:
			r.roles, r.interpreter = v.Roles, v.Interpreter
		case KindLibrary:
			r.interpreter = v.Interpreter
		}
	}
	r.banned = r.kinds == 0 && c.Policy.ix.denied(o).by != noIndicator
	return r
}

// Evaluate is Evaluate under the compiled policy, with what the host adds to
// it: its agent, its canary and its script.
func (c *Compiled) Evaluate(o *Object, now time.Time) Verdict {
	v := Evaluate(c.Policy, o, now)
	self := is(o.SHA256, c.options.Self) || is(o.FSVerity, c.options.SelfVerity)
	script := is(o.SHA256, c.options.Script)
	if !self && !script && !is(o.SHA256, c.options.Canary) || script != (o.Kind == KindScript) {
		return v
	}
	switch o.Kind {
	case KindExec, KindLibrary, KindScript:
	case KindBPF:
		if !self {
			return v
		}
	default:
		return v
	}
	if c.Policy.ix.denied(o).by != noIndicator {
		return v
	}
	if !v.Allow {
		v = Verdict{Allow: true, Mode: v.Mode, Rule: "ringwall", Reason: "part of Ringwall on this host"}
	}
	if self && o.Kind != KindLibrary {
		v.Roles |= RoleAgent
	}
	return v
}

func is(d, want Digest) bool { return !d.IsZero() && d == want }

// build evaluates each content once, or once for all contents that nothing in
// the policy tells apart.
func (c *Compiled) build() error {
	p := c.Policy
	c.Table = &Table{PolicyDigest: p.Digest, Epoch: p.Epoch, Modes: p.Modes, Process: p.Process}
	b := builder{c: c, alike: map[string]int32{}, bare: map[Key]ruling{}}
	b.signRecords()
	order := make([]int32, len(c.records))
	for i := range order {
		order[i] = int32(i)
	}
	bySHA := b.judge(order, SpaceSHA256)
	byVerity := b.judge(c.byVerity, SpaceFSVerity)
	b.judgeBare()
	if err := b.own(); err != nil {
		return err
	}
	if err := b.number(); err != nil {
		return err
	}
	c.Table.Entries = make(map[Key]Entry, b.count(bySHA)+b.count(byVerity)+len(b.bare))
	b.fill(order, bySHA, SpaceSHA256)
	b.fill(c.byVerity, byVerity, SpaceFSVerity)
	for k, r := range b.bare {
		b.put(k, r)
	}
	return nil
}

// builder holds what only the making of a table needs.
type builder struct {
	c       *Compiled
	signs   []int32 // of records: equal for those that nothing in the policy tells apart
	rulings []ruling
	alike   map[string]int32 // ruling by the signs of a content's records
	bare    map[Key]ruling   // of digests that rules name
}

// signRecords numbers what tells one record's word from another's: its origin,
// what it says that the content is, and which matches name it.
func (b *builder) signRecords() {
	c, x := b.c, b.c.Policy.ix
	known := map[string]int32{}
	b.signs = make([]int32, len(c.records))
	var text []byte
	for i := range c.records {
		r := &c.records[i]
		text = binary.BigEndian.AppendUint32(text[:0], r.origin)
		text = binary.BigEndian.AppendUint16(text, uint16(r.kinds))
		for name := range c.namesOf(r) {
			x.names.each(name, func(m int32) { text = binary.BigEndian.AppendUint32(text, uint32(m)) }) //nolint:gosec // an index
		}
		n, ok := known[string(text)]
		if !ok {
			n = int32(len(known)) //nolint:gosec // bounded
			known[string(text)] = n
		}
		b.signs[i] = n
	}
}

// digest returns the record's digest in the space.
func (r *record) digest(s Space) *Digest {
	if s == SpaceFSVerity {
		return &r.verity
	}
	return &r.sha256
}

// groups yields the runs of equal digests in an ordered list of records.
func (c *Compiled) groups(order []int32, s Space) iter.Seq[[]int32] {
	return func(yield func([]int32) bool) {
		for i := 0; i < len(order); {
			end, d := i+1, c.records[order[i]].digest(s)
			for end < len(order) && *c.records[order[end]].digest(s) == *d {
				end++
			}
			if !yield(order[i:end]) {
				return
			}
			i = end
		}
	}
}

// judge returns the ruling of each content.
func (b *builder) judge(order []int32, s Space) []int32 {
	c, x := b.c, b.c.Policy.ix
	out := make([]int32, 0, len(order))
	var key []byte
	for g := range c.groups(order, s) {
		key = key[:0]
		particular := false
		for _, i := range g {
			r := &c.records[i]
			particular = particular || x.particular(r.sha256, r.verity) || is(r.sha256, c.options.Self) ||
				is(r.verity, c.options.SelfVerity) || is(r.sha256, c.options.Canary) || is(r.sha256, c.options.Script)
			key = binary.BigEndian.AppendUint32(key, uint32(b.signs[i])) //nolint:gosec // an index
		}
		n, ok := b.alike[string(key)]
		if !ok || particular {
			o := c.object(g, s)
			n = int32(len(b.rulings)) //nolint:gosec // bounded
			b.rulings = append(b.rulings, c.rule(&o))
			if !particular {
				b.alike[string(key)] = n
			}
		}
		out = append(out, n)
	}
	return out
}

// judgeBare rules on the digests that rules name, known to a source or not.
func (b *builder) judgeBare() {
	p := b.c.Policy
	add := func(s Space, ds []Digest) {
		for _, d := range ds {
			k := Key{Space: s, Digest: d}
			if _, done := b.bare[k]; done || d.IsZero() {
				continue
			}
			o := b.c.Object(KindExec, k)
			b.bare[k] = b.c.rule(&o)
		}
	}
	for i := range p.Allow {
		add(SpaceSHA256, p.Allow[i].SHA256)
		add(SpaceFSVerity, p.Allow[i].FSVerity)
		add(SpaceDMVerity, p.Allow[i].DMVerity)
	}
	for i := range p.Deny {
		add(SpaceSHA256, p.Deny[i].SHA256)
	}
}

// own rules on what the host adds.
func (b *builder) own() error {
	o := &b.c.options
	for _, own := range []struct {
		Key
		as Kind
	}{
		{Key{SpaceSHA256, o.Self}, KindExec},
		{Key{SpaceFSVerity, o.SelfVerity}, KindExec},
		{Key{SpaceSHA256, o.Canary}, KindExec},
		{Key{SpaceSHA256, o.Script}, KindScript},
	} {
		k := own.Key
		if k.Digest.IsZero() {
			continue
		}
		object := b.c.Object(own.as, k)
		if v := b.c.Evaluate(&object, o.Now); !v.Allow {
			return fmt.Errorf("it denies Ringwall itself (%v): %s: %w", k.Digest, v.Reason, errs.Denied)
		}
		b.bare[k] = b.c.rule(&object)
	}
	return nil
}

// number numbers the interpreters that some content is, in order of name.
func (b *builder) number() error {
	c := b.c
	used := map[string]bool{}
	for i := range b.rulings {
		used[b.rulings[i].interpreter] = true
	}
	for _, r := range b.bare {
		used[r.interpreter] = true
	}
	rules := map[string]*Interpreter{}
	for i := range c.Policy.Interpreters {
		r := &c.Policy.Interpreters[i].Interpreter
		if used[r.Name] && rules[r.Name] == nil {
			rules[r.Name] = r
		}
	}
	if len(rules) > MaxInterpreters {
		return fmt.Errorf("%d interpreters are in use, at most %d: %w", len(rules), MaxInterpreters, errs.Invalid)
	}
	c.numbers = make(map[string]uint8, len(rules))
	for _, name := range slices.Sorted(maps.Keys(rules)) {
		c.Table.Interpreters = append(c.Table.Interpreters, *rules[name])
		c.numbers[name] = uint8(len(c.Table.Interpreters)) //nolint:gosec // at most 63
	}
	return nil
}

func (b *builder) count(of []int32) int {
	n := 0
	for _, v := range of {
		if r := &b.rulings[v]; r.kinds != 0 || r.banned {
			n++
		}
	}
	return n
}

func (b *builder) fill(order []int32, of []int32, s Space) {
	n := 0
	for g := range b.c.groups(order, s) {
		b.put(Key{Space: s, Digest: *b.c.records[g[0]].digest(s)}, b.rulings[of[n]])
		n++
	}
}

func (b *builder) put(k Key, r ruling) {
	if r.kinds != 0 || r.banned {
		b.c.Table.Entries[k] = Entry{Kinds: r.kinds, Roles: r.roles, Interpreter: b.c.numbers[r.interpreter]}
	}
}

func (c *Compiled) namesOf(r *record) iter.Seq[string] {
	return func(yield func(string) bool) {
		b := c.names[r.names:]
		n, w := binary.Uvarint(b)
		b = b[w:]
		for range n {
			l, w := binary.Uvarint(b)
			if !yield(string(b[w:][:l])) {
				return
			}
			b = b[w:][l:]
		}
	}
}

// object makes what Evaluate wants from the records of one content. What an
// origin says of the other digest was not measured, so it only restricts.
func (c *Compiled) object(group []int32, s Space) Object {
	var o Object
	o.Memberships = slices.Grow(o.Memberships, len(group))
	for _, i := range group {
		r := &c.records[i]
		m := Membership{Origin: &c.origins[r.origin], Kinds: r.kinds, Names: slices.Collect(c.namesOf(r))}
		if s == SpaceFSVerity {
			o.FSVerity, m.SHA256 = r.verity, r.sha256
		} else {
			o.SHA256 = r.sha256
		}
		o.Memberships = append(o.Memberships, m)
	}
	return o
}

// Object rebuilds the object that a digest identifies, with everything that the
// sources say of it, for events and explanations. An unknown digest has no
// memberships.
func (c *Compiled) Object(kind Kind, k Key) Object {
	o := Object{Kind: kind}
	switch k.Space {
	case SpaceDMVerity:
		o.DMVerity = k.Digest
		return o
	case SpaceFSVerity:
		o.FSVerity = k.Digest
		at := sort.Search(len(c.byVerity), func(i int) bool {
			return bytes.Compare(c.records[c.byVerity[i]].verity[:], k.Digest[:]) >= 0
		})
		for g := range c.groups(c.byVerity[at:], SpaceFSVerity) {
			if c.records[g[0]].verity == k.Digest {
				o.Memberships = c.object(g, SpaceFSVerity).Memberships
			}
			break
		}
		return o
	}
	o.SHA256 = k.Digest
	at := sort.Search(len(c.records), func(i int) bool { return bytes.Compare(c.records[i].sha256[:], k.Digest[:]) >= 0 })
	var g []int32
	for ; at < len(c.records) && c.records[at].sha256 == k.Digest; at++ {
		g = append(g, int32(at)) //nolint:gosec // bounded
	}
	o.Memberships = c.object(g, SpaceSHA256).Memberships
	return o
}

// Entry returns what a table says of an object that came after Compile, such
// as the content of a package that is about to be unpacked; o.Kind is ignored.
// errs.Conflict: it is an interpreter that the table does not number, compile
// again.
func (c *Compiled) Entry(o *Object, now time.Time) (Entry, error) {
	d := *c
	d.options.Now = now
	p := *o
	r := d.rule(&p)
	n, ok := c.numbers[r.interpreter]
	if r.interpreter != "" && !ok {
		return Entry{}, fmt.Errorf("interpreter %s is not in the table: %w", r.interpreter, errs.Conflict)
	}
	return Entry{Kinds: r.kinds, Roles: r.roles, Interpreter: n}, nil
}

// Allows reports whether the table authorises the content for the kind.
func (t *Table) Allows(k Key, kind Kind) bool { return t.Entries[k].Kinds.Has(kind) }
