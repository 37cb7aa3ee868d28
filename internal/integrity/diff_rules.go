package integrity

import (
	"strings"
)

// describe says in words what a match selects.
func (m *Match) describe() string {
	var out []string
	if len(m.Files) > 0 {
		out = append(out, "files "+enumerate(m.Files))
	}
	if m.Package != "" {
		out = append(out, "package "+m.Package)
	}
	if m.Product != "" {
		out = append(out, "product "+m.Product)
	}
	if len(m.SHA256) > 0 {
		out = append(out, "sha256 "+enumerate(texts(m.SHA256)))
	}
	return strings.Join(out, ", ")
}

func (r Role) names() []string {
	if r == 0 {
		return nil
	}
	return strings.Split(r.String(), ", ")
}

func (d *differ) program(name string, a, b *ProgramRule) {
	where := "programs " + name
	switch {
	case a == nil:
		d.add(Looser, where, "new: "+b.Match.describe()+" may "+b.May.String())
	case b == nil:
		d.add(Stricter, where, "gone: "+a.Match.describe()+" might "+a.May.String())
	default:
		if x, y := a.Match.describe(), b.Match.describe(); x != y {
			d.add(Changed, where, "is for "+y+", was for "+x)
		}
		d.set(where, "right to", a.May.names(), b.May.names(), Looser)
	}
}

func matchesText(ms []Match) []string {
	out := make([]string, len(ms))
	for i := range ms {
		out[i] = ms[i].describe()
	}
	return out
}

func (r Reads) text() string {
	switch r {
	case ReadsAny:
		return "the named script"
	case ReadsCode:
		return "the named script and files with a code suffix"
	case ReadsStrict:
		return "every file outside the data paths"
	}
	return "nothing known"
}

// key is the word as a policy writes it.
func (w Word) key() string { return [...]string{"script", "code", "other"}[min(w, WordOther)] }

func (s Stdin) names() []string {
	var out []string
	for i, n := range []string{"tty", "pipe", "file", "socket", "null"} {
		if s&(StdinTTY<<i) != 0 {
			out = append(out, n)
		}
	}
	return out
}

func (d *differ) interpreter(name string, a, b *InterpreterRule) {
	where := "interpreters " + name
	switch {
	case a == nil:
		d.add(Stricter, where, "new: "+strings.Join(matchesText(b.Match), "; "))
		return
	case b == nil:
		d.add(Looser, where, "gone: what it reads is not checked any more")
		return
	}
	d.set(where, "programs", matchesText(a.Match), matchesText(b.Match), Stricter)
	if a.Reads != b.Reads {
		e := Stricter
		if b.Reads < a.Reads {
			e = Looser
		}
		d.add(e, where, "checks "+b.Reads.text()+", was "+a.Reads.text())
	}
	words := map[Mode]string{ModeOff: "allowed", ModeAudit: "an event", ModeEnforce: "refused"}
	if a.Inline != b.Inline {
		e := Stricter
		if b.Inline < a.Inline {
			e = Looser
		}
		d.add(e, where, "code in arguments is "+words[b.Inline]+", was "+words[a.Inline])
	}
	d.set(where, "code from standard input:", a.Stdin.names(), b.Stdin.names(), Looser)
	d.set(where, "suffix", a.CodeSuffix, b.CodeSuffix, Stricter)
	d.set(where, "quiet byte code", a.Bytecode, b.Bytecode, Changed)
	d.set(where, "variable with code", a.Environment, b.Environment, Stricter)
	d.set(where, "option that names the script", strings.Split(a.ScriptFlags, ""), strings.Split(b.ScriptFlags, ""), Changed)
	if a.Word != b.Word {
		d.add(Changed, where, "takes the first word for "+b.Word.key()+", was "+a.Word.key())
	}
	d.set(where, "data path", a.DataPaths, b.DataPaths, Looser)
	d.set(where, "options with code", append(strings.Split(a.InlineFlags, ""), a.InlineLong...), append(strings.Split(b.InlineFlags, ""), b.InlineLong...), Stricter)
	// taking one for the other hides what comes after
	d.set(where, "options with an argument", append(strings.Split(a.ArgFlags, ""), a.ArgLong...), append(strings.Split(b.ArgFlags, ""), b.ArgLong...), Changed)
	d.set(where, "options for standard input", strings.Split(a.StdinFlags, ""), strings.Split(b.StdinFlags, ""), Changed)
}

func (d *differ) knob(name string, a, b *Knob) {
	where := "knobs " + name
	switch {
	case a == nil:
		d.add(Stricter, where, "new: "+b.describe())
	case b == nil:
		d.add(Looser, where, "gone: "+a.describe())
	case *a != *b:
		d.add(Changed, where, "is "+b.describe()+", was "+a.describe())
	}
}

func (k *Knob) describe() string {
	s := k.Rule + " " + k.Want
	if k.Apply {
		return s + ", applied"
	}
	return s + ", reported"
}
