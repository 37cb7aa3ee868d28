package csv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Subject is what was verified.
type Subject struct {
	Name    string
	Format  string
	Digest  integrity.Digest // of the file, or of a directory's listing
	Package string           // if it is a package
	Version string
}

// SignedRelease is the release record of the build, not verified yet.
type SignedRelease struct {
	Bundle, Catalogue, Names []byte
}

// Candidate is a build that is to be shipped.
type Candidate struct {
	Source codesign.Source
	// Subject says what it is, once it has been walked.
	Subject func() Subject
	Release *SignedRelease // nil: unsigned
	// Archive is the package archive that the build comes from, taken at its
	// word; a host asks the archive's signature. Empty: none.
	Archive string
}

// Gates asks for the evidence of a verified build.
type Gates func(ctx context.Context, s Subject, r *codesign.Release) ([]GateIssue, error)

// GateIssue is a gate that does not pass.
type GateIssue struct {
	Severity   Severity
	Cause, Fix string
}

// Options are what a verification needs besides the build and its cells.
type Options struct {
	Now      time.Time
	MaxAge   time.Duration // of the inventory; 0: any
	Baseline Baseline      // nil: nobody said what hosts have
	Gates    Gates         // nil: not asked
	// Progress is told what comes next; nil: nobody listens.
	Progress func(what string)
}

// Verify reads the build and asks every cell about it. An error means that it
// could not be done at all: whoever waits for the answer must hold the build.
// What is wrong with the build, or cannot be decided, is in the report.
func Verify(ctx context.Context, c Candidate, v *Inventory, o Options) (*Report, error) {
	if len(v.Cells) == 0 {
		return nil, fmt.Errorf("csv: no cells, so nobody would run it: %w", errs.Invalid)
	}
	j := &judge{ctx: ctx, c: c, o: o, l: newLedger(), refusals: map[refusal]cause{}}
	columns, trusts := j.plan(v)
	j.progress("reading the build")
	b, member, err := inspect(c.Source, lists(c.Release), trusts)
	if err != nil {
		if !errors.Is(err, errs.Invalid) {
			return nil, fmt.Errorf("csv: %w", err)
		}
		return j.unreadable(v, member, err), nil
	}
	j.b = b
	j.subject = c.Subject()
	j.wants = newWants(b)
	j.static()
	for _, col := range columns {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("csv: %w", err)
		}
		j.progress(fmt.Sprintf("asking policy %d of %d", col.n+1, len(columns)))
		if err := j.column(col); err != nil {
			return nil, fmt.Errorf("csv: %w", err)
		}
	}
	j.policyFirst()
	j.compare()
	if err := j.gates(); err != nil {
		return nil, fmt.Errorf("csv: gates: %w", err)
	}
	j.inventory(v)
	return j.report(v), nil
}

// lists says whether a release also lists data; the comparison must, too.
func lists(r *SignedRelease) bool {
	if r == nil {
		return false
	}
	c, err := codesign.ParseCatalogue(r.Catalogue)
	if err != nil {
		return false
	}
	for _, rec := range c.All() {
		if rec.Flags&codesign.FlagData != 0 {
			return true
		}
	}
	return false
}

// judge is one verification.
type judge struct {
	ctx     context.Context //nolint:containedctx // one verification is one call
	c       Candidate
	o       Options
	b       *build
	subject Subject
	l       *ledger
	wants   *wants
	columns []*column
	cellOf  []int32 // column of each cell
	signed  *signed // the release, as the first policy that believes it sees it
	// refusals remembers what a refusal comes to, by what was said.
	refusals  map[refusal]cause
	unchecked []string
}

// column is cells that decide alike.
type column struct {
	n     int32
	cell  *Cell
	trust int
	live  bool // its policy was loaded

	name                          string
	epoch                         uint64
	digest                        integrity.Digest
	supplements                   []string // their digests, in order
	modes                         [8]integrity.Mode
	release                       *codesign.Release // verified under this policy
	refused                       bits
	allowed, blocked, logged, off int
}

type bits []uint64

func (b bits) set(i int32)      { b[i/64] |= 1 << (i % 64) }
func (b bits) has(i int32) bool { return b[i/64]&(1<<(i%64)) != 0 }

func (j *judge) progress(what string) {
	if j.o.Progress != nil {
		j.o.Progress(what)
	}
}

func (j *judge) note(format string, a ...any) {
	if s := fmt.Sprintf(format, a...); !slices.Contains(j.unchecked, s) {
		j.unchecked = append(j.unchecked, s)
	}
}

