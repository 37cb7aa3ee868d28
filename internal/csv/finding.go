package csv

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// ID names a check. Ids are stable: reports of years compare.
type ID string

// The checks.
const (
	Unauthorised     ID = "CSV001"
	PolicyFirst      ID = "CSV002"
	DeniedByRule     ID = "CSV003"
	BadRelease       ID = "CSV004"
	BadInterpreter   ID = "CSV005"
	MissingLibrary   ID = "CSV006"
	BadModule        ID = "CSV007"
	BadEFI           ID = "CSV008"
	MadeAtInstall    ID = "CSV009"
	Payload          ID = "CSV010"
	OtherContent     ID = "CSV011"
	BadGate          ID = "CSV012"
	Privileged       ID = "CSV013"
	Unhardened       ID = "CSV014"
	Unparsable       ID = "CSV015"
	OtherClassifier  ID = "CSV016"
	UnloadablePolicy ID = "CSV017"
	DidNotRun        ID = "CSV018"
	Behaviour        ID = "CSV019"
)

// Check is what a check is about, for people.
type Check struct {
	ID    ID     `json:"id"`
	Name  string `json:"name"`  // a word or two, for tools
	Title string `json:"title"` // a sentence
	Help  string `json:"help"`  // what it means and what to do
}

// Checks lists every check in order of its id.
func Checks() []Check {
	return []Check{
		{
			Unauthorised, "unauthorised", "A file is not authorised by a policy that hosts enforce.",
			"The policy has no rule that allows this content for what it is used as. Sign the build and give the record with --release; or let the policy allow its signer; or take the file out of the build.",
		},
		{
			PolicyFirst, "policy-first", "A file is authorised by a newer policy only than some hosts run.",
			"The build would be right after the policy's roll-out and is wrong before it. Roll the policy out to those rings first, or stop the build's roll-out before them.",
		},
		{
			DeniedByRule, "denied", "A deny rule refuses a file, its release, its certificate or its epoch.",
			"Somebody decided that this must not run, and no allow rule helps. Take the file out, rebuild with what replaces it, raise the epoch or sign with a certificate that is not revoked.",
		},
		{
			BadRelease, "bad-release", "The release record does not verify under a policy's trust.",
			"Signature, certificate, timestamp, catalogue or use-by date are not what hosts accept, so nothing in the build counts as signed there.",
		},
		{
			BadInterpreter, "interpreter", "The interpreter or program loader of a file is missing or not authorised.",
			"The kernel starts the program that stands after #! or in PT_INTERP. If that may not run or is not there, the file does not run either. Depend on the package that brings it, or correct the path.",
		},
		{
			MissingLibrary, "library", "A shared library that a file needs is missing or not authorised.",
			"The loader looks for these libraries before main() runs. Depend on the package that brings them, or ship them in the build.",
		},
		{
			BadModule, "module", "A kernel module is unsigned or not signed under the kernel's key.",
			"Kernels that insist on module signatures refuse it whatever a policy says. Sign it with the key that belongs to the kernel it is built for.",
		},
		{
			BadEFI, "efi", "An EFI image's signature does not verify, or the firmware's lists forbid it.",
			"A machine with Secure Boot does not start it. Sign it under a certificate in db, and look for its hash, certificate and SBAT generation in the forbidden lists.",
		},
		{
			MadeAtInstall, "made-at-install", "Code is made or fetched on the host, by a maintainer script or at run time.",
			"What is made on the host is in nobody's catalogue, so it does not run there. Make it at build time and ship it, or authorise it by a rule of its own.",
		},
		{
			Payload, "payload", "A file carries code inside that is unpacked on the host.",
			"What is unpacked at run time is content of its own, which no catalogue lists. Ship the files unpacked.",
		},
		{
			OtherContent, "not-what-was-signed", "The build is not what its release record was made from.",
			"Something changed, added or removed files after signing. Sign last: after packaging, stripping and fix-ups.",
		},
		{
			BadGate, "gate", "The evidence of a required gate is missing, stale or failed.",
			"Hosts are told that every required check has passed. Attach the evidence and sign again; ringwall gate check shows what is there.",
		},
		{
			Privileged, "privileged", "A file gives privileges to whoever runs it.",
			"Set-user-ID, set-group-ID and file capabilities make a small mistake in a program a large one. Prefer a service with the capability, or have the file reviewed by name.",
		},
		{
			Unhardened, "unhardened", "A program lacks an exploit mitigation, or asks for memory that is writable and executable.",
			"Compile and link with -fPIE -pie -Wl,-z,relro,-z,now,-z,noexecstack; find what asks for an executable stack or segment (often assembly without .note.GNU-stack).",
		},
		{
			Unparsable, "unparsable", "A file cannot be parsed, so nobody knows what it is.",
			"It fails closed: a host's kernel or loader may read in it what this check cannot. Rebuild it, or take it out.",
		},
		{
			OtherClassifier, "classifier", "Two versions of the classifier disagree on what a file is.",
			"The record was made, or hosts classify, by other rules than this program's. Sign and verify with the version that the fleet runs, or update the agents first.",
		},
		{
			UnloadablePolicy, "policy", "A policy cannot be loaded, so nothing is known about its hosts.",
			"The file is missing, or this version of the policy language refuses it and agents of this version would, too. Correct it: ringwall policy check.",
		},
		{
			DidNotRun, "did-not-run", "The trial in a guest did not come to its end.",
			"The build could not be installed, a smoke test failed, the guest's kernel cannot enforce, or events were lost. What was not seen never passes. Look at what failed, and run it again.",
		},
		{
			Behaviour, "behaviour", "A program did at run time what the policy refuses.",
			"No content decides this: memory that is writable and executable, code as an argument of an interpreter, attaching to other processes. Change the program, or give it the role for it by a program rule.",
		},
	}
}

