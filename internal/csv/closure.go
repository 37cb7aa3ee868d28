package csv

import (
	"fmt"
	"iter"
	"path"
	"slices"
	"strings"

	"ringwall/internal/integrity"
)

// wants are the files that the build needs from its hosts.
type wants struct {
	list   []want
	byBase map[string][]int // by the last part of the name
}

// want is one of them, and who needs it.
type want struct {
	id       ID
	name     string // a path without leading slash, a soname, or env's argument
	as       integrity.Kind
	library  bool
	searched bool // by env, in PATH
	by       []int32
	written  string // as the build has it, for people
}

// newWants collects what the build does not hold itself.
func newWants(b *build) *wants {
	w := &wants{byBase: map[string][]int{}}
	known := map[string]int{}
	own := ownLibraries(b)
	need := func(by int32, x want) {
		key := string(x.id) + x.name
		if x.searched {
			key = "env " + key
		}
		i, ok := known[key]
		if !ok {
			i = len(w.list)
			known[key] = i
			w.list = append(w.list, x)
			for _, base := range alternatives(path.Base(x.name)) {
				w.byBase[base] = append(w.byBase[base], i)
			}
		}
		w.list[i].by = append(w.list[i].by, by)
	}
	for i := range b.contents {
		c := &b.contents[i]
		if c.facts == nil || c.inner || c.nested {
			continue
		}
		n := int32(i)
		if s := c.facts.shebang; s != nil {
			if _, own := b.resolve(s.interp); !own || s.interp == "" {
				need(n, want{id: BadInterpreter, name: s.interp, as: integrity.KindExec, written: s.raw})
			}
			if s.env != "" && !inPath(b, s.env) {
				need(n, want{id: BadInterpreter, name: s.env, as: integrity.KindExec, searched: true, written: "env " + s.env})
			}
		}
		e := c.facts.elf
		if e == nil {
			continue
		}
		if _, own := b.resolve(e.interp); e.interp != "" && !own {
			need(n, want{id: BadInterpreter, name: e.interp, as: integrity.KindLibrary, written: "/" + e.interp})
		}
		for _, so := range e.needed {
			if !own[path.Base(so)] {
				need(n, want{id: MissingLibrary, name: so, as: integrity.KindLibrary, library: true, written: so})
			}
		}
	}
	return w
}

// ownLibraries are the names under which the build's libraries are found: file
// names, sonames and links.
func ownLibraries(b *build) map[string]bool {
	own := map[string]bool{}
	for i := range b.contents {
		c := &b.contents[i]
		if !c.kinds.Has(integrity.KindLibrary) || c.nested {
			continue
		}
		for _, p := range c.paths {
			own[path.Base(p)] = true
		}
		if c.facts != nil && c.facts.elf != nil && c.facts.elf.soname != "" {
			own[c.facts.elf.soname] = true
		}
	}
	for l := range b.links {
		if _, ok := b.resolve(l); ok && strings.Contains(path.Base(l), ".so") {
			own[path.Base(l)] = true
		}
	}
	return own
}

// searchPath is where env finds programs.
func searchPath() []string { return []string{"usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin"} }

func inPath(b *build, name string) bool {
	return slices.ContainsFunc(searchPath(), func(d string) bool {
		_, ok := b.resolve(d + "/" + name)
		return ok
	})
}

// alternatives are the names under which a program is listed whose usual name
// is a link that packages make on the host.
func alternatives(base string) []string {
	switch base {
	case "sh":
		return []string{"sh", "dash", "bash", "busybox"}
	case "awk":
		return []string{"awk", "mawk", "gawk"}
	case "java":
		return []string{"java"}
	}
	return []string{base}
}

// seen is what a cell's sources list of the things wanted.
type seen struct {
	w     *wants
	found map[int][]integrity.Digest
}

func (w *wants) seen() *seen { return &seen{w: w, found: map[int][]integrity.Digest{}} }

// listen looks at files that pass by on their way to the compiler.
func (s *seen) listen(files iter.Seq[integrity.File]) iter.Seq[integrity.File] {
	return func(yield func(integrity.File) bool) {
		for f := range files {
			for _, name := range f.Names {
				s.look(name, f.SHA256)
			}
			if !yield(f) {
				return
			}
		}
	}
}

// look holds a listed name against what is wanted. Versions are passed over:
// libx.so.1.2 is libx.so.1, and python3.11 is python3, by links that the
// sources' lists do not have.
func (s *seen) look(name string, d integrity.Digest) {
	base := path.Base(name)
	for {
		for _, i := range s.w.byBase[base] {
			if s.w.list[i].fits(clean(name)) && !slices.Contains(s.found[i], d) {
				s.found[i] = append(s.found[i], d)
			}
		}
		short := strings.TrimRight(base, "0123456789")
		if short == base {
			short = strings.TrimRight(base, ".")
		}
		if short == base || short == "" {
			return
		}
		base = short
	}
}

