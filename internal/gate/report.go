package gate

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Bounds of the reports of other people's tools.
const (
	MaxReport = 256 << 20
	maxLine   = 8 << 20
	maxTests  = 500_000
	maxNames  = 700 << 10 // bytes of test names in one statement
)

// Report is what a tool's report says, as the predicate of a statement.
type Report struct {
	Type      string
	Predicate any
	Summary   string   // for people
	Notes     []string // what was left out, and why
}

type resource struct {
	Name   string            `json:"name,omitempty"`
	URI    string            `json:"uri,omitempty"`
	Digest map[string]string `json:"digest,omitempty"`
}

type wireTest struct {
	Result        string     `json:"result"`
	Configuration []resource `json:"configuration"`
	Passed        []string   `json:"passedTests"`
	Warned        []string   `json:"warnedTests"`
	Failed        []string   `json:"failedTests"`
}

// tests collects outcomes by name; what is worse stays.
type tests struct {
	source  string // the tool
	outcome map[string]string
}

const (
	outPass = "pass"
	outSkip = "skip"
	outFail = "fail"
)

func (t *tests) add(name, outcome string) error {
	if t.outcome == nil {
		t.outcome = map[string]string{}
	}
	name = plainName(name)
	old, known := t.outcome[name]
	if !known && len(t.outcome) == maxTests {
		return invalid("more than %d tests", maxTests)
	}
	if old == outFail || old == outSkip && outcome == outPass {
		return nil
	}
	t.outcome[name] = outcome
	return nil
}

// plainName makes a name fit for a statement.
func plainName(s string) string {
	s = strings.Map(func(r rune) rune {
		if !readable(string(r), 1, 4) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "?") + "…"
	}
	return s
}

// report lists every failure and skip, and as many passes as fit: subtests of
// a test that is listed go first, since their parent passed only if they did.
func (t *tests) report() (*Report, error) {
	if len(t.outcome) == 0 {
		return nil, invalid("%s: no test in it", t.source)
	}
	w := wireTest{Result: "PASSED", Configuration: []resource{{Name: t.source}}, Passed: []string{}, Warned: []string{}, Failed: []string{}}
	size := 0
	for name, o := range t.outcome {
		switch o {
		case outPass:
			w.Passed = append(w.Passed, name)
		case outSkip:
			w.Warned = append(w.Warned, name)
		default:
			w.Failed = append(w.Failed, name)
		}
		size += len(name) + 4
	}
	r := &Report{Type: TypeTest}
	if size > maxNames {
		before := len(w.Passed)
		w.Passed = slices.DeleteFunc(w.Passed, func(s string) bool {
			i := strings.LastIndexByte(s, '/')
			return i > 0 && t.outcome[s[:i]] == outPass && strings.Contains(s[:i], ".Test")
		})
		r.Notes = append(r.Notes, fmt.Sprintf("%d subtests that passed are not named: too many for one statement", before-len(w.Passed)))
	}
	for _, list := range []*[]string{&w.Passed, &w.Warned, &w.Failed} {
		slices.Sort(*list)
	}
	for size = 0; ; {
		for _, s := range slices.Concat(w.Failed, w.Warned, w.Passed) {
			size += len(s) + 4
		}
		if size <= maxNames {
			break
		}
		if len(w.Passed) < 2 {
			return nil, invalid("%s: the names of %d failed and skipped tests do not fit into a statement", t.source, len(w.Failed)+len(w.Warned))
		}
		cut := len(w.Passed) / 2
		r.Notes = append(r.Notes, fmt.Sprintf("%d more that passed are not named", len(w.Passed)-cut))
		w.Passed, size = w.Passed[:cut], 0
	}
	switch {
	case len(w.Failed) > 0:
		w.Result = "FAILED"
	case len(w.Warned) > 0:
		w.Result = "WARNED"
	}
	r.Predicate = w
	r.Summary = fmt.Sprintf("%d passed, %d failed, %d skipped", len(w.Passed), len(w.Failed), len(w.Warned))
	return r, nil
}

