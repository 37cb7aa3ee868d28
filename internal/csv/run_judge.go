package csv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Trial is a candidate that was installed and used in a guest.
type Trial struct {
	Candidate Candidate
	Cell      Cell // whose policy the guest had, in audit mode
	Run       *Run
	// Notes are what the trial could not do, for the report's "not checked".
	Notes []string
}

// JudgeRun turns what a guest reported into a report like Verify's: each event
// is judged by the live policy with its own modes. What the candidate holds and
// did not use in the guest is not asked.
func JudgeRun(ctx context.Context, t Trial, o Options) (*Report, error) {
	v := &Inventory{Cells: []Cell{t.Cell}}
	if t.Cell.Ring != "" {
		v.Rings = []string{t.Cell.Ring}
	}
	j := &judge{ctx: ctx, c: t.Candidate, o: o, l: newLedger(), refusals: map[refusal]cause{}}
	columns, trusts := j.plan(v)
	j.progress("reading the build")
	b, member, err := inspect(t.Candidate.Source, lists(t.Candidate.Release), trusts)
	if err != nil {
		if !errors.Is(err, errs.Invalid) {
			return nil, fmt.Errorf("csv: %w", err)
		}
		return j.unreadable(v, member, err), nil
	}
	j.b, j.subject = b, t.Candidate.Subject()
	for _, n := range t.Notes {
		j.note("%s", n)
	}
	j.note("what the build holds and did not run in the guest: ringwall csv verify asks about all of it")
	col := columns[0]
	live, err := t.Cell.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("csv: policy: %w", err)
	}
	p := live.Policy
	c, err := integrity.Compile(p, live.Sources, integrity.CompileOptions{Now: o.Now})
	if err != nil {
		return nil, fmt.Errorf("csv: policy: %w", err)
	}
	col.live, col.name, col.epoch, col.digest, col.modes = true, p.Name, p.Epoch, p.Digest, p.Modes
	r := &runJudge{judge: j, q: &questions{j: j, col: col, c: c, origin: j.believe(col, p)}, at: map[integrity.Digest]int32{}, seen: map[string]bool{}}
	for i := range b.contents {
		r.at[b.contents[i].digest] = int32(i)
	}
	for i := range t.Run.Events {
		r.event(&t.Run.Events[i])
	}
	r.ended(t.Run)
	col.blocked, col.logged = r.blocked, r.logged
	j.l.soften(col)
	j.l.detached = fold(j.l.detached)
	report := j.report(v)
	report.Cells[0].Kernel = cmp.Or(t.Run.Kernel, t.Cell.Kernel)
	return report, nil
}

// runJudge judges a guest's events.
type runJudge struct {
	*judge
	q       *questions
	at      map[integrity.Digest]int32 // the build's contents
	seen    map[string]bool            // findings and what they hit
	image   []string                   // files of the image itself that were refused before the candidate was there
	blocked int
	logged  int
}

// event makes a finding of an event, or none.
func (r *runJudge) event(e *RunEvent) {
	switch e.Reason {
	case "unlisted", "no-identity":
		r.used(e)
	default:
		if e.Phase != PhaseBoot {
			r.behaved(e)
		}
	}
}

// used judges content that was used as code.
func (r *runJudge) used(e *RunEvent) {
	kind, err := integrity.ParseKind(e.Kind)
	if err != nil {
		kind = integrity.KindExec // the strictest of them
	}
	digest, err := integrity.ParseDigest(e.SHA256)
	i, ours := int32(-1), false
	var v integrity.Verdict
	if err == nil {
		i, ours = r.at[digest]
		var o integrity.Object
		if ours {
			o = r.q.object(i)
		} else {
			o = r.q.c.Object(kind, integrity.Key{Digest: digest})
		}
		o.Kind = kind
		v = r.q.c.Evaluate(&o, r.o.Now)
	} else {
		v.Mode, v.Reason = r.q.c.Policy.Modes[kind], "nobody could say what it was"
	}
	if v.Allow || v.Mode == integrity.ModeOff {
		return // authorised by the live policy; or the guest's kernel had not measured it yet
	}
	if e.Phase == PhaseBoot {
		if !ours && !slices.Contains(r.image, e.Path) {
			r.image = append(r.image, e.Path)
		}
		return
	}
	c := r.causeOfUse(e, kind, &v, i, ours)
	ref := MemberRef{Paths: []string{strings.TrimPrefix(cmp.Or(e.Path, e.Detail, "?"), "/")}, SHA256: e.SHA256, Origin: "guest"}
	if ours {
		ref = r.b.contents[i].ref()
	}
	if r.find(c, ref) && (ours || !e.Old) {
		if c.severity == Block {
			r.blocked++
		} else {
			r.logged++
		}
	}
}