// CheckOf returns what an id stands for.
func CheckOf(id ID) (Check, error) {
	for _, c := range Checks() {
		if c.ID == ID(strings.ToUpper(string(id))) {
			return c, nil
		}
	}
	return Check{}, fmt.Errorf("check %.20q (want CSV001 to CSV019): %w", string(id), errs.NotFound)
}

// Severity is what a finding does to a build.
type Severity string

// The severities, from harmless to worst.
const (
	Note  Severity = "note"  // worth knowing
	Warn  Severity = "warn"  // refused under --strict
	Hold  Severity = "hold"  // cannot be decided
	Block Severity = "block" // would not run
)

func (s Severity) rank() int {
	return slices.Index([]Severity{Note, Warn, Hold, Block}, s)
}

// MemberRef is one content of the build.
type MemberRef struct {
	Paths  []string `json:"paths"` // in the build; sorted
	SHA256 string   `json:"sha256,omitempty"`
	Origin string   `json:"origin,omitempty"` // the part of the artefact: data, control, …
}

// Finding is one cause and everything that it hits.
type Finding struct {
	ID       ID       `json:"id"`
	Severity Severity `json:"severity"`
	Cause    string   `json:"cause"`
	Fix      string   `json:"fix"`
	// Members that it is about; empty: the build as a whole, or a cell's policy.
	Members []MemberRef `json:"members"`
	Cells   []int       `json:"cells"` // indices into Report.Cells; empty: wherever the build goes
	Hosts   int         `json:"hosts"` // of those cells
}

// cause is what findings are folded by.
type cause struct {
	id        ID
	severity  Severity
	text, fix string
}

// whole stands for the build itself where a content's number is expected.
const whole = int32(-1)