// ReadGoTest reads what `go test -json` prints (test2json's events, one a
// line). A package that failed without a failing test (it does not build, or
// it panicked) is a failed test of the package's name; a test that began and
// did not end failed too.
func ReadGoTest(r io.Reader) (*Report, error) {
	t := tests{source: "go test"}
	running := map[string]bool{}
	failedIn := map[string]bool{}
	packages := map[string]string{}
	sc := bufio.NewScanner(io.LimitReader(r, MaxReport))
	sc.Buffer(make([]byte, 64<<10), maxLine)
	for n := 1; sc.Scan(); n++ {
		line := bytes.TrimSpace(sc.Bytes())
		if len(line) == 0 {
			continue
		}
		var e struct{ Action, Package, ImportPath, Test string }
		if line[0] != '{' || json.Unmarshal(line, &e) != nil || e.Action == "" {
			return nil, invalid("go test: line %d is no event: was it run with -json?", n)
		}
		if e.Action == "build-fail" {
			if err := t.add(e.ImportPath+" (build)", outFail); err != nil {
				return nil, err
			}
			continue
		}
		if err := t.goEvent(e.Action, e.Package, e.Test, running, failedIn, packages); err != nil {
			return nil, err
		}
	}
	if err := sc.Err(); err != nil {
		return nil, invalid("go test: %v", err)
	}
	for name := range running {
		if err := t.add(name+" (did not end)", outFail); err != nil {
			return nil, err
		}
	}
	for pkg, outcome := range packages {
		if outcome != outFail && outcome != "start" || outcome == outFail && failedIn[pkg] {
			continue
		}
		if outcome == "start" {
			pkg += " (did not end)"
		}
		if err := t.add(pkg, outFail); err != nil {
			return nil, err
		}
	}
	return t.report()
}

func (t *tests) goEvent(action, pkg, test string, running, failedIn map[string]bool, packages map[string]string) error {
	name := pkg + "." + test
	switch action {
	case "run", "start":
		if len(running)+len(packages) > maxTests {
			return invalid("more than %d tests", maxTests)
		}
		if test != "" {
			running[name] = true
		} else {
			packages[pkg] = "start"
		}
	case outPass, outFail, outSkip:
		if test == "" {
			packages[pkg] = action
			return nil
		}
		delete(running, name)
		if action == outFail {
			failedIn[pkg] = true
		}
		return t.add(name, action)
	}
	return nil
}

// ReadSARIF reads a SARIF 2.1.0 log and counts its results by level. A result
// that is suppressed counts as none; one without a level has its rule's, and
// warning without that (SARIF 3.27.10).
func ReadSARIF(data []byte) (*Report, error) {
	o, err := parseObject(data, MaxReport)
	if err != nil {
		return nil, fmt.Errorf("SARIF: %w", err)
	}
	runs, ok := o.objects("runs")
	if !strings.HasPrefix(o.text("version"), "2.1") || !ok || len(runs) == 0 {
		return nil, invalid("SARIF: version %.10q with %d runs (want 2.1.0 and at least one)", o.text("version"), len(runs))
	}
	counts := map[string]int{"error": 0, "warning": 0, "note": 0}
	suppressed := 0
	var tools []string
	for _, run := range runs {
		driver := run.object("tool").object("driver")
		if strings.TrimSpace(driver.text("name")) == "" {
			return nil, invalid("SARIF: a run has no tool.driver.name")
		}
		tools = append(tools, plainName(strings.TrimSpace(driver.text("name")+" "+driver.text("version"))))
		results, ok := run.objects("results")
		if run["results"] == nil || !ok {
			return nil, invalid("SARIF: %s has no results: it was not run to its end", driver.text("name"))
		}
		invocations, ok := run.objects("invocations")
		if !ok || slices.ContainsFunc(invocations, func(i object) bool { return i["executionSuccessful"] == false }) {
			return nil, invalid("SARIF: %s did not end successfully", driver.text("name"))
		}
		for _, r := range results {
			level, counted, err := sarifLevel(driver, r)
			switch {
			case err != nil:
				return nil, err
			case counted:
				counts[level]++
			default:
				suppressed++
			}
		}
	}
	slices.Sort(tools)
	name := strings.Join(slices.Compact(tools), ", ")
	r := &Report{
		Type: TypeScan,
		Predicate: map[string]any{
			"tool": map[string]string{"name": plainName(name)}, "counts": counts, "suppressed": suppressed, "format": "SARIF 2.1.0",
		},
		Summary: fmt.Sprintf("%s: %d errors, %d warnings, %d notes", name, counts["error"], counts["warning"], counts["note"]),
	}
	if suppressed > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%d results are suppressed in the source or did not fail, and are not counted", suppressed))
	}
	return r, nil
}