// fits says whether a file of that path can be what is wanted.
func (w *want) fits(name string) bool {
	dir := path.Dir(name)
	switch {
	case w.as == integrity.KindLibrary: // loaders, too: distributions link to where they are
		return strings.Contains(dir, "lib") || strings.HasPrefix(dir, "opt")
	case w.searched:
		return slices.Contains(searchPath(), dir)
	}
	return dir == path.Dir(w.name)
}

// closure asks whether the hosts of a column have what the build needs, and
// whether it may run there.
func (q *questions) closure(s *seen) error {
	defer q.unlisted()
	for i := range q.j.wants.list {
		w := &q.j.wants.list[i]
		if w.name == "" {
			q.miss(w, Block, "it names its interpreter by a path that is not absolute ("+w.written+"), which depends on where it is started", "write the whole path after #!")
			continue
		}
		digests := s.found[i]
		if len(digests) > 0 {
			q.may(w, digests)
			continue
		}
		if err := q.ask(w); err != nil {
			return err
		}
	}
	return nil
}

// ask looks for what no source lists in the baseline.
func (q *questions) ask(w *want) error {
	b := q.j.o.Baseline
	if b == nil {
		kind := "interpreter"
		if w.library {
			kind = "library"
		}
		q.j.note("%s %s: neither the build nor a policy's sources list it, and no baseline says whether hosts have it", kind, w.written)
		return nil
	}
	var d integrity.Digest
	var ok bool
	var err error
	switch {
	case w.library:
		d, ok, err = b.Library(w.name)
	case w.searched:
		for _, dir := range searchPath() {
			if d, ok, err = b.File(dir + "/" + w.name); ok || err != nil {
				break
			}
		}
	default:
		d, ok, err = b.File(w.name)
	}
	switch {
	case err != nil:
		return err
	case !ok && w.library:
		q.miss(w, Block, "it needs "+w.written+", which neither the build nor the baseline has", "depend on the package that brings it, or ship it")
	case !ok:
		q.miss(w, Block, "its interpreter "+w.written+" is neither in the build nor in the baseline", "depend on the package that brings it, or correct the path")
	case !d.IsZero():
		q.may(w, []integrity.Digest{d})
	}
	return nil
}

// may asks whether any of the contents that go by the name may run. What may
// not is collected: a cell whose packages nobody named would refuse them all.
func (q *questions) may(w *want, digests []integrity.Digest) {
	mode := q.col.modes[w.as]
	if mode == integrity.ModeOff {
		return
	}
	var last integrity.Verdict
	for _, d := range digests {
		o := q.c.Object(w.as, integrity.Key{Digest: d})
		if last = q.c.Evaluate(&o, q.j.o.Now); last.Allow {
			return
		}
	}
	r := refusedWants{id: w.id, severity: Warn, reason: last.Reason}
	if mode == integrity.ModeEnforce {
		r.severity = Block
	}
	i := slices.IndexFunc(q.refused, func(o refusedWants) bool {
		return o.id == r.id && o.severity == r.severity && o.reason == r.reason
	})
	if i < 0 {
		i = len(q.refused)
		q.refused = append(q.refused, r)
	}
	q.refused[i].wants = append(q.refused[i].wants, w)
}

// refusedWants are those that are refused for one reason.
type refusedWants struct {
	id       ID
	severity Severity
	reason   string
	wants    []*want
}

// unlisted tells of what may not run, once for each reason.
func (q *questions) unlisted() {
	for _, r := range q.refused {
		var names []string
		for _, w := range r.wants {
			names = append(names, w.written)
		}
		slices.Sort(names)
		if n := len(names); n > 12 {
			names = append(names[:11], fmt.Sprintf("and %d more", n-11))
		}
		what := "of the interpreters and loaders that it needs, these are not authorised there: "
		if r.id == MissingLibrary {
			what = "of the libraries that it needs, these are not authorised there: "
		}
		text := what + strings.Join(names, ", ") + " (" + r.reason + ")"
		for _, w := range r.wants {
			q.miss(w, r.severity, text, "let the policy allow the packages that bring them; if it does, give them as packages of the cell (--host-package)")
		}
	}
}

// miss notes a want for everyone who has it. What cannot start is a block; a
// library or script that is only read by some is a warning.
func (q *questions) miss(w *want, severity Severity, text, fix string) {
	for _, n := range w.by {
		s := severity
		c := &q.j.b.contents[n]
		if s == Block && !c.kinds.Has(integrity.KindExec) && !c.facts.install && !runnable(c) {
			s = Warn
		}
		q.j.l.hit(n, cause{w.id, s, text, fix}, q.col.n)
	}
}

// runnable says whether people and services start it by name.
func runnable(c *content) bool {
	return slices.ContainsFunc(c.paths, func(p string) bool { return slices.Contains(searchPath(), path.Dir(clean(p))) })
}
