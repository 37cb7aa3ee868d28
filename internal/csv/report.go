package csv

import (
	"encoding/json"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
)

// reportVersion is that of Report's JSON. Fields are only ever added.
const reportVersion = 1

// Report is what a verification found. Its JSON is stable.
type Report struct {
	Version   int            `json:"version"`
	At        time.Time      `json:"at"`
	Inventory *time.Time     `json:"inventory,omitempty"` // when the cells were listed
	Artefact  ArtefactInfo   `json:"artefact"`
	Release   *ReleaseInfo   `json:"release,omitempty"` // as the first policy that believes it sees it
	Catalogue string         `json:"catalogue"`         // SHA-256 of the one that the build gives
	Files     int            `json:"files"`             // regular files read
	Bytes     int64          `json:"bytes"`
	Contents  int            `json:"contents"` // distinct ones that are code
	Kinds     map[string]int `json:"kinds"`    // files by what they are used as
	Rings     []string       `json:"rings"`
	Cells     []CellResult   `json:"cells"`
	Findings  []Finding      `json:"findings"`
	// Unchecked is what could not be asked for want of input. It is no failure,
	// and nobody should take it for a pass.
	Unchecked    []string `json:"unchecked"`
	Hosts        int      `json:"hosts"`
	HostsBlocked int      `json:"hosts_blocked"`
	Outcome      Severity `json:"outcome"` // the worst; note is a pass
}

// ArtefactInfo names the build.
type ArtefactInfo struct {
	Name    string `json:"name"`
	Format  string `json:"format"`
	SHA256  string `json:"sha256"`
	Package string `json:"package,omitempty"`
	Version string `json:"version,omitempty"`
	Archive string `json:"archive,omitempty"` // that it comes from, taken at its word
}

// ReleaseInfo names the release record.
type ReleaseInfo struct {
	Record   string    `json:"record"`
	Product  string    `json:"product"`
	Version  string    `json:"version"`
	Epoch    uint32    `json:"epoch"`
	Identity string    `json:"identity"`
	SignedAt time.Time `json:"signed_at"`
}

// CellResult is what one cell says. The counts are of contents.
type CellResult struct {
	Ring         string   `json:"ring"`
	Hosts        int      `json:"hosts"`
	Policy       string   `json:"policy"`
	Epoch        uint64   `json:"epoch"`
	PolicySHA256 string   `json:"policy_sha256"`
	Supplements  []string `json:"supplements,omitempty"` // SHA-256 of each
	Agent        string   `json:"agent,omitempty"`
	Kernel       string   `json:"kernel,omitempty"`
	Allowed      int      `json:"allowed"`
	Blocked      int      `json:"blocked"`
	Logged       int      `json:"logged"`     // would be blocked if the policy enforced
	Unasked      int      `json:"unasked"`    // of kinds that the policy has switched off
	Findings     int      `json:"findings"`   // that concern it
	Outcome      Severity `json:"outcome"`    // the worst of them
	NotLive      bool     `json:"not_live"`   // no host runs it yet
	Unloaded     bool     `json:"unloadable"` // nothing is known about it
}

func (j *judge) report(v *Inventory) *Report {
	r := j.frame(v)
	b := j.b
	r.Catalogue, r.Files, r.Bytes, r.Contents, r.Kinds = b.catalogue.Digest().String(), b.built.Files, b.built.Bytes, len(b.contents), b.count()
	for i := range v.Cells {
		col := j.columns[j.cellOf[i]]
		c := &r.Cells[i]
		c.Policy, c.Epoch, c.Unloaded = col.name, col.epoch, !col.live
		if col.live {
			c.PolicySHA256, c.Supplements = col.digest.String(), col.supplements
		}
		c.Allowed, c.Blocked, c.Logged, c.Unasked = col.allowed, col.blocked, col.logged, col.off
	}
	for _, col := range j.columns {
		if rel := col.release; rel != nil {
			r.Release = &ReleaseInfo{rel.Record.String(), rel.Product, rel.Version, rel.Epoch, rel.Identity, rel.SignedAt}
			break
		}
	}
	r.Findings = j.l.findings(b.contents, func(columns []int32) ([]int, int) {
		cells, hosts := []int{}, 0
		for i, n := range j.cellOf {
			if slices.Contains(columns, n) {
				cells, hosts = append(cells, i), hosts+v.Cells[i].Hosts
			}
		}
		return cells, hosts
	})
	r.conclude()
	return r
}