// sarifLevel says whether a result is a finding, and of which level.
func sarifLevel(driver, r object) (string, bool, error) {
	if kind := r.text("kind"); kind != "" && kind != "fail" && kind != "open" && kind != "review" {
		return "", false, nil
	}
	list, ok := r.objects("suppressions")
	if !ok {
		return "", false, invalid("SARIF: suppressions is no list of objects")
	}
	accepted := func(s object) bool { return s.text("status") == "" || s.text("status") == "accepted" }
	if len(list) > 0 && !slices.ContainsFunc(list, func(s object) bool { return !accepted(s) }) {
		return "", false, nil
	}
	level := r.text("level")
	if level == "" {
		level = ruleLevel(driver, r)
	}
	switch level {
	case "error", "warning", "note":
		return level, true, nil
	case "none":
		return "", false, nil
	}
	return "", false, invalid("SARIF: level %.20q", level)
}

func ruleLevel(driver, r object) string {
	rules, _ := driver.objects("rules")
	if i := r.number("ruleIndex"); i >= 0 && i < len(rules) {
		if l := rules[i].object("defaultConfiguration").text("level"); l != "" {
			return l
		}
		return "warning"
	}
	for _, rule := range rules {
		if id := rule.text("id"); id != "" && id == r.text("ruleId") {
			if l := rule.object("defaultConfiguration").text("level"); l != "" {
				return l
			}
		}
	}
	return "warning"
}

// ReadOpenVEX takes an OpenVEX document as it is, if it is one.
func ReadOpenVEX(data []byte) (*Report, error) {
	o, err := parseObject(data, maxNames)
	if err != nil {
		return nil, fmt.Errorf("OpenVEX: %w", err)
	}
	if !strings.HasPrefix(o.text("@context"), typeVEXShort) {
		return nil, invalid("OpenVEX: context %.60q", o.text("@context"))
	}
	v, err := parseVEX(o)
	if err != nil {
		return nil, fmt.Errorf("OpenVEX: %w", err)
	}
	return &Report{Type: TypeVEX, Predicate: json.RawMessage(data), Summary: fmt.Sprintf("%d statements", len(v.Statements))}, nil
}

type wireVulns struct {
	Scanner  wireScanner       `json:"scanner"`
	Metadata map[string]string `json:"metadata"`
}

type wireScanner struct {
	URI     string            `json:"uri"`
	Version string            `json:"version,omitempty"`
	DB      map[string]string `json:"db"`
	Result  []wireFound       `json:"result"`
}

type wireFound struct {
	ID       string         `json:"id"`
	Severity []wireSeverity `json:"severity"`
}

type wireSeverity struct {
	Method string `json:"method"`
	Score  string `json:"score"`
}

