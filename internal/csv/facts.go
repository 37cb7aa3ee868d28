package csv

import (
	"fmt"
	"path"
	"slices"

	"ringwall/internal/integrity"
)

// static notes what no policy changes.
func (j *judge) static() {
	for i := range j.b.contents {
		c := &j.b.contents[i]
		if c.facts == nil || c.inner {
			continue
		}
		n, f := int32(i), c.facts
		if f.bad != "" {
			j.l.everywhere(n, cause{Unparsable, Block, "it cannot be parsed: " + f.bad, "build it again, or take it out; a host may read in it what this check cannot"})
		}
		if f.setID {
			j.l.everywhere(n, cause{Privileged, Warn, "it is set-user-ID or set-group-ID", "take the mode bit off, and give the privilege to a service; or have the file reviewed by name"})
		}
		if f.caps {
			j.l.everywhere(n, cause{Privileged, Warn, "it has file capabilities", "give the capability to a service (AmbientCapabilities=) instead; or have the file reviewed by name"})
		}
		for _, m := range f.makes {
			j.makes(n, m)
		}
		if f.elf != nil {
			j.hardening(n, c, f.elf)
		}
		if f.shebang != nil && f.payload != "" {
			j.l.everywhere(n, cause{Payload, Warn, "it is " + f.payload + ", which it may unpack and run", "ship what is inside as files of their own"})
		}
	}
	for _, a := range j.b.unread {
		if base := path.Ext(a.member.Path); base == ".jar" || base == ".war" || base == ".ear" || base == ".pyz" || base == ".egg" {
			continue // its interpreter reads it as one file, which is listed
		}
		j.l.detached = append(j.l.detached, Finding{
			ID: Payload, Severity: Warn, Cause: "it is a " + a.format + " archive that nobody looked into: code in it would not be authorised once it is unpacked",
			Fix: "ship what is inside as files of their own", Cells: []int{},
			Members: []MemberRef{{Paths: []string{a.member.Path}, Origin: a.member.Origin}},
		})
	}
	j.l.detached = fold(j.l.detached)
}

// fold unites findings that differ by their members only.
func fold(in []Finding) []Finding {
	var out []Finding
	for _, f := range in {
		i := slices.IndexFunc(out, func(o Finding) bool { return o.ID == f.ID && o.Cause == f.Cause && o.Fix == f.Fix })
		if i < 0 {
			out = append(out, f)
			continue
		}
		out[i].Members = append(out[i].Members, f.Members...)
	}
	return out
}

func (j *judge) makes(n int32, m made) {
	switch m.kind {
	case madeFetched:
		j.l.everywhere(n, cause{MadeAtInstall, Warn, "it runs " + m.command + ", which brings " + m.what, "put them into the build, so that they are signed with it"})
	case madeCode:
		j.l.everywhere(n, cause{MadeAtInstall, Warn, "it runs " + m.command + ", which leaves " + m.what + " on the host", "make them at build time and ship them"})
	case madeCaps:
		j.l.everywhere(n, cause{Privileged, Warn, "it runs setcap, which gives a file capabilities", "give the capability to a service (AmbientCapabilities=) instead; or have the file reviewed by name"})
	}
}

func (j *judge) hardening(n int32, c *content, e *elfFacts) {
	weak := func(text, fix string) { j.l.everywhere(n, cause{Unhardened, Warn, text, fix}) }
	if e.fixed && c.kinds.Has(integrity.KindExec) {
		weak("it is not position-independent, so its addresses are no secret", "compile with -fPIE and link with -pie (Go: -buildmode=pie)")
	}
	if e.dynamic && !e.relro {
		weak("it has no RELRO: its tables of function addresses stay writable", "link with -Wl,-z,relro,-z,now")
	}
	if e.textrel {
		weak("it has text relocations: the loader must write to its code", "compile everything in it with -fPIC")
	}
}

// facts asks a policy about what the kernel refuses in a file that is
// authorised, and about what its scripts leave behind.
func (q *questions) facts(i int32, f *facts, roles integrity.Role) {
	p := q.c.Policy
	hit := func(c cause) { q.j.l.hit(i, c, q.col.n) }
	if e := f.elf; e != nil && roles&integrity.RoleJIT == 0 {
		severity, fate := Warn, "a policy that protects memory refuses it"
		if p.Process.Memory == integrity.ModeEnforce {
			severity, fate = Block, "the policy refuses such memory (memory: enforce)"
		}
		if e.rwx {
			hit(cause{Unhardened, severity, "a segment of it is writable and executable at once; " + fate, "link it with separate segments (ld --no-omagic, no -N); if it makes code itself, give it the role jit by a program rule"})
		}
		if e.execStack {
			hit(cause{Unhardened, severity, "it asks for an executable stack; " + fate, "link with -Wl,-z,noexecstack; assembly needs a .note.GNU-stack section"})
		}
		if e.packed != "" {
			hit(cause{Payload, severity, fmt.Sprintf("it is packed with %s and unpacks its code in memory; %s", e.packed, fate), "ship it unpacked"})
		}
	}
	for _, m := range f.makes {
		q.made(m, hit)
	}
}

func (q *questions) made(m made, hit func(cause)) {
	p := q.c.Policy
	text := "it runs " + m.command + ", which makes " + m.what + " on the host"
	switch m.kind {
	case madeBytecode:
		quiet := slices.ContainsFunc(p.Interpreters, func(r integrity.InterpreterRule) bool { return len(r.Bytecode) > 0 })
		if !quiet && p.Modes[integrity.KindScript] != integrity.ModeOff {
			hit(cause{MadeAtInstall, Warn, text + "; the policy has no rule for it, so each read of it is refused", "give the policy baseline: 1, whose python rule passes over byte code (key bytecode); or ship .pyc files made with --invalidation-mode checked-hash"})
		}
	case madeModule:
		severity := Warn
		if p.Modes[integrity.KindModule] == integrity.ModeEnforce {
			severity = Block
		}
		hit(cause{MadeAtInstall, severity, text + ", and nobody lists them", "build the modules with the kernel's key in the pipeline and ship them signed"})
	case madeKexec:
		severity := Note
		if p.Modes[integrity.KindKexec] == integrity.ModeEnforce {
			severity = Warn
		}
		hit(cause{MadeAtInstall, severity, text + ": it boots, but kexec into it is refused", "authorise it by a rule with its SHA-256 where hosts use kexec"})
	}
}
