package csv_test

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// nasty is a report of a build whose names are made to break what prints them.
func nasty(t *testing.T) (*lab, *csv.Report) {
	t.Helper()
	l := newLab(t)
	files := map[string]string{
		"a b/ü%20.py": "1", "x/<b>&\"'.py": "2", "x/|`*_[l](e.example).py": "3", "x/\x1b[31m\u202e.py": "4", "tool*": hello,
	}
	for i := range 300 {
		files[fmt.Sprintf("many/%d/f.py", i)] = fmt.Sprint("many", i)
	}
	src := codesign.DirSource(tree(files))
	r := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{},
		cell("canary", 1, l.policy("base", 2, "enforce", allowFleet)), cell("prod", 12345, l.policy("base", 1, "enforce", "")),
		cell("edge", 1, l.policy("edge", 1, "audit", "")), cell("", 0, l.policy("next", 1, "enforce", "")),
		csv.Cell{Ring: "lost", Hosts: 3, Load: failing(errs.NotFound)})
	return l, r
}

// The schema says what consumers rely on; it is the part of SARIF 2.1.0's own
// that a report can break.
func TestSARIF(t *testing.T) {
	_, r := nasty(t)
	var b bytes.Buffer
	if err := r.WriteSARIF(&b, "1.2.3"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("testdata/sarif-essentials.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	doc, err := jsonschema.UnmarshalJSON(f)
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("sarif.json", doc); err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile("sarif.json")
	if err != nil {
		t.Fatal(err)
	}
	got, err := jsonschema.UnmarshalJSON(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(got); err != nil {
		t.Fatal(err)
	}
	var log struct {
		Runs []struct {
			Tool struct {
				Driver struct {
					Rules []struct{ ID string } `json:"rules"`
				} `json:"driver"`
			} `json:"tool"`
			Results []struct {
				RuleID       string            `json:"ruleId"`
				RuleIndex    int               `json:"ruleIndex"`
				Fingerprints map[string]string `json:"partialFingerprints"`
				Locations    []struct {
					Physical struct {
						Artifact struct{ URI string } `json:"artifactLocation"`
					} `json:"physicalLocation"`
				} `json:"locations"`
			} `json:"results"`
		} `json:"runs"`
	}
	if err := json.Unmarshal(b.Bytes(), &log); err != nil {
		t.Fatal(err)
	}
	run := log.Runs[0]
	seen := map[string]bool{}
	found := map[string]bool{}
	for _, res := range run.Results {
		if run.Tool.Driver.Rules[res.RuleIndex].ID != res.RuleID {
			t.Errorf("rule %s has index %d", res.RuleID, res.RuleIndex)
		}
		p := res.Fingerprints["ringwall/v1"]
		if seen[p] {
			t.Errorf("fingerprint %s of %s twice", p, res.RuleID)
		}
		seen[p] = true
		for _, loc := range res.Locations {
			u, err := url.Parse(loc.Physical.Artifact.URI)
			if err != nil || u.IsAbs() || strings.ContainsAny(loc.Physical.Artifact.URI, " <>\"\x1b") {
				t.Errorf("URI %q: %v", loc.Physical.Artifact.URI, err)
				continue
			}
			found[u.Path] = true
		}
	}
	for _, want := range []string{"a b/ü%20.py", "x/<b>&\"'.py", "tool", "many/7/f.py"} {
		if !found[want] {
			t.Errorf("no location for %q", want)
		}
	}
}

func TestSARIF_limit(t *testing.T) {
	r := &csv.Report{Outcome: csv.Block}
	for i := range 3 {
		f := csv.Finding{ID: csv.Unauthorised, Severity: []csv.Severity{csv.Block, csv.Warn, csv.Note}[i], Cause: fmt.Sprint(i)}
		for n := range 3000 {
			f.Members = append(f.Members, csv.MemberRef{Paths: []string{fmt.Sprintf("d%d/f", n)}})
		}
		r.Findings = append(r.Findings, f)
	}
	var b bytes.Buffer
	if err := r.WriteSARIF(&b, ""); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(b.String(), `"ruleId"`); n != 5000 {
		t.Errorf("%d results", n)
	}
	if !strings.Contains(b.String(), `"omittedResults": 4000`) || strings.Count(b.String(), `"level": "error"`) != 3000 {
		t.Error("the worst must come first, and the rest be counted")
	}
}

// The same problem in the next build has the same fingerprint, another has not.
func TestFingerprint(t *testing.T) {
	l := newLab(t)
	report := func(files map[string]string) *csv.Report {
		return l.verify(codesign.DirSource(tree(files)), nil, csv.Options{}, cell("p", 1, l.policy("base", 1, "enforce", "")))
	}
	a, b := report(map[string]string{"a.py": "1"}), report(map[string]string{"a.py": "2"})
	if a.Fingerprint() != b.Fingerprint() {
		t.Error("the same problem")
	}
	if c := report(map[string]string{"a.py": "1", "b.py": "1b"}); c.Fingerprint() == a.Fingerprint() {
		t.Error("another file")
	}
}

func TestJUnit(t *testing.T) {
	_, r := nasty(t)
	var b bytes.Buffer
	if err := r.WriteJUnit(&b); err != nil {
		t.Fatal(err)
	}
	var suites struct {
		Tests    int `xml:"tests,attr"`
		Failures int `xml:"failures,attr"`
		Errors   int `xml:"errors,attr"`
		Suites   []struct {
			Name     string `xml:"name,attr"`
			Failures int    `xml:"failures,attr"`
			Errors   int    `xml:"errors,attr"`
			Cases    []struct {
				Name    string  `xml:"name,attr"`
				Failure *string `xml:"failure"`
				Error   *string `xml:"error"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	d := xml.NewDecoder(&b)
	if err := d.Decode(&suites); err != nil {
		t.Fatal(err)
	}
	if suites.Tests != 5 || suites.Failures != 2 || suites.Errors != 1 || len(suites.Suites) != 5 {
		t.Errorf("%d tests, %d failures, %d errors, %d suites", suites.Tests, suites.Failures, suites.Errors, len(suites.Suites))
	}
	for _, s := range suites.Suites {
		c := s.Cases[0]
		want := map[string][2]bool{"ring canary": {}, "ring prod": {true, false}, "ring edge": {}, "policies without hosts": {true, false}, "ring lost": {false, true}}[s.Name]
		if got := [2]bool{c.Failure != nil, c.Error != nil}; got != want {
			t.Errorf("%s: failure and error %v, want %v", s.Name, got, want)
		}
	}
}

// Names from a build stay text in a comment.
func TestMarkdown(t *testing.T) {
	_, r := nasty(t)
	var b bytes.Buffer
	r.WriteMarkdown(&b)
	for _, bad := range []string{"\x1b", "\u202e", "|`*_["} {
		if strings.Contains(b.String(), bad) {
			t.Errorf("holds %q", bad)
		}
	}
	for _, want := range []string{"| prod | 12,345 | base 1 |", "**would block**", "**cannot decide**", "fix: "} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("lacks %q", want)
		}
	}
	for line := range strings.SplitSeq(b.String(), "\n") {
		if n := strings.Count(line, "`"); n%2 != 0 {
			t.Errorf("an open code span: %q", line)
		}
	}
}

func TestText_folds(t *testing.T) {
	_, r := nasty(t)
	var b bytes.Buffer
	r.WriteText(&b, func(s string) string { return strconv.Quote(s) })
	if n := strings.Count(b.String(), "\n"); n > 120 {
		t.Errorf("%d lines", n)
	}
	for _, want := range []string{"\"many/\" (300): \"0/f.py\", ", "RESULT  WOULD BLOCK on 12,345 of 12,350 hosts", "\"x/\" (3): "} {
		if !strings.Contains(b.String(), want) {
			t.Logf("%s", b.String())
			t.Errorf("lacks %q", want)
		}
	}
}

func TestReport_roundTrip(t *testing.T) {
	_, r := nasty(t)
	var b bytes.Buffer
	if err := r.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	again, err := csv.ReadReport(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	var c bytes.Buffer
	if err := again.WriteJSON(&c); err != nil || !bytes.Equal(b.Bytes(), c.Bytes()) {
		t.Errorf("not the same: %v", err)
	}
	for _, bad := range []string{"", "{}", "[]", `{"version":1,"findings":[{"cells":[7]}]}`, `{"version":2}`} {
		if _, err := csv.ReadReport(strings.NewReader(bad)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestVerdict(t *testing.T) {
	l, r := nasty(t)
	const who = "spiffe://fleet.example/attest/csv"
	signer := func(p pki.Purpose, identity string) *pki.Signer {
		s, err := l.a.NewSigner(pki.LeafRequest{Purpose: p, Identity: identity, Now: l.now})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	b, err := csv.SignVerdict(signer(pki.PurposeAttest, who), r, who)
	if err != nil {
		t.Fatal(err)
	}
	roots := l.a.Roots(pki.PurposeAttest)
	v, err := csv.VerifyVerdict(b, roots)
	if err != nil {
		t.Fatal(err)
	}
	// A release policy's gate reads it, too.
	if g, err := gate.Open(b, roots); err != nil || g.Kind != gate.KindVerification {
		t.Errorf("as evidence: %+v, %v", g, err)
	}
	if v.Verifier != who || v.Outcome != csv.Block || strings.Join(v.Properties, " ") != csv.PropertyRing+"canary "+csv.PropertyRing+"edge" || len(v.Policies) != 5 {
		t.Errorf("%+v", v)
	}
	artefact := integrity.Digest{1}
	canary, err := integrity.ParseDigest(r.Cells[0].PolicySHA256)
	if err != nil {
		t.Fatal(err)
	}
	prod, err := integrity.ParseDigest(r.Cells[1].PolicySHA256)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Covers(artefact, canary, "canary"); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"blocked there":    v.Covers(artefact, prod, "prod"),
		"another artefact": v.Covers(integrity.Digest{2}, canary, "canary"),
		"another ring":     v.Covers(artefact, canary, "prod"),
		"a newer policy":   v.Covers(artefact, integrity.Digest{9}, "canary"),
	} {
		if !errors.Is(err, errs.Denied) {
			t.Errorf("%s: %v", name, err)
		}
	}

	// A policy that is joined with supplements is another one.
	r.Cells[0].Supplements = []string{integrity.Digest{5}.String()}
	joined, err := csv.SignVerdict(signer(pki.PurposeAttest, who), r, who)
	if err != nil {
		t.Fatal(err)
	}
	if v, err = csv.VerifyVerdict(joined, roots); err != nil {
		t.Fatal(err)
	}
	if err := v.Covers(artefact, canary, "canary", integrity.Digest{5}); err != nil {
		t.Error(err)
	}
	for _, other := range [][]integrity.Digest{nil, {{6}}, {{5}, {6}}} {
		if err := v.Covers(artefact, canary, "canary", other...); !errors.Is(err, errs.Denied) {
			t.Errorf("supplements %v: %v", other, err)
		}
	}

	// Whose word does not count.
	if _, err := csv.VerifyVerdict(b, newLab(t).a.Roots(pki.PurposeAttest)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("another authority: %v", err)
	}
	b, err = csv.SignVerdict(signer(pki.PurposeAttest, "spiffe://fleet.example/attest/other"), r, who)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := csv.VerifyVerdict(b, roots); !errors.Is(err, errs.Untrusted) {
		t.Errorf("in another's name: %v", err)
	}
	if _, err := csv.SignVerdict(signer(pki.PurposeBuild, builder), r, builder); !errors.Is(err, errs.Invalid) {
		t.Errorf("with a build certificate: %v", err)
	}
	if _, err := csv.VerifyVerdict([]byte("{}"), roots); err == nil {
		t.Error("garbage verifies")
	}

	// A build that passes has the property that gates ask for.
	src := codesign.DirSource(tree(map[string]string{"a.py": "a"}))
	ok := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{}, cell("canary", 1, l.policy("base", 2, "enforce", allowFleet)))
	if b, err = csv.SignVerdict(signer(pki.PurposeAttest, who), ok, who); err != nil {
		t.Fatal(err)
	}
	if v, err = csv.VerifyVerdict(b, roots); err != nil || strings.Join(v.Properties, " ") != csv.PropertyPassed+" "+csv.PropertyRing+"canary" {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestParseCells(t *testing.T) {
	f, err := csv.ParseCells("cells.yaml", []byte(`version: 1
taken: 2031-05-01T12:00:00Z
rings: [canary, prod]
cells:
  - {ring: prod, hosts: 9812, policy: p90.yaml, supplements: [s.yaml], releases: [r], packages: [d], archive: debian, agent: 0.4.0, classifier: 2, kernel: 6.12.1, module_keys: [k.pem], efi_db: [db.pem], efi_dbx: [dbx.esl], efi_sbat: sbat.csv}
  - {ring: canary, hosts: 1, policy: p91.yaml}
  - {policy: p92.yaml}
`))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Cells) != 3 || f.Cells[0].Hosts != 9812 || f.Cells[0].SBAT != "sbat.csv" || !f.Taken.Equal(time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)) {
		t.Errorf("%+v", f)
	}
	if f, err = csv.ParseCells("c", []byte("version: 1\ncells: [{ring: b, policy: p}, {ring: a, policy: p}, {ring: b, policy: q}]\n")); err != nil || strings.Join(f.Rings, " ") != "b a" {
		t.Errorf("%+v, %v", f, err)
	}
	for doc, want := range map[string]string{
		"version: 2\ncells: [{policy: p}]":                           "c:1:10: version:",
		"version: 1":                                                 "lacks cells",
		"version: 1\ncells: []":                                      "is empty",
		"version: 1\ncells: [{ring: a}]":                             "cells[0]: lacks policy",
		"version: 1\ncells: [{policy: p, hosts: 3}]":                 "has hosts, and no ring",
		"version: 1\ncells: [{policy: p, ring: a b}]":                "is no name",
		"version: 1\ncells: [{policy: p, ring: a, hosts: -1}]":       "must be a number",
		"version: 1\nrings: [a]\ncells: [{policy: p, ring: b}]":      "c:3:9: cells[0].ring: ring b is not among rings",
		"version: 1\ncells: [{policy: p, rink: b}]":                  "did you mean ring?",
		"version: 1\ncells: [{policy: &x p}, {policy: *x}]":          "anchors are not allowed",
		"version: 1\ntaken: yesterday\ncells: [{policy: p}]":         "a time with its zone",
		"version: 1\ncells: [{policy: p}]\n---\n":                    "second YAML document",
		"version: 1\ncells: [{policy: p, releases: [a, a]}]":         "is repeated",
		"version: 1\ncells: [{policy: p}]\ncells: [{policy: other}]": "repeated",
	} {
		if _, err := csv.ParseCells("c", []byte(doc)); !errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", doc, err, want)
		}
	}
}

func FuzzParseCells(f *testing.F) {
	f.Add([]byte("version: 1\nrings: [a]\ncells:\n  - {ring: a, hosts: 2, policy: p.yaml, releases: [r]}\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		c, err := csv.ParseCells("c", doc)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		for _, x := range c.Cells {
			if x.Policy == "" || x.Hosts < 0 || x.Ring == "" && x.Hosts > 0 {
				t.Fatalf("%+v", x)
			}
		}
	})
}

func FuzzReadEvents(f *testing.F) {
	f.Add([]byte(`{"kind":"exec","digest":"sha256:` + strings.Repeat("0", 64) + `","path":"/x","count":3,"host":"h"}` + "\n{}\n"))
	f.Fuzz(func(t *testing.T, log []byte) {
		u := csv.NewUses()
		if err := u.ReadEvents(bytes.NewReader(log)); err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatal(err)
		}
		if u.Len() > bytes.Count(log, []byte("\n"))+1 {
			t.Fatalf("%d uses", u.Len())
		}
	})
}

func FuzzListBaseline(f *testing.F) {
	f.Add([]byte("/usr/bin/sh\n/lib/x86_64-linux-gnu/libc.so.6\n"), "libc.so.6")
	f.Fuzz(func(t *testing.T, list []byte, name string) {
		b, err := csv.ListBaseline(bytes.NewReader(list))
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		if _, _, err := b.Library(name); err != nil {
			t.Fatal(err)
		}
		if _, _, err := b.File(name); err != nil {
			t.Fatal(err)
		}
	})
}

func TestCompare(t *testing.T) {
	l := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"a.py": "a", "b.py": "b", "c.py": "c"}))
	p := l.policy("any", 1, "enforce", allowFleet)
	rel := l.sign(src, codesign.ReleaseInfo{})
	v, c, err := codesign.VerifyRelease(rel.Bundle, rel.Catalogue, codesign.Roots(p, codesign.SignsBuild))
	if err != nil {
		t.Fatal(err)
	}
	s, err := codesign.ReleaseSource(v, c, rel.Names)
	if err != nil {
		t.Fatal(err)
	}
	compiled := func(mode, rules string) *integrity.Compiled {
		x, err := integrity.Compile(l.policy("base", 1, mode, rules), []integrity.Source{s}, integrity.CompileOptions{Now: l.now})
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	const a, b = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb", "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"
	u := csv.NewUses()
	log := fmt.Sprintf(`{"kind":"script","digest":"sha256:%s","path":"/a","host":"h1","count":3}
{"kind":"script","digest":"sha256:%[1]s","path":"/z","host":"h2"}

{"kind":"script","digest":"sha256:%s","path":"/b","host":"h1"}
{"kind":"script","digest":"sha256:%064d","path":"/nobody"}
{"type":"gap"}
{"type":"audit","reason":"memory-wx","count":2}
`, a, b, 7)
	if err := u.ReadEvents(strings.NewReader(log)); err != nil {
		t.Fatal(err)
	}
	deny := allowFleet + "\ndeny: [{rule: d, reason: r, sha256: [" + a + "]}]"
	got := u.Compare(compiled("enforce", allowFleet), compiled("enforce", deny), l.now)
	if len(got.Blocked) != 1 || len(got.Allowed) != 0 || got.Both != 1 || got.Asked != 3 || got.Skipped["memory-wx"] != 2 || got.Skipped["gap"] != 1 {
		t.Fatalf("%+v", got)
	}
	f := got.Blocked[0]
	if f.Effect != "blocked" || f.Count != 4 || f.Hosts != 2 || strings.Join(f.Paths, " ") != "/a /z" || f.OldRule != "own" || f.NewRule != "d" {
		t.Errorf("%+v", f)
	}
	if got = u.Compare(compiled("enforce", deny), compiled("enforce", allowFleet), l.now); len(got.Allowed) != 1 || got.Allowed[0].Effect != "runs" {
		t.Errorf("%+v", got)
	}
	if got = u.Compare(compiled("enforce", allowFleet), compiled("audit", deny), l.now); len(got.Blocked) != 1 || got.Blocked[0].Effect != "logged" {
		t.Errorf("%+v", got)
	}
	if err := csv.NewUses().ReadEvents(strings.NewReader("{}\nno\n")); !errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("%v", err)
	}
}