// ReadCycloneDX reads the vulnerabilities of a CycloneDX document (JSON, 1.4
// and newer) that a scanner made. Those whose analysis says not_affected,
// false_positive or resolved are left out. The format does not say how old the
// scanner's database was: database does.
func ReadCycloneDX(data []byte, database time.Time) (*Report, error) {
	o, err := parseObject(data, MaxReport)
	if err != nil {
		return nil, fmt.Errorf("CycloneDX: %w", err)
	}
	if o.text("bomFormat") != "CycloneDX" {
		return nil, invalid("CycloneDX: bomFormat %.20q", o.text("bomFormat"))
	}
	list, ok := o.objects("vulnerabilities")
	if !ok || o["vulnerabilities"] == nil {
		return nil, invalid("CycloneDX: no vulnerabilities in it, not even an empty list: was it scanned?")
	}
	finished, err := timeOf(o.object("metadata"), "timestamp")
	if err != nil {
		return nil, fmt.Errorf("CycloneDX: metadata: %w", err)
	}
	tool, version := cycloneTool(o.object("metadata"))
	w := wireVulns{
		Scanner:  wireScanner{URI: "urn:scanner:" + urnPart(tool), Version: version, DB: map[string]string{"lastUpdate": stamp(database)}, Result: []wireFound{}},
		Metadata: map[string]string{"scanStartedOn": stamp(finished), "scanFinishedOn": stamp(finished)},
	}
	left := 0
	for _, v := range list {
		id := plainName(v.text("id"))
		if id == "" {
			return nil, invalid("CycloneDX: a vulnerability has no id")
		}
		switch v.object("analysis").text("state") {
		case "not_affected", "false_positive", "resolved", "resolved_with_pedigree":
			left++
			continue
		}
		ratings, ok := v.objects("ratings")
		if !ok {
			return nil, invalid("CycloneDX: ratings of %s is no list", id)
		}
		severity := "unknown"
		for _, r := range ratings {
			severity = worst(severity, severityOf(r.text("severity")))
			if n, ok := r["score"].(json.Number); ok && r.text("severity") == "" && strings.HasPrefix(r.text("method"), "CVSS") {
				severity = worst(severity, severityOf(n.String()))
			}
		}
		w.Scanner.Result = append(w.Scanner.Result, wireFound{ID: id, Severity: []wireSeverity{{"cyclonedx", severity}}})
	}
	slices.SortFunc(w.Scanner.Result, func(a, b wireFound) int { return strings.Compare(a.ID+a.Severity[0].Score, b.ID+b.Severity[0].Score) })
	r := &Report{Type: TypeVulns, Predicate: w, Summary: fmt.Sprintf("%d vulnerabilities", len(w.Scanner.Result))}
	if left > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%d more are analysed as not affected or resolved in the document", left))
	}
	return r, nil
}

// cycloneTool is who made a document: tools is a list before 1.5, an object since.
func cycloneTool(meta object) (name, version string) {
	list, _ := meta.objects("tools")
	if list == nil {
		list, _ = meta.object("tools").objects("components")
	}
	for _, t := range list {
		if t.text("name") != "" {
			return plainName(t.text("name")), plainName(t.text("version"))
		}
	}
	return "unknown", ""
}

func urnPart(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' {
			return r
		}
		return '-'
	}, s)
}

// ReadSurface takes an attack-surface report, if it is one.
func ReadSurface(data []byte) (*Report, error) {
	o, err := parseObject(data, maxNames)
	if err != nil {
		return nil, fmt.Errorf("attack surface: %w", err)
	}
	s, err := parseSurface(o)
	if err != nil {
		return nil, fmt.Errorf("attack surface: %w", err)
	}
	return &Report{Type: TypeSurface, Predicate: json.RawMessage(data), Summary: fmt.Sprintf("%d new, %d accepted", len(s.New), len(s.Approved))}, nil
}