// plan makes a column of all cells that decide alike, and lists what their
// kernels and firmware believe.
func (j *judge) plan(v *Inventory) ([]*column, []trust) {
	byKey := map[string]*column{}
	var trusts []trust
	byTrust := map[string]int{}
	for i := range v.Cells {
		c := &v.Cells[i]
		col := byKey[c.Key]
		if col == nil || c.Key == "" {
			col = &column{n: int32(len(j.columns)), cell: c} //nolint:gosec // at most maxCells
			byKey[c.Key] = col
			j.columns = append(j.columns, col)
			t := trust{c.ModuleKeys, c.DB, c.DBX, c.SBAT}
			n, ok := byTrust[t.key()]
			if !ok {
				n = len(trusts)
				byTrust[t.key()] = n
				trusts = append(trusts, t)
			}
			col.trust = n
		}
		j.cellOf = append(j.cellOf, col.n)
	}
	return j.columns, trusts
}

// signed is the release's own list, laid out by the build's contents.
type signed struct {
	catalogue *codesign.Catalogue
	table     *codesign.NameTable
	index     []int32    // of the build's contents: record, or -1
	names     [][]string // of the build's contents
}

func (j *judge) layOut(c *codesign.Catalogue, t *codesign.NameTable) *signed {
	at := make(map[integrity.Digest]int32, c.Len())
	for i, rec := range c.All() {
		at[rec.Digest] = int32(i) //nolint:gosec // at most codesign.MaxRecords
	}
	s := &signed{catalogue: c, table: t, index: make([]int32, len(j.b.contents)), names: make([][]string, len(j.b.contents))}
	for i := range j.b.contents {
		n, ok := at[j.b.contents[i].digest]
		if !ok {
			s.index[i] = -1
			continue
		}
		s.index[i] = n
		for _, name := range t.Names[n] {
			s.names[i] = append(s.names[i], name.Path)
		}
	}
	return s
}

// believe verifies the release under one policy. Without a release, or with one
// that this policy does not believe, there is no origin.
func (j *judge) believe(col *column, p *integrity.Policy) *integrity.Origin {
	if j.c.Archive != "" {
		for _, a := range p.Trust.Archives {
			if a.Name == j.c.Archive {
				return &integrity.Origin{Archive: a.Name, Package: j.subject.Package, Version: j.subject.Version}
			}
		}
		return nil
	}
	r := j.c.Release
	if r == nil {
		return nil
	}
	rel, cat, err := codesign.VerifyTrusted(r.Bundle, r.Catalogue, p)
	if err == nil && j.signed == nil {
		var t *codesign.NameTable
		if t, err = rel.VerifyNames(r.Names, cat); err == nil {
			j.signed = j.layOut(cat, t)
		}
	}
	bad := func(text, fix string) *integrity.Origin {
		j.l.hit(whole, cause{BadRelease, Block, text, fix}, col.n)
		return nil
	}
	switch {
	case errors.Is(err, errs.Untrusted):
		return bad("policy "+p.Name+" does not believe the release record: "+plain(err), "sign it under an authority that the policy trusts for builds, or give the record that belongs to this build")
	case err != nil:
		return bad("the release record is malformed: "+plain(err), "sign the build again: ringwall sign")
	case !rel.NotAfter.IsZero() && !j.o.Now.Before(rel.NotAfter):
		return bad("the release is past its use-by date, "+utc(rel.NotAfter), "build and sign it again, or with a later --not-after")
	case rel.SignedAt.After(j.o.Now.Add(5 * time.Minute)):
		return bad("the release was signed in the future, at "+utc(rel.SignedAt), "check the clocks of the timestamp authority and of this machine")
	}
	col.release = rel
	return &integrity.Origin{
		Release: rel.Record, Authority: rel.CA, Identity: rel.Identity,
		Certificates: [3]integrity.Digest{rel.CertFingerprint, rel.CAFingerprint, rel.TSAFingerprint},
		SignedAt:     rel.SignedAt, Product: rel.Product, Epoch: rel.Epoch, Version: rel.Version,
	}
}

func utc(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// plain is an error in one line.
func plain(err error) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "\n", "; ")), " ")
}

