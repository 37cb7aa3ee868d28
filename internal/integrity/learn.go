package integrity

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"ringwall/internal/pki"
	"ringwall/internal/strictyaml"
)

// LearnInput is what was found on a running host.
type LearnInput struct {
	Name     string // of the policy; "" is "learned"
	Epoch    uint64 // 0 is 1
	Trust    Trust  // the authorities and archives that the packages and releases verified against
	Packages []LearnedPackage
	Releases []Origin      // verified releases whose content is on the host
	Files    []LearnedFile // executables that no package and no release lists
	Programs []LearnedProgram
}

// LearnedPackage is an installed package.
type LearnedPackage struct {
	Archive string // whose signature chain verified; "" if none did
	Name    string
	Version string
	// Altered is how many of its files differ from the package. They are not
	// authorised by it.
	Altered int
}

// LearnedFile is an executable of unknown origin.
type LearnedFile struct {
	SHA256 Digest
	Path   string
	Kinds  KindSet // as classified
	Uses   int     // events that it stands in; 0: only seen on disk
}

// LearnedProgram is a program that events show doing what needs a role.
type LearnedProgram struct {
	Path    string
	SHA256  Digest
	Package string // that lists it; else
	Product string // that lists it; else it is named by SHA256
	Does    Role
}

// maxLearned is how many files Learn lists by digest in one directory. More
// than that is software, and should be signed as such.
const maxLearned = 100

// Learn writes a first policy for a host: commented YAML, in mode audit, for a
// person to read and change. It allows the packages of archives that verified
// as a whole and releases by signer; files of unknown origin it lists by
// digest with their paths, or, where a directory has many, recommends to sign
// them. ParsePolicy reads the result. errs.Invalid if the input makes no valid
// policy.
func Learn(in LearnInput) ([]byte, error) {
	base, err := parseBaseline()
	if err != nil {
		return nil, fmt.Errorf("learn: %w", err)
	}
	w := &learner{in: &in, base: base, taken: map[string]int{}}
	w.line("# A first policy for this host, learned from what is installed and what ran.")
	w.line("# It refuses nothing yet. Read it, remove what should not be there, and sign it")
	w.line("# with `ringwall policy sign`. When its events have become quiet: mode: enforce.")
	w.line("version: 1")
	w.line("name: %s", cmp.Or(in.Name, "learned"))
	w.line("epoch: %d", cmp.Or(in.Epoch, 1))
	w.line("baseline: 1")
	w.line("mode: audit")
	w.trust()
	w.allow()
	w.programs()
	w.interpreters()
	if _, err := ParseNamed("learned policy", w.b.Bytes()); err != nil {
		return nil, fmt.Errorf("learn: %w", err)
	}
	return w.b.Bytes(), nil
}

type learner struct {
	in    *LearnInput
	base  *Policy // the built-in part
	b     bytes.Buffer
	taken map[string]int // rule names
}

func (w *learner) line(format string, a ...any) { fmt.Fprintf(&w.b, format+"\n", a...) }

// quote makes a YAML text in double quotes.
func quote(s string) string { return strconv.QuoteToASCII(strings.ToValidUTF8(s, "?")) }

func quoteAll(ss []string) string {
	out := make([]string, len(ss))
	for i := range ss {
		out[i] = quote(ss[i])
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// remark makes a text fit for a comment.
func remark(s string) string {
	q := quote(s)
	return q[1 : len(q)-1]
}

// rule makes a name that no other rule has.
func (w *learner) rule(s string) string {
	s = strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-' {
			return c
		}
		return '-'
	}, strings.ToLower(s))
	s = strings.Trim(s[:min(len(s), 50)], "-.")
	switch s {
	case "":
		s = "rule"
	case "true", "false", "null", "yes", "no", "on", "off", "y", "n":
		s = "rule-" + s // in YAML, no text
	}
	if s[0] < 'a' { // it may be a number, or a time
		s = "rule-" + s
	}
	name := s
	for n := 2; w.taken[name] > 0; n++ {
		name = fmt.Sprintf("%s-%d", s, n) // after the cut, or it would be cut off again
	}
	w.taken[name] = 1
	return name
}

func (w *learner) block(indent int, key, text string) {
	pad := strings.Repeat(" ", indent)
	w.line("%s%s: |", pad, key)
	for l := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		w.line("%s  %s", pad, l)
	}
}

