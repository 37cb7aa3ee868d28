package csv

import (
	"fmt"
	"io"
	"strings"

	"ringwall/internal/integrity"
)

// How much of a finding is printed for people.
const (
	shownDirectories = 8
	shownNames       = 4
	foldTo           = 16 // directories
)

// Quote makes a name from a build safe to print; it is the caller's, who knows
// where the text goes.
type Quote func(string) string

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer, quote Quote) {
	a := r.Artefact
	fmt.Fprintf(w, "CSV  %s", quote(a.Name))
	if a.Package != "" {
		fmt.Fprintf(w, " (%s %s)", quote(a.Package), quote(a.Version))
	}
	fmt.Fprintf(w, "\n     %s, sha256 %s\n", a.Format, a.SHA256)
	switch {
	case r.Release != nil:
		fmt.Fprintf(w, "     release %s %s, epoch %d, signed by %s at %s\n",
			quote(r.Release.Product), quote(r.Release.Version), r.Release.Epoch, quote(r.Release.Identity), utc(r.Release.SignedAt))
	case a.Archive != "":
		fmt.Fprintf(w, "     a package of archive %s, taken at its word; a host asks the archive's signature\n", quote(a.Archive))
	default:
		fmt.Fprintln(w, "     no release record that any policy believes")
	}
	if r.Catalogue != "" { // it was read to its end
		fmt.Fprintf(w, "     %s files, %s contents of code:", thousands(r.Files), thousands(r.Contents))
		for _, k := range integrity.Kinds() {
			if n := r.Kinds[k.String()]; n > 0 {
				fmt.Fprintf(w, " %s %s", k, thousands(n))
			}
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
	r.table(w, quote)
	for i := range r.Findings {
		r.finding(w, &r.Findings[i], quote)
	}
	for _, u := range r.Unchecked {
		fmt.Fprintf(w, "not checked  %s\n", quote0(u))
	}
	fmt.Fprintf(w, "\nRESULT  %s\n", r.Sentence())
}

// quote0 keeps a sentence of ours in one line; names in it were clean or are
// printed by a writer that spells control characters out.
func quote0(s string) string { return strings.Join(strings.Fields(s), " ") }

func (r *Report) table(w io.Writer, quote Quote) {
	rows := [][]string{{"RING", "HOSTS", "POLICY", "ALLOWED", "BLOCKED", "LOGGED", "FINDINGS", ""}}
	for i := range r.Cells {
		c := &r.Cells[i]
		ring, hosts := quote(c.Ring), thousands(c.Hosts)
		if c.NotLive {
			ring, hosts = "-", "-"
		}
		fate := map[Severity]string{Block: "would block", Hold: "cannot decide", Warn: "warnings"}[c.Outcome]
		rows = append(rows, []string{
			ring, hosts, c.label(), thousands(c.Allowed), thousands(c.Blocked), thousands(c.Logged), thousands(c.Findings), fate,
		})
	}
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], len([]rune(cell)))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", width[i]-len([]rune(cell)))
			if i == 0 || i == 2 || i == len(row)-1 {
				line.WriteString(cell + pad)
			} else {
				line.WriteString(pad + cell)
			}
			line.WriteString("  ")
		}
		fmt.Fprintf(w, "  %s\n", strings.TrimRight(line.String(), " "))
	}
	fmt.Fprintln(w)
}

func (r *Report) finding(w io.Writer, f *Finding, quote Quote) {
	fmt.Fprintf(w, "%-5s %s  %s\n", strings.ToUpper(string(f.Severity)), f.ID, quote0(f.Cause))
	if where := r.where(f); where != "" {
		fmt.Fprintf(w, "      where: %s\n", where)
	}
	dirs := f.folded(foldTo)
	for i, d := range dirs {
		if i == shownDirectories {
			fmt.Fprintf(w, "      … and %d more directories\n", len(dirs)-i)
			break
		}
		fmt.Fprintf(w, "      %s\n", d.text(quote))
	}
	fmt.Fprintf(w, "      fix: %s\n", quote0(f.Fix))
}

// text is a directory's members in a line.
func (d *directory) text(quote Quote) string {
	full := func(n string) string {
		if d.name == "." {
			return n
		}
		return d.name + "/" + n
	}
	if len(d.names) == 1 {
		return quote(full(d.names[0]))
	}
	var names []string
	for _, n := range d.names[:min(shownNames, len(d.names))] {
		names = append(names, quote(n))
	}
	text := fmt.Sprintf("%s (%s): %s", quote(d.name+"/"), thousands(len(d.names)), strings.Join(names, ", "))
	if len(d.names) > shownNames {
		text += ", …"
	}
	return text
}

// WriteMarkdown writes the report for a merge request's comment.
func (r *Report) WriteMarkdown(w io.Writer) {
	m := escapeMarkdown
	fmt.Fprintf(w, "### CSV: %s\n\n**%s** · `%s` · sha256 `%s`\n\n", m(r.Artefact.Name), r.Sentence(), code(r.Artefact.Name), r.Artefact.SHA256)
	fmt.Fprint(w, "| ring | hosts | policy | allowed | blocked | logged | result |\n|---|---:|---|---:|---:|---:|---|\n")
	for i := range r.Cells {
		c := &r.Cells[i]
		ring, hosts := m(c.Ring), thousands(c.Hosts)
		if c.NotLive {
			ring, hosts = "–", "–"
		}
		fate := map[Severity]string{Block: "**would block**", Hold: "**cannot decide**", Warn: "warnings", Note: "pass"}[c.Outcome]
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s |\n", ring, hosts, m(c.label()), thousands(c.Allowed), thousands(c.Blocked), thousands(c.Logged), fate)
	}
	fmt.Fprintln(w)
	for i := range r.Findings {
		f := &r.Findings[i]
		fmt.Fprintf(w, "- **%s %s**: %s", f.Severity, f.ID, m(f.Cause))
		if where := r.where(f); where != "" {
			fmt.Fprintf(w, " (%s)", m(where))
		}
		fmt.Fprintf(w, "  \n  fix: %s\n", m(f.Fix))
		for i, d := range f.folded(foldTo) {
			if i == shownDirectories {
				fmt.Fprintln(w, "  - …")
				break
			}
			fmt.Fprintf(w, "  - `%s`\n", code(d.text(func(s string) string { return s })))
		}
	}
	if len(r.Unchecked) > 0 {
		fmt.Fprint(w, "\nNot checked:\n\n")
		for _, u := range r.Unchecked {
			fmt.Fprintf(w, "- %s\n", m(u))
		}
	}
}

// escapeMarkdown keeps text from a build from being markup.
func escapeMarkdown(s string) string {
	var b strings.Builder
	for _, c := range strings.Join(strings.Fields(s), " ") {
		if strings.ContainsRune("\\`*_{}[]<>()#+!|~&@", c) && c != '(' && c != ')' && c != '+' {
			b.WriteByte('\\')
		}
		b.WriteRune(printableRune(c))
	}
	return b.String()
}

// code keeps text within a code span and a table's cell.
func code(s string) string {
	return strings.Map(func(c rune) rune {
		if c == '`' || c == '|' {
			return '\''
		}
		return printableRune(c)
	}, s)
}

func printableRune(c rune) rune {
	if c < ' ' || c >= 0x7f && c < 0xa0 || c >= 0x200b && c <= 0x200f || c >= 0x202a && c <= 0x202e || c >= 0x2066 && c <= 0x2069 {
		return '?'
	}
	return c
}