// column asks one policy about everything.
func (j *judge) column(col *column) error {
	live, err := col.cell.Load(j.ctx)
	if err != nil {
		if e := j.ctx.Err(); e != nil {
			return e
		}
		text, fix := "its policy cannot be read: "+plain(err), "give this check access to the file, then run it again"
		if errors.Is(err, errs.Invalid) || errors.Is(err, errs.Untrusted) {
			text, fix = "its policy cannot be loaded, and agents of this version would refuse it, too: "+plain(err), "correct it: ringwall policy check"
		}
		j.l.hit(whole, cause{UnloadablePolicy, Hold, text, fix}, col.n)
		return nil
	}
	p := live.Policy
	sources := make([]integrity.Source, len(live.Sources))
	seen := j.wants.seen()
	for i, s := range live.Sources {
		sources[i] = integrity.Source{Origin: s.Origin, Files: seen.listen(s.Files)}
	}
	c, err := integrity.Compile(p, sources, integrity.CompileOptions{Now: j.o.Now})
	if err != nil {
		j.l.hit(whole, cause{UnloadablePolicy, Hold, "its policy does not compile: " + plain(err), "correct it: ringwall policy check"}, col.n)
		return nil
	}
	col.live, col.name, col.epoch, col.digest, col.modes = true, p.Name, p.Epoch, p.Digest, p.Modes
	col.supplements = digestsInOrder(live.Supplements)
	col.refused = make(bits, len(j.b.contents)/64+1)
	origin := j.believe(col, p)
	q := &questions{j: j, col: col, c: c, origin: origin}
	for i := range j.b.contents {
		if i%4096 == 0 && j.ctx.Err() != nil {
			return j.ctx.Err()
		}
		q.content(int32(i))
	}
	j.agree(col, origin)
	j.l.soften(col)
	return q.closure(seen)
}

// soften makes a release that is not believed a warning where nothing enforces.
func (l *ledger) soften(col *column) {
	if col.blocked > 0 {
		return
	}
	for n, c := range l.causes {
		if c.id != BadRelease || c.severity != Block {
			continue
		}
		at := [2]int32{whole, int32(n)}
		if set, ok := l.hits[at]; ok && slices.Contains(l.sets[set], col.n) {
			rest := slices.DeleteFunc(slices.Clone(l.sets[set]), func(x int32) bool { return x == col.n })
			if l.hits[at] = l.set(rest); len(rest) == 0 {
				delete(l.hits, at)
			}
			c.severity = Warn
			l.hit(whole, c, col.n)
		}
	}
}

// questions are those that one policy is asked.
type questions struct {
	j      *judge
	col    *column
	c      *integrity.Compiled
	origin *integrity.Origin

	refused []refusedWants
}

// object is a content of the build as a host of this column sees it.
func (q *questions) object(i int32) integrity.Object {
	c := &q.j.b.contents[i]
	o := q.c.Object(integrity.KindExec, integrity.Key{Digest: c.digest})
	switch {
	case q.origin == nil:
	case q.origin.Package != "":
		o.Memberships = append(o.Memberships, integrity.Membership{Origin: q.origin, Kinds: c.kinds, Names: c.paths})
	case q.j.signed.index[i] >= 0:
		rec := q.j.signed.catalogue.At(int(q.j.signed.index[i]))
		o.Memberships = append(o.Memberships, integrity.Membership{Origin: q.origin, Kinds: rec.Kinds, Names: q.j.signed.names[i]})
	}
	return o
}

// content asks for every kind of use.
func (q *questions) content(i int32) {
	c, col := &q.j.b.contents[i], q.col
	o := q.object(i)
	var roles integrity.Role
	blocked, logged, asked := false, false, false
	for _, k := range integrity.Kinds() {
		if !c.kinds.Has(k) {
			continue
		}
		if col.modes[k] == integrity.ModeOff {
			continue
		}
		asked = true
		o.Kind = k
		v := q.c.Evaluate(&o, q.j.o.Now)
		roles |= v.Roles
		if v.Allow {
			continue
		}
		col.refused.set(i)
		if v.Mode == integrity.ModeEnforce {
			blocked = true
		} else {
			logged = true
		}
		q.refuse(i, &v)
	}
	switch {
	case blocked:
		col.blocked++
	case logged:
		col.logged++
	case asked:
		col.allowed++
	default:
		col.off++
	}
	if c.facts != nil && !c.inner {
		q.facts(i, c.facts, roles)
		q.kernel(i, c.facts)
	}
}

// refusal is what a refusal's cause depends on.
type refusal struct {
	column     int32
	rule, text string
	mode       integrity.Mode
	members    bool // somebody vouches for it
}