// ledger collects findings: which cause hits which content in which columns.
// Sets of columns are interned, so that a hundred thousand contents that fail
// alike cost a number each.
type ledger struct {
	causes   []cause
	numbers  map[cause]int32
	sets     [][]int32 // sorted columns; the first is the empty set
	setOf    map[string]int32
	with     map[[2]int32]int32 // set, column → set with it
	hits     map[[2]int32]int32 // content, cause → set
	detached []Finding          // about members that are no content of the build
}

func newLedger() *ledger {
	return &ledger{
		numbers: map[cause]int32{}, sets: [][]int32{nil}, setOf: map[string]int32{"": 0},
		with: map[[2]int32]int32{}, hits: map[[2]int32]int32{},
	}
}

func (l *ledger) number(c cause) int32 {
	n, ok := l.numbers[c]
	if !ok {
		n = int32(len(l.causes)) //nolint:gosec // far fewer than contents
		l.causes, l.numbers[c] = append(l.causes, c), n
	}
	return n
}

// set interns a sorted list of columns.
func (l *ledger) set(columns []int32) int32 {
	key := fmt.Sprint(columns)
	if len(columns) == 0 {
		return 0
	}
	n, ok := l.setOf[key]
	if !ok {
		n = int32(len(l.sets)) //nolint:gosec // bounded by contents
		l.sets, l.setOf[key] = append(l.sets, columns), n
	}
	return n
}

func (l *ledger) add(set, column int32) int32 {
	to, ok := l.with[[2]int32{set, column}]
	if !ok {
		old := l.sets[set]
		if slices.Contains(old, column) {
			return set
		}
		columns := append(slices.Clone(old), column)
		slices.Sort(columns)
		to = l.set(columns)
		l.with[[2]int32{set, column}] = to
	}
	return to
}

// hit notes a cause for a content in a column.
func (l *ledger) hit(content int32, c cause, column int32) {
	at := [2]int32{content, l.number(c)}
	l.hits[at] = l.add(l.hits[at], column)
}

// everywhere notes a cause that no policy changes.
func (l *ledger) everywhere(content int32, c cause) {
	at := [2]int32{content, l.number(c)}
	l.hits[at] = 0
}

// findings folds the hits by cause and columns.
func (l *ledger) findings(contents []content, expand func(columns []int32) (cells []int, hosts int)) []Finding {
	type group struct{ cause, set int32 }
	members := map[group][]int32{}
	for at, set := range l.hits {
		members[group{at[1], set}] = append(members[group{at[1], set}], at[0])
	}
	out := append([]Finding{}, l.detached...) // never null in JSON
	for g, ms := range members {
		slices.Sort(ms)
		c := l.causes[g.cause]
		f := Finding{ID: c.id, Severity: c.severity, Cause: c.text, Fix: c.fix, Members: []MemberRef{}}
		f.Cells, f.Hosts = expand(l.sets[g.set])
		for _, m := range ms {
			if m != whole {
				f.Members = append(f.Members, contents[m].ref())
			}
		}
		slices.SortFunc(f.Members, func(a, b MemberRef) int {
			return cmp.Or(slices.Compare(a.Paths, b.Paths), strings.Compare(a.SHA256, b.SHA256))
		})
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b Finding) int {
		return cmp.Or(b.Severity.rank()-a.Severity.rank(), strings.Compare(string(a.ID), string(b.ID)),
			strings.Compare(a.Cause, b.Cause), strings.Compare(a.Fix, b.Fix), slices.Compare(a.Cells, b.Cells))
	})
	return out
}

// content is one distinct content of the build that is code.
type content struct {
	digest integrity.Digest
	kinds  integrity.KindSet
	inner  bool // what the kernel sees in a compressed module or firmware file
	nested bool // in an archive that is itself a member
	paths  []string
	places []string // of what is nested: the archive's path and its own
	origin string
	facts  *facts // nil: nothing to say
}

func (c *content) ref() MemberRef {
	paths := c.paths
	if c.places != nil {
		paths = c.places
	}
	return MemberRef{Paths: paths, SHA256: c.digest.String(), Origin: c.origin}
}