func (w *learner) trust() {
	t := &w.in.Trust
	if len(t.Authorities)+len(t.Timestamps)+len(t.Archives) == 0 {
		return
	}
	w.line("\n# Who may sign what.\ntrust:")
	if len(t.Authorities) > 0 {
		w.line("  authorities:")
	}
	for i := range t.Authorities {
		a := &t.Authorities[i]
		w.line("    - name: %s\n      signs: [%s]", quote(a.Name), strings.Join(a.Signs, ", "))
		w.block(6, "certificate", string(pki.EncodeCertificate(a.Certificate)))
	}
	if len(t.Timestamps) > 0 {
		w.line("  timestamps:")
	}
	for i := range t.Timestamps {
		w.line("    - name: %s", quote(t.Timestamps[i].Name))
		w.block(6, "certificate", string(pki.EncodeCertificate(t.Timestamps[i].Certificate)))
	}
	if len(t.Logs) > 0 {
		w.line("  logs:")
	}
	for i := range t.Logs {
		w.line("    - name: %s\n      key: %s", quote(t.Logs[i].Name), t.Logs[i].String())
	}
	if len(t.Archives) > 0 {
		w.line("  archives:")
	}
	for i := range t.Archives {
		a := &t.Archives[i]
		w.line("    - name: %s\n      origins: %s", quote(a.Name), quoteAll(a.Origins))
		keys := string(a.Keyring)
		if !strings.HasPrefix(keys, "-----") {
			keys = fold(base64.StdEncoding.EncodeToString(a.Keyring), 100)
		}
		w.block(6, "keyring", keys)
	}
}

func fold(s string, n int) string {
	var b strings.Builder
	for len(s) > n {
		b.WriteString(s[:n] + "\n")
		s = s[n:]
	}
	return b.String() + s
}

func (w *learner) allow() {
	w.line("\nallow:")
	w.packages()
	w.releases()
	w.files()
	if len(w.taken) == 0 { // no rule, perhaps comments
		w.line("  [] # nothing verified was found")
	}
}

func (w *learner) packages() {
	count := map[string]int{}
	var unverified, altered []string
	for _, p := range w.in.Packages {
		if p.Archive == "" {
			unverified = append(unverified, p.Name+" "+p.Version)
			continue
		}
		count[p.Archive]++
		if p.Altered > 0 {
			altered = append(altered, fmt.Sprintf("%s %s: %d", p.Name, p.Version, p.Altered))
		}
	}
	for i := range w.in.Trust.Archives {
		a := w.in.Trust.Archives[i].Name
		if count[a] == 0 {
			continue
		}
		w.line("  # %d packages whose signature chain verified. To allow only some, list their names.", count[a])
		w.line("  - {rule: %s, package: {archive: %s, names: [\"*\"]}}", w.rule("packages-"+a), quote(a))
	}
	w.comment("  # Packages from nowhere that is trusted; none of their files is allowed. Trust\n  # their archive, or sign them with `ringwall sign DEB`:", unverified)
	w.comment("  # Packages with files that are not as they were installed; those are not allowed:", altered)
}

func (w *learner) comment(head string, items []string) {
	if len(items) == 0 {
		return
	}
	slices.Sort(items)
	w.line("%s", head)
	for _, s := range items {
		w.line("  #   %s", remark(s))
	}
}

func (w *learner) releases() {
	type key struct{ authority, identity, product string }
	low := map[key]uint32{}
	for i := range w.in.Releases {
		o := &w.in.Releases[i]
		k := key{o.Authority, o.Identity, o.Product}
		if e, ok := low[k]; !ok || o.Epoch < e {
			low[k] = o.Epoch
		}
	}
	keys := make([]key, 0, len(low))
	for k := range low {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		return cmp.Or(cmp.Compare(a.product, b.product), cmp.Compare(a.identity, b.identity), cmp.Compare(a.authority, b.authority))
	})
	for _, k := range keys {
		w.line("  - rule: %s", w.rule(k.product))
		s := fmt.Sprintf("authority: %s, identity: %s, product: %s", quote(k.authority), quote(k.identity), quote(k.product))
		if low[k] > 0 {
			s += fmt.Sprintf(", min_epoch: %d", low[k])
		}
		w.line("    signer: {%s}", s)
	}
}

// byPath returns the files in order of path, each content once in a directory.
func (w *learner) byPath() map[string][]LearnedFile {
	files := slices.Clone(w.in.Files)
	slices.SortFunc(files, func(a, b LearnedFile) int {
		return cmp.Or(cmp.Compare(a.Path, b.Path), bytes.Compare(a.SHA256[:], b.SHA256[:]))
	})
	out := map[string][]LearnedFile{}
	for _, f := range files {
		dir := path.Dir(f.Path)
		if !slices.ContainsFunc(out[dir], func(o LearnedFile) bool { return o.SHA256 == f.SHA256 }) {
			out[dir] = append(out[dir], f)
		}
	}
	return out
}