// refuse notes why a content would not run, unless the reason is the release.
func (q *questions) refuse(i int32, v *integrity.Verdict) {
	j := q.j
	listed := q.origin != nil && (q.origin.Package != "" || j.signed.index[i] >= 0)
	denied := q.denies(v)
	if !denied && !listed && j.c.Release != nil {
		return // CSV004 or CSV011 says it
	}
	key := refusal{q.col.n, v.Rule, v.Reason, v.Mode, listed}
	c, ok := j.refusals[key]
	if !ok {
		c = q.causeOf(v, listed, denied)
		j.refusals[key] = c
	}
	j.l.hit(i, c, q.col.n)
}

// denies says whether a deny rule made the verdict.
func (q *questions) denies(v *integrity.Verdict) bool {
	return v.Rule != "" && slices.ContainsFunc(q.c.Policy.Deny, func(r integrity.DenyRule) bool { return r.Rule == v.Rule })
}

func (q *questions) causeOf(v *integrity.Verdict, listed, denied bool) cause {
	c := cause{id: Unauthorised, severity: Block, text: v.Reason}
	if v.Mode != integrity.ModeEnforce {
		c.severity, c.text = Warn, "would be refused once the policy enforces: "+v.Reason
	}
	switch {
	case denied:
		c.id = DeniedByRule
		c.fix = denyFix(v)
	case listed && q.origin.Package != "":
		c.fix = "let policy " + q.col.name + " allow package " + q.origin.Package + " of archive " + q.origin.Archive + " for this kind of use"
	case listed:
		c.fix = fmt.Sprintf("let policy %s allow it: a rule with signer {authority: %s, identity: %s, product: %s}",
			q.col.name, q.origin.Authority, q.origin.Identity, q.origin.Product)
	case q.j.c.Archive != "":
		c.fix = "let policy " + q.col.name + " trust archive " + q.j.c.Archive + ", or sign the build"
	default:
		c.fix = "sign the build (ringwall sign) and give its record with --release; or take the file out"
	}
	return c
}

func denyFix(v *integrity.Verdict) string {
	switch v.Indicator.Type {
	case "certificate":
		return "sign again with a certificate that is not revoked"
	case "product":
		return "build it again with the fix and sign it with a higher --epoch"
	case "release":
		return "this release was withdrawn: ship a later one"
	case "package":
		return "ship another package, or ask who owns deny rule " + v.Rule
	}
	return "take this content out of the build: deny rule " + v.Rule + " names it"
}

// agree looks for hosts that classify by other rules. A signed catalogue is
// what they go by; packages they classify themselves.
func (j *judge) agree(col *column, origin *integrity.Origin) {
	if n := col.cell.Classifier; n != 0 && n != codesign.ClassifierVersion && origin != nil && origin.Package != "" {
		j.l.hit(whole, cause{
			OtherClassifier, Hold,
			fmt.Sprintf("agents classify packages by version %d of the rules, this program by version %d", n, codesign.ClassifierVersion),
			"verify with the version of ringwall that these hosts run, or update their agents first",
		}, col.n)
	}
}

// policyFirst turns "not authorised" into "authorised by a later policy than
// some hosts run" where that is so.
func (j *judge) policyFirst() {
	type move struct {
		at     [2]int32
		column int32
		epoch  uint64
		name   string
	}
	var moves []move
	for at, set := range j.l.hits {
		if c := j.l.causes[at[1]]; c.id != Unauthorised || at[0] == whole {
			continue
		}
		for _, n := range j.l.sets[set] {
			if epoch, ok := j.later(j.columns[n], at[0]); ok {
				moves = append(moves, move{at, n, epoch, j.columns[n].name})
			}
		}
	}
	for _, m := range moves {
		set := j.l.hits[m.at]
		rest := slices.DeleteFunc(slices.Clone(j.l.sets[set]), func(x int32) bool { return x == m.column })
		if j.l.hits[m.at] = j.l.set(rest); len(rest) == 0 {
			delete(j.l.hits, m.at)
		}
		was := j.l.causes[m.at[1]]
		j.l.hit(m.at[0], cause{
			PolicyFirst, was.severity,
			fmt.Sprintf("policy %s allows it since epoch %d; these hosts run an older one", m.name, m.epoch),
			fmt.Sprintf("roll out policy %s epoch %d to them first, or stop the build's roll-out before their ring", m.name, m.epoch),
		}, m.column)
	}
}

// later is the first later epoch of a column's policy that allows a content.
func (j *judge) later(col *column, content int32) (uint64, bool) {
	var best uint64
	for _, o := range j.columns {
		if o.live && o.name == col.name && o.epoch > col.epoch && !o.refused.has(content) && (best == 0 || o.epoch < best) {
			best = o.epoch
		}
	}
	return best, best != 0
}