// causeOfUse tells what the build brings from what was made in the guest, and
// from what the image had.
func (r *runJudge) causeOfUse(e *RunEvent, kind integrity.Kind, v *integrity.Verdict, i int32, ours bool) cause {
	severity, would := Block, "is refused"
	if v.Mode != integrity.ModeEnforce {
		severity, would = Warn, "would be refused once the policy enforces"
	}
	when := map[string]string{PhaseInstall: "while the build was installed", PhaseSmoke: "by the smoke test"}[e.Phase]
	switch {
	case ours:
		o := r.q.origin
		listed := o != nil && (o.Package != "" || r.signed != nil && r.signed.index[i] >= 0)
		c := r.q.causeOf(v, listed, r.q.denies(v))
		c.text = fmt.Sprintf("the build brings it, it was used as %s %s, and %s: %s", kind, when, would, v.Reason)
		if !listed && r.c.Release != nil && c.id == Unauthorised {
			c.fix = "sign the build as it ships: the release record does not list it"
		}
		return c
	case e.Old:
		return cause{
			Unauthorised, Warn, fmt.Sprintf("the image's own file was used as %s %s, and %s: %s", kind, when, would, v.Reason),
			"take an image of what hosts have, and say what stands behind it with --host-package and --host-release",
		}
	}
	return cause{
		MadeAtInstall, severity,
		fmt.Sprintf("it is not in the build: it was made in the guest, used as %s %s, and %s: nobody lists it", kind, when, would),
		"make it at build time and ship it, so that it is signed with the build; or authorise it by a rule of its own",
	}
}

// behaved judges what a program did.
func (r *runJudge) behaved(e *RunEvent) {
	mode := r.modeOf(e.Reason)
	if mode == integrity.ModeOff {
		return
	}
	c := cause{Behaviour, Block, fmt.Sprintf("%s did what the policy refuses (%s): %s", cmp.Or(e.Process, "a program"), e.Reason, e.Text), "change the program; or let the policy give it the role for it (key programs)"}
	if mode != integrity.ModeEnforce {
		c.severity, c.text = Warn, c.text+"; refused once the policy enforces"
	}
	path := cmp.Or(e.Path, e.Process, "?")
	r.find(c, MemberRef{Paths: []string{strings.TrimPrefix(path, "/")}, Origin: "guest"})
}

// modeOf is the mode that a reason is refused by.
func (r *runJudge) modeOf(reason string) integrity.Mode {
	p := r.q.c.Policy
	switch reason {
	case "memory-anonymous", "memory-wx", "memory-file", "personality", "userfaultfd":
		return p.Process.Memory
	case "ptrace", "proc-mem":
		return p.Process.Ptrace
	case "block-write":
		return p.Process.BlockWrites
	case "code-write":
		return p.Process.CodeWrites
	case "inline-code", "stdin-code", "arguments":
		return p.Modes[integrity.KindScript]
	case "bpf-load":
		return p.Modes[integrity.KindBPF]
	case "from-memory":
		return max(p.Modes[integrity.KindModule], p.Modes[integrity.KindKexec])
	}
	return integrity.ModeEnforce // guards know no modes
}

// find notes a finding once.
func (r *runJudge) find(c cause, m MemberRef) bool {
	key := fmt.Sprint(c, m)
	if r.seen[key] {
		return false
	}
	r.seen[key] = true
	r.l.detached = append(r.l.detached, Finding{ID: c.id, Severity: c.severity, Cause: c.text, Fix: c.fix, Cells: []int{0}, Hosts: r.q.col.cell.Hosts, Members: []MemberRef{m}})
	return true
}

// ended holds a trial that did not come to its end.
func (r *runJudge) ended(run *Run) {
	hold := func(text, fix string) {
		r.l.everywhere(whole, cause{DidNotRun, Hold, text, fix})
	}
	for _, f := range run.Failed {
		text, fix := "the trial could not be made: "+f.What, "see what it said; the guest's image and kernel must be able to run the agent"
		if f.Command {
			text, fix = "it failed in the guest: "+f.What, "see what it said; the image must hold what the build depends on, there is no network"
		}
		if f.Output != "" {
			text += ": " + strings.Join(strings.Fields(f.Output), " ")
		}
		hold(text, fix)
	}
	if !run.Ended && len(run.Failed) == 0 {
		hold("the guest stopped before it had reported everything", "run it again; more --memory or a longer --timeout may help")
	}
	if run.Lost > 0 {
		hold(fmt.Sprintf("%d events were raised and lost, so nobody knows what they were", run.Lost), "run it again, with more --cpus or a shorter smoke test")
	}
	if run.Blind && r.q.c.Policy.Modes[integrity.KindScript] != integrity.ModeOff {
		r.note("scripts that the image's interpreters read: the guest's agent does not know the image's shell; give its packages with --host-package")
	}
	if n := len(r.image); n > 0 {
		shown := r.image[:min(n, 3)]
		r.note("%d files of the image itself are not authorised by the policy, such as %s: give their packages with --host-package", n, strings.Join(shown, ", "))
	}
}