// unreadable is the report of a build that cannot be parsed: it fails closed,
// and the rest of it has not been judged.
func (j *judge) unreadable(v *Inventory, member string, err error) *Report {
	j.subject = j.c.Subject()
	r := j.frame(v)
	f := Finding{
		ID: Unparsable, Severity: Block, Cause: "the build cannot be read to its end: " + plain(err), Members: []MemberRef{}, Cells: []int{},
		Fix: "build it again; nothing else in it was judged",
	}
	if member != "" {
		f.Members = append(f.Members, MemberRef{Paths: []string{member}})
	}
	r.Findings = []Finding{f}
	r.conclude()
	return r
}

func (j *judge) frame(v *Inventory) *Report {
	s := j.subject
	r := &Report{
		Version: reportVersion, At: j.o.Now.UTC(), Rings: slices.Clone(v.Rings), Kinds: map[string]int{}, Findings: []Finding{}, Unchecked: j.unchecked,
		Artefact: ArtefactInfo{Name: s.Name, Format: s.Format, SHA256: s.Digest.String(), Package: s.Package, Version: s.Version, Archive: j.c.Archive},
	}
	if !v.Taken.IsZero() {
		t := v.Taken.UTC()
		r.Inventory = &t
	}
	if r.Unchecked == nil {
		r.Unchecked = []string{}
	}
	if r.Rings == nil {
		r.Rings = []string{}
	}
	for _, c := range v.Cells {
		r.Cells = append(r.Cells, CellResult{Ring: c.Ring, Hosts: c.Hosts, Agent: c.Agent, Kernel: c.Kernel, NotLive: c.Ring == "", Outcome: Note})
		r.Hosts += c.Hosts
	}
	return r
}

// conclude works out what the findings come to.
func (r *Report) conclude() {
	r.Outcome = Note
	worse := func(s *Severity, to Severity) {
		if to.rank() > s.rank() {
			*s = to
		}
	}
	for i := range r.Findings {
		f := &r.Findings[i]
		worse(&r.Outcome, f.Severity)
		for n := range r.Cells {
			if len(f.Cells) == 0 || slices.Contains(f.Cells, n) {
				r.Cells[n].Findings++
				worse(&r.Cells[n].Outcome, f.Severity)
			}
		}
		if len(f.Cells) == 0 {
			f.Hosts = r.Hosts
		}
	}
	r.HostsBlocked = 0
	for _, c := range r.Cells {
		if c.Outcome == Block {
			r.HostsBlocked += c.Hosts
		}
	}
}

// The exit codes of a verification. 4 is not 1: nobody knows, and a pipeline
// must stop on it too.
const (
	ExitPass     = 0
	ExitBlock    = 1
	ExitWarnings = 2 // only when warnings count
	ExitUsage    = 3
	ExitHold     = 4
	ExitInternal = 5
)

// Exit is the report's exit code; strict counts warnings.
func (r *Report) Exit(strict bool) int {
	switch r.Outcome {
	case Block:
		return ExitBlock
	case Hold:
		return ExitHold
	case Warn:
		if strict {
			return ExitWarnings
		}
	}
	return ExitPass
}

// Sentence is the result in a line.
func (r *Report) Sentence() string {
	switch r.Outcome {
	case Block:
		if r.Hosts > 0 {
			return fmt.Sprintf("WOULD BLOCK on %s of %s hosts", thousands(r.HostsBlocked), thousands(r.Hosts))
		}
		return "WOULD BLOCK"
	case Hold:
		return "CANNOT DECIDE: what is missing is under hold"
	case Warn:
		return "PASS with warnings"
	}
	return "PASS"
}