// ReadPredicate takes a predicate of any type, if it is one of that type.
func ReadPredicate(uri string, data []byte) (*Report, error) {
	o, err := parseObject(data, maxNames)
	if err != nil {
		return nil, fmt.Errorf("predicate: %w", err)
	}
	kind, uri := kindOf(uri)
	if !strings.Contains(uri, ":") {
		return nil, invalid("predicate type %.60q is no URI", uri)
	}
	if _, err := parsePredicate(kind, uri, o); err != nil {
		return nil, fmt.Errorf("predicate: %w", err)
	}
	return &Report{Type: uri, Predicate: json.RawMessage(data), Summary: "as given"}, nil
}

// NewReview is the predicate of a review.
func NewReview(authors, reviewers []Person, link string, at time.Time) (*Report, error) {
	if len(authors) == 0 || len(reviewers) == 0 {
		return nil, invalid("a review needs at least one author and one reviewer")
	}
	people := func(list []Person) []resource {
		var out []resource
		for _, p := range list {
			out = append(out, resource{Name: p.Name, URI: p.URI})
		}
		return out
	}
	predicate := map[string]any{
		"reviewers": people(reviewers), "reviewTime": stamp(at), "annotations": map[string]any{"authors": people(authors)},
	}
	if link != "" {
		predicate["reviewLink"] = link
	}
	return &Report{Type: TypeReview, Predicate: predicate, Summary: "by " + names(reviewers) + " of work by " + names(authors)}, nil
}

// NewApproval is the predicate of one person's word for a break-glass release.
func NewApproval(a Approval) (*Report, error) {
	predicate := map[string]string{"product": a.Product, "ring": a.Ring, "reason": a.Reason, "not_after": stamp(a.NotAfter)}
	return &Report{Type: TypeApproval, Predicate: predicate, Summary: "until " + stamp(a.NotAfter) + " in ring " + a.Ring}, nil
}

// ParsePerson reads "Name <mail@example.org>", a URI, a mail address or a name.
func ParsePerson(s string) (Person, error) {
	s = strings.TrimSpace(s)
	var p Person
	name, mail, ok := strings.Cut(s, "<")
	mail, closed := strings.CutSuffix(strings.TrimSpace(mail), ">")
	switch {
	case ok && closed && strings.Contains(mail, "@"):
		p = Person{Name: strings.TrimSpace(name), URI: "mailto:" + strings.ToLower(strings.TrimSpace(mail))}
	case ok:
		return p, invalid("person %.80q (want `Name <mail@example.org>`, an address or a URI)", s)
	case strings.Contains(s, ":"):
		p.URI = s
	case strings.Contains(s, "@"):
		p.URI = "mailto:" + strings.ToLower(s)
	default:
		p.Name = s
	}
	if p.Name+p.URI == "" || !readable(p.Name, 0, 200) || !readable(p.URI, 0, 200) {
		return p, invalid("person %.80q is empty, too long or not readable", s)
	}
	return p, nil
}

// ParseTrailers reads the people in a commit's message: who reviewed it, and
// who else wrote it (git's and the Linux kernel's trailers).
func ParseTrailers(message string) (authors, reviewers []Person, err error) {
	if len(message) > maxDocument {
		return nil, nil, invalid("commit message of %d bytes", len(message))
	}
	paragraphs := strings.Split(strings.TrimSpace(strings.ReplaceAll(message, "\r\n", "\n")), "\n\n")
	for line := range strings.SplitSeq(paragraphs[len(paragraphs)-1], "\n") {
		key, value, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		to := &authors
		switch strings.ToLower(strings.TrimSpace(key)) {
		case "reviewed-by", "acked-by", "approved-by":
			to = &reviewers
		case "co-authored-by", "co-developed-by":
		default:
			continue
		}
		p, err := ParsePerson(value)
		if err != nil {
			return nil, nil, errors.Join(fmt.Errorf("commit message, %s: %w", strings.TrimSpace(key), err))
		}
		*to = append(*to, p)
	}
	return authors, reviewers, nil
}