func (w *learner) files() {
	dirs := w.byPath()
	if len(dirs) == 0 {
		return
	}
	w.line("  # Files that no package and no release lists. A digest ends with the next update")
	w.line("  # of the file; software that is updated should be signed: `ringwall sign DIR`.")
	for _, dir := range sortedKeys(dirs) {
		files := dirs[dir]
		if len(files) > maxLearned {
			w.line("  # %s: %d executables. Too many to list: sign them with", remark(dir), len(files))
			w.line("  #   ringwall sign %s", remark(quote(dir)))
			continue
		}
		w.line("  - rule: %s\n    sha256:", w.rule("files"+dir))
		for _, f := range files {
			use := "not seen running"
			if f.Uses > 0 {
				use = fmt.Sprintf("used %d times", f.Uses)
			}
			w.line("      - \"%s\" # %s: %s, %s", f.SHA256, remark(f.Path), f.Kinds, use)
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func (w *learner) programs() {
	w.taken = map[string]int{} // programs have names of their own, those of the baseline among them
	base := w.base
	for i := range base.Programs {
		w.taken[base.Programs[i].Rule] = 1
	}
	ps := slices.Clone(w.in.Programs)
	slices.SortFunc(ps, func(a, b LearnedProgram) int {
		return cmp.Or(cmp.Compare(a.Path, b.Path), bytes.Compare(a.SHA256[:], b.SHA256[:]))
	})
	head := "\n# Programs that were seen doing what others may not. Remove those that need not.\nprograms:"
	for _, p := range ps {
		may := p.Does &^ RoleAgent
		o := Object{Kind: KindExec, SHA256: p.SHA256, Memberships: []Membership{{
			Origin: &Origin{Package: p.Package, Product: p.Product}, Kinds: SetOf(KindExec), Names: []string{strings.TrimPrefix(p.Path, "/")},
		}}}
		base.index().eachMatch(&o, &o.Memberships[0], func(m *match) {
			if m.program >= 0 {
				may &^= base.Programs[m.program].May // the baseline says so already
			}
		})
		if may == 0 {
			continue
		}
		if head != "" {
			w.line("%s", head)
			head = ""
		}
		m := fmt.Sprintf("sha256: [\"%s\"]", p.SHA256)
		file := quote(glob(strings.TrimPrefix(p.Path, "/")))
		switch {
		case !isLine(p.Path) || !isLine(p.Package): // no policy can name it
			if p.SHA256.IsZero() {
				continue
			}
		case p.Package != "":
			m = fmt.Sprintf("files: [%s], package: %s", file, quote(glob(p.Package)))
		case p.Product != "":
			m = fmt.Sprintf("files: [%s], product: %s", file, quote(p.Product))
		}
		w.line("  - {rule: %s, match: {%s}, may: [%s]} # %s", w.rule(path.Base(p.Path)), m, strings.Join(may.names(), ", "), remark(p.Path))
	}
}

// isLine says whether a policy can hold s as a text.
func isLine(s string) bool {
	return len(s) < strictyaml.MaxText/2 && utf8.ValidString(s) && !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f })
}

// glob makes a pattern that matches only s.
func glob(s string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(s)
}

// interpreters finds interpreters among the files of unknown origin: without a
// rule of their own they would read anything.
func (w *learner) interpreters() {
	found := map[string][]LearnedFile{}
	rules := w.base.Interpreters
	for _, files := range w.byPath() {
		for _, f := range files {
			if !f.Kinds.Has(KindExec) {
				continue
			}
			for i := range rules {
				if slices.ContainsFunc(rules[i].Match, func(m Match) bool {
					return slices.ContainsFunc(m.Files, func(p string) bool { return globs(path.Base(p), path.Base(f.Path)) && path.Base(p) != "*" })
				}) {
					found[rules[i].Name] = append(found[rules[i].Name], f)
				}
			}
		}
	}
	head := "\n# Interpreters among those files, by their names: checked like the packaged ones.\ninterpreters:"
	for i := range rules {
		files := found[rules[i].Name]
		if len(files) == 0 {
			continue
		}
		slices.SortFunc(files, func(a, b LearnedFile) int {
			return cmp.Or(bytes.Compare(a.SHA256[:], b.SHA256[:]), cmp.Compare(a.Path, b.Path))
		})
		files = slices.CompactFunc(files, func(a, b LearnedFile) bool { return a.SHA256 == b.SHA256 })
		if head != "" {
			w.line("%s", head)
			head = ""
		}
		w.interpreter(&rules[i], files)
	}
}

func (w *learner) interpreter(r *InterpreterRule, files []LearnedFile) {
	digests := make([]string, len(files))
	for i, f := range files {
		digests[i] = f.SHA256.String()
		w.line("  # %s", remark(f.Path))
	}
	inline := map[Mode]string{ModeOff: "allow", ModeAudit: "audit", ModeEnforce: "deny"}[r.Inline]
	reads := map[Reads]string{ReadsAny: "any", ReadsCode: "code", ReadsStrict: "strict"}[r.Reads]
	w.line("  - name: %s-local\n    match: [{sha256: %s}]\n    reads: %s\n    inline: %s", r.Name, quoteAll(digests), reads, inline)
	w.line("    stdin: [%s]", strings.Join(r.Stdin.names(), ", "))
	w.line("    options: {inline: %s, argument: %s, stdin: %s, script: %s, word: %s, inline_long: %s, argument_long: %s, environment: %s}", quote(r.InlineFlags),
		quote(r.ArgFlags), quote(r.StdinFlags), quote(r.ScriptFlags), r.Word.key(), quoteAll(r.InlineLong), quoteAll(r.ArgLong), quoteAll(r.Environment))
	w.line("    suffixes: %s\n    bytecode: %s\n    data: %s", quoteAll(r.CodeSuffix), quoteAll(r.Bytecode), quoteAll(r.DataPaths))
}