// thousands groups digits, so that ten thousand hosts do not look like one.
func thousands(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// where says which cells a finding is about, by ring.
func (r *Report) where(f *Finding) string {
	if len(f.Cells) == 0 {
		return ""
	}
	var parts []string
	for _, n := range f.Cells {
		c := &r.Cells[n]
		text := "policy " + c.label()
		switch {
		case c.NotLive:
			text += " (no host yet)"
		default:
			text = fmt.Sprintf("ring %s, %s (%s hosts)", c.Ring, text, thousands(c.Hosts))
		}
		parts = append(parts, text)
	}
	if len(parts) > 6 {
		parts = append(parts[:5], fmt.Sprintf("and %d more cells", len(parts)-5))
	}
	return strings.Join(parts, "; ")
}

// label names a cell's policy.
func (c *CellResult) label() string {
	switch {
	case c.Unloaded:
		return "unknown"
	case c.Policy == "":
		return "not asked" // the build could not be read
	}
	return fmt.Sprintf("%s %d", c.Policy, c.Epoch)
}

// directory is the members of a finding that lie in one directory.
type directory struct {
	name  string
	names []string // base names, sorted
}

// depth is how many directories lie above its files.
func (d *directory) depth() int {
	if d.name == "." {
		return 0
	}
	return 1 + strings.Count(d.name, "/")
}

// folded groups a finding's members by directory, the fullest first. With a
// limit, the deepest are merged into their parents until there are that many.
func (f *Finding) folded(limit int) []directory {
	out := f.byDirectory()
	for limit > 0 && len(out) > limit {
		at := map[string]int{}
		var merged []directory
		deepest := 0
		for _, d := range out {
			deepest = max(deepest, d.depth())
		}
		if deepest == 0 {
			break
		}
		for _, d := range out {
			parent, deep := d.name, d.depth() == deepest
			if deep {
				parent = path.Dir(d.name)
			}
			i, ok := at[parent]
			if !ok {
				i = len(merged)
				at[parent] = i
				merged = append(merged, directory{name: parent})
			}
			for _, n := range d.names {
				if deep {
					n = path.Base(d.name) + "/" + n
				}
				merged[i].names = append(merged[i].names, n)
			}
		}
		out = merged
	}
	slices.SortStableFunc(out, func(a, b directory) int { return len(b.names) - len(a.names) })
	return out
}

func (f *Finding) byDirectory() []directory {
	at := map[string]int{}
	var out []directory
	for _, m := range f.Members {
		if len(m.Paths) == 0 {
			continue
		}
		dir := path.Dir(m.Paths[0])
		i, ok := at[dir]
		if !ok {
			i = len(out)
			at[dir] = i
			out = append(out, directory{name: dir})
		}
		if base := path.Base(m.Paths[0]); !slices.Contains(out[i].names[max(0, len(out[i].names)-2):], base) { // a module and what is inside it
			out[i].names = append(out[i].names, base)
		}
	}
	return out
}

// WriteJSON writes the report for programs.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		return fmt.Errorf("csv: write report: %w", err)
	}
	return nil
}

// maxReport bounds a report that is read back.
const maxReport = 256 << 20

// ReadReport reads what WriteJSON wrote.
func ReadReport(in io.Reader) (*Report, error) {
	b, err := io.ReadAll(io.LimitReader(in, maxReport+1))
	if err != nil {
		return nil, fmt.Errorf("csv: read report: %w", err)
	}
	var r Report
	if err := json.Unmarshal(b, &r); err != nil || len(b) > maxReport || r.Version != reportVersion {
		return nil, fmt.Errorf("csv: no report of version %d: %w", reportVersion, errs.Invalid)
	}
	for _, f := range r.Findings {
		for _, n := range f.Cells {
			if n < 0 || n >= len(r.Cells) {
				return nil, fmt.Errorf("csv: report: cell %d of %d: %w", n, len(r.Cells), errs.Invalid)
			}
		}
	}
	return &r, nil
}