// compare holds the build against what was signed.
func (j *judge) compare() {
	s := j.signed
	if s == nil {
		return
	}
	const fix = "sign last: after packaging, stripping and fix-ups; ringwall verify --content shows the differences"
	signedPaths := map[string]bool{}
	for i := range s.table.Names {
		for _, n := range s.table.Names[i] {
			signedPaths[n.Path] = true
		}
	}
	for i := range j.b.contents {
		c := &j.b.contents[i]
		if s.index[i] < 0 {
			text := "it was added after signing: the release's catalogue does not list it"
			if slices.ContainsFunc(c.paths, func(p string) bool { return signedPaths[p] }) {
				text = "it was changed after signing: the release's catalogue lists other content under this name"
			} else if s.catalogue.Classifier() != codesign.ClassifierVersion {
				j.l.everywhere(int32(i), cause{
					OtherClassifier, Block,
					fmt.Sprintf("it is code by version %d of the rules and was not when the record was made, by version %d", codesign.ClassifierVersion, s.catalogue.Classifier()),
					"sign the build again with this version of ringwall",
				})
				continue
			}
			j.l.everywhere(int32(i), cause{OtherContent, Block, text, fix})
			continue
		}
		if rec := s.catalogue.At(int(s.index[i])); c.kinds&^rec.Kinds != 0 {
			j.kindsDiffer(int32(i), c.kinds, rec.Kinds)
		}
	}
	j.removed()
}

func (j *judge) kindsDiffer(i int32, found, listed integrity.KindSet) {
	text := fmt.Sprintf("the release lists it as %s, and here it is %s", listed, found)
	if j.signed.catalogue.Classifier() == codesign.ClassifierVersion {
		j.l.everywhere(i, cause{OtherContent, Block, text + ": its name or mode changed after signing", "sign last, after packaging and fix-ups"})
		return
	}
	j.l.everywhere(i, cause{
		OtherClassifier, Warn, fmt.Sprintf("%s: rules of version %d against %d", text, j.signed.catalogue.Classifier(), codesign.ClassifierVersion),
		"sign the build again with this version of ringwall",
	})
}

// removed reports what was signed and is not in the build any more.
func (j *judge) removed() {
	have := make(map[string]bool, len(j.b.contents))
	for i := range j.b.names.Names {
		for _, n := range j.b.names.Names[i] {
			have[n.Path] = true
		}
	}
	for _, n := range j.b.names.Others {
		have[n.Path] = true
	}
	f := Finding{
		ID: OtherContent, Severity: Block, Cause: "it was removed after signing: the release lists it, the build has it not", Members: []MemberRef{}, Cells: []int{},
		Fix: "sign what is shipped, or ship what was signed",
	}
	for i, rec := range j.signed.catalogue.All() {
		for _, n := range j.signed.table.Names[i] {
			if !have[n.Path] && rec.Flags&codesign.FlagInner == 0 && n.Origin != codesign.OriginSigned {
				f.Members = append(f.Members, MemberRef{Paths: []string{n.Path}, SHA256: rec.Digest.String(), Origin: n.Origin})
			}
		}
	}
	if len(f.Members) > 0 {
		j.l.detached = append(j.l.detached, f)
	}
}

func (j *judge) gates() error {
	if j.o.Gates == nil {
		j.note("gate evidence: not asked for")
		return nil
	}
	var rel *codesign.Release
	for _, col := range j.columns {
		if col.release != nil {
			rel = col.release
			break
		}
	}
	issues, err := j.o.Gates(j.ctx, j.subject, rel)
	if err != nil {
		return err
	}
	for _, g := range issues {
		j.l.everywhere(whole, cause{BadGate, g.Severity, g.Cause, g.Fix})
	}
	return nil
}

// inventory holds a build when too little is known about where it goes.
func (j *judge) inventory(v *Inventory) {
	if age := j.o.Now.Sub(v.Taken); !v.Taken.IsZero() && j.o.MaxAge > 0 && age > j.o.MaxAge {
		j.l.everywhere(whole, cause{
			UnloadablePolicy, Hold, fmt.Sprintf("the inventory is of %s, which is more than %v ago", utc(v.Taken), j.o.MaxAge),
			"take a new one",
		})
	}
	for _, r := range v.Rings {
		if !slices.ContainsFunc(v.Cells, func(c Cell) bool { return c.Ring == r }) {
			j.l.everywhere(whole, cause{UnloadablePolicy, Hold, "nothing is known about the hosts of ring " + r, "add a cell for each policy that they run"})
		}
	}
}
