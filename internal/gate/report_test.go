package gate_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
)

// parsed is what a gate reads of a report.
func parsed(t *testing.T, r *gate.Report) any {
	t.Helper()
	b, err := gate.EncodeStatement(about(), r.Type, r.Predicate)
	if err != nil {
		t.Fatal(err)
	}
	s, err := gate.ParseStatement(b)
	if err != nil {
		t.Fatal(err)
	}
	return s.Predicate
}

// The go command's own output, of a module made here.
func TestReadGoTest_real(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "go.mod", "module example.org/m\n\ngo 1.26\n")
	write(t, dir, "a/a_test.go", `package a
import "testing"
func TestGood(t *testing.T) { t.Run("sub/one", func(t *testing.T) {}) }
func TestSkip(t *testing.T) { t.Skip("why") }
func TestBad(t *testing.T)  { t.Error("no") }
`)
	write(t, dir, "b/b_test.go", "package b\nimport \"testing\"\nfunc TestPanics(t *testing.T) { panic(\"x\") }\n")
	write(t, dir, "c/c_test.go", "package c\nimport \"testing\"\nfunc TestNoBuild(t *testing.T) { undefined() }\n")
	write(t, dir, "d/d.go", "package d\n")
	write(t, dir, "e/e_test.go", "package e\nimport (\"os\"; \"testing\")\nfunc TestMain(m *testing.M) { os.Exit(3) }\n")
	write(t, dir, "f/f_test.go", "package f\nimport (\"os\"; \"testing\")\nfunc TestLeaves(t *testing.T) { os.Exit(1) }\n")
	c := exec.CommandContext(t.Context(), "go", "test", "-json", "./...")
	c.Dir = dir
	out, err := c.Output()
	if err == nil {
		t.Fatal("the module's tests pass")
	}
	r, err := gate.ReadGoTest(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	got := parsed(t, r).(*gate.TestResult)
	if got.Result != "FAILED" {
		t.Errorf("result %s", got.Result)
	}
	if diff := cmp.Diff([]string{"example.org/m/a.TestGood", "example.org/m/a.TestGood/sub/one"}, got.Passed); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"example.org/m/a.TestSkip"}, got.Warned); diff != "" {
		t.Error(diff)
	}
	for _, want := range []string{"m/a.TestBad", "m/b.TestPanics", "m/c", "m/e", "m/f"} {
		if !strings.Contains(strings.Join(got.Failed, "\n"), "example.org/"+want) {
			t.Errorf("%s did not fail; failed did:\n%s", want, strings.Join(got.Failed, "\n"))
		}
	}
	if strings.Contains(fmt.Sprint(got.Failed), "m/d") {
		t.Error("a package without tests failed")
	}
}

func TestReadGoTest_forms(t *testing.T) {
	ev := func(s ...string) string { return strings.Join(s, "\n") }
	for name, tc := range map[string]struct{ in, want string }{
		"cut off":      {ev(`{"Action":"run","Package":"p","Test":"TestA"}`), "0 passed, 1 failed, 0 skipped"},
		"package only": {ev(`{"Action":"start","Package":"p"}`, `{"Action":"pass","Package":"q","Test":"T"}`), "1 passed, 1 failed, 0 skipped"},
		"twice":        {ev(`{"Action":"fail","Package":"p","Test":"T"}`, `{"Action":"pass","Package":"p","Test":"T"}`), "0 passed, 1 failed, 0 skipped"},
		"text":         {"ok  	p	0.1s\n", ""},
		"nothing":      {"", ""},
		"no tests":     {ev(`{"Action":"start","Package":"p"}`, `{"Action":"skip","Package":"p"}`), ""},
	} {
		r, err := gate.ReadGoTest(strings.NewReader(tc.in))
		switch {
		case tc.want == "":
			if !errors.Is(err, errs.Invalid) {
				t.Errorf("%s: %v, %v", name, r, err)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case r.Summary != tc.want:
			t.Errorf("%s: %s, want %s", name, r.Summary, tc.want)
		}
	}
}

// More tests than one statement holds still make a statement, and say so.
func TestReadGoTest_many(t *testing.T) {
	var b strings.Builder
	for i := range 200 {
		fmt.Fprintf(&b, `{"Action":"pass","Package":"example.org/p","Test":"TestNumber%04d"}`+"\n", i)
		for j := range 200 {
			fmt.Fprintf(&b, `{"Action":"pass","Package":"example.org/p","Test":"TestNumber%04d/with a long name for the case %d"}`+"\n", i, j)
		}
	}
	r, err := gate.ReadGoTest(strings.NewReader(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	if got := parsed(t, r).(*gate.TestResult); len(got.Passed) != 200 || len(r.Notes) != 1 {
		t.Errorf("%d tests, notes %v", len(got.Passed), r.Notes)
	}
}

func TestReadJUnit(t *testing.T) {
	for name, tc := range map[string]struct{ in, want string }{
		"pytest": {
			`<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="3"><testcase classname="t.m" name="a" time="0.1"/><testcase classname="t.m" name="b"><failure message="no">assert</failure></testcase><testcase classname="t.m" name="c"><skipped/></testcase></testsuite></testsuites>`,
			"1 passed, 1 failed, 1 skipped",
		},
		"one suite":          {`<testsuite name="s"><testcase name="a"><error/></testcase><testcase name="b"/></testsuite>`, "1 passed, 1 failed, 0 skipped"},
		"nested":             {`<testsuites><testsuite name="s" failures="1"><testsuite name="t" failures="1"><testcase name="a"><failure/></testcase></testsuite></testsuite></testsuites>`, "0 passed, 1 failed, 0 skipped"},
		"a failure unseen":   {`<testsuite name="s" errors="1"><testcase name="a"/></testsuite>`, "1 passed, 1 failed, 0 skipped"},
		"failed and skipped": {`<testsuite><testcase name="a"><skipped/><failure/></testcase></testsuite>`, "0 passed, 1 failed, 0 skipped"},
		"no root":            {`<html></html>`, ""},
		"empty suite":        {`<testsuite/>`, ""},
		"cut off":            {`<testsuite><testcase name="a"/>`, ""},
		"entities":           {`<!DOCTYPE x [<!ENTITY a "b">]><testsuite><testcase name="&a;"/></testsuite>`, ""},
		"nothing":            {``, ""},
		"deep":               {strings.Repeat("<testsuite>", 50) + strings.Repeat("</testsuite>", 50), ""},
		"no name":            {`<testsuite><testcase/></testsuite>`, ""},
	} {
		r, err := gate.ReadJUnit(strings.NewReader(tc.in))
		switch {
		case tc.want == "":
			if !errors.Is(err, errs.Invalid) {
				t.Errorf("%s: %v, %v", name, r, err)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case r.Summary != tc.want:
			t.Errorf("%s: %s, want %s", name, r.Summary, tc.want)
		}
	}
}

func TestReadSARIF(t *testing.T) {
	run := func(results string, extra ...string) string {
		return `{"version":"2.1.0","runs":[{"tool":{"driver":{"name":"gosec","version":"2","rules":[{"id":"R1","defaultConfiguration":{"level":"error"}},{"id":"R2"}]}},"results":` + results + strings.Join(extra, "") + `}]}`
	}
	for name, tc := range map[string]struct{ in, want string }{
		"none":              {run(`[]`), "gosec 2: 0 errors, 0 warnings, 0 notes"},
		"by level":          {run(`[{"level":"error"},{"level":"note"},{"level":"warning"}]`), "gosec 2: 1 errors, 1 warnings, 1 notes"},
		"by rule":           {run(`[{"ruleId":"R1"},{"ruleIndex":0},{"ruleId":"R2"},{}]`), "gosec 2: 2 errors, 2 warnings, 0 notes"},
		"suppressed":        {run(`[{"level":"error","suppressions":[{"kind":"inSource"}]},{"level":"error","suppressions":[{"kind":"external","status":"rejected"}]}]`), "gosec 2: 1 errors, 0 warnings, 0 notes"},
		"passes":            {run(`[{"kind":"pass","level":"none"},{"kind":"fail","level":"error"}]`), "gosec 2: 1 errors, 0 warnings, 0 notes"},
		"did not end":       {run(`[]`, `,"invocations":[{"executionSuccessful":false}]`), ""},
		"without results":   {`{"version":"2.1.0","runs":[{"tool":{"driver":{"name":"x"}}}]}`, ""},
		"no runs":           {`{"version":"2.1.0","runs":[]}`, ""},
		"other version":     {`{"version":"1.0.0","runs":[{}]}`, ""},
		"unknown level":     {run(`[{"level":"bad"}]`), ""},
		"a key twice":       {run(`[{"level":"error","level":"none"}]`), ""},
		"results no list":   {run(`{}`), ""},
		"something strange": {`[]`, ""},
	} {
		r, err := gate.ReadSARIF([]byte(tc.in))
		switch {
		case tc.want == "":
			if !errors.Is(err, errs.Invalid) {
				t.Errorf("%s: %v, %v", name, r, err)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case r.Summary != tc.want:
			t.Errorf("%s: %s, want %s", name, r.Summary, tc.want)
		default:
			parsed(t, r)
		}
	}
}

func TestReadCycloneDX(t *testing.T) {
	doc := `{"bomFormat":"CycloneDX","specVersion":"1.5","metadata":{"timestamp":"2031-05-01T11:00:00Z","tools":{"components":[{"name":"grype","version":"0.9"}]}},
	 "vulnerabilities":[{"id":"CVE-1","ratings":[{"severity":"low"},{"severity":"high"}]},{"id":"CVE-2","ratings":[{"score":9.8,"method":"CVSSv31"}]},{"id":"CVE-3"},
	 {"id":"CVE-4","ratings":[{"severity":"critical"}],"analysis":{"state":"not_affected"}}]}`
	r, err := gate.ReadCycloneDX([]byte(doc), epoch())
	if err != nil {
		t.Fatal(err)
	}
	want := &gate.Vulns{
		Scanner: "urn:scanner:grype", Database: epoch(), Finished: time.Date(2031, 5, 1, 11, 0, 0, 0, time.UTC),
		Found: []gate.Vulnerability{{"CVE-1", "high"}, {"CVE-2", "critical"}, {"CVE-3", "unknown"}},
	}
	if diff := cmp.Diff(want, parsed(t, r)); diff != "" {
		t.Error(diff)
	}
	if len(r.Notes) != 1 {
		t.Errorf("notes %v", r.Notes)
	}
	for _, bad := range []string{`{}`, strings.Replace(doc, `"vulnerabilities"`, `"components"`, 1), strings.Replace(doc, `"timestamp"`, `"time"`, 1)} {
		if _, err := gate.ReadCycloneDX([]byte(bad), epoch()); !errors.Is(err, errs.Invalid) {
			t.Errorf("%v", err)
		}
	}
}

func TestParseTrailers(t *testing.T) {
	a, r, err := gate.ParseTrailers("Fix it\n\nReviewed-by: not a trailer here\n\nCo-authored-by: Cy <cy@example.org>\nReviewed-by: Ann Other <Ann@Example.org>\nReviewed-By: bob@example.org\nSigned-off-by: X <x@example.org>\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]gate.Person{{Name: "Cy", URI: "mailto:cy@example.org"}}, a); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]gate.Person{{Name: "Ann Other", URI: "mailto:ann@example.org"}, {URI: "mailto:bob@example.org"}}, r); diff != "" {
		t.Error(diff)
	}
}

func TestParsePerson(t *testing.T) {
	for in, want := range map[string]gate.Person{
		"Ann <ann@x.example>": {Name: "Ann", URI: "mailto:ann@x.example"}, "https://forge.example/u/1": {URI: "https://forge.example/u/1"}, "ann": {Name: "ann"},
		"": {}, "Ann <nobody": {}, "a\u202eb": {},
	} {
		got, err := gate.ParsePerson(in)
		if bad := want == (gate.Person{}); bad != (err != nil) || !bad && got != want {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := writeFile(filepath.Join(dir, name), text); err != nil {
		t.Fatal(err)
	}
}

// Whatever a tool wrote becomes a statement that gates read, or an invalid.
func fuzzReport(f *testing.F, read func([]byte) (*gate.Report, error), seeds ...string) {
	for _, s := range seeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := read(data)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatalf("%v is not an invalid", err)
			}
			return
		}
		parsed(t, r)
	})
}

func FuzzReadGoTest(f *testing.F) {
	fuzzReport(f, func(b []byte) (*gate.Report, error) { return gate.ReadGoTest(bytes.NewReader(b)) },
		`{"Action":"run","Package":"p","Test":"TestA"}`+"\n"+`{"Action":"pass","Package":"p","Test":"TestA/x"}`, `{"Action":"build-fail","ImportPath":"p"}`)
}

func FuzzReadJUnit(f *testing.F) {
	fuzzReport(f, func(b []byte) (*gate.Report, error) { return gate.ReadJUnit(bytes.NewReader(b)) },
		`<testsuites><testsuite name="s" failures="1"><testcase classname="c" name="a"><failure/></testcase></testsuite></testsuites>`)
}

func FuzzReadSARIF(f *testing.F) {
	fuzzReport(f, gate.ReadSARIF, `{"version":"2.1.0","runs":[{"tool":{"driver":{"name":"g","rules":[{"id":"R"}]}},"results":[{"ruleId":"R"},{"level":"error","suppressions":[]}]}]}`)
}

func FuzzReadOpenVEX(f *testing.F) {
	fuzzReport(f, gate.ReadOpenVEX, `{"@context":"https://openvex.dev/ns/v0.2.0","statements":[{"vulnerability":{"name":"CVE-1"},"products":[{"hashes":{"sha-256":"00"}}],"status":"fixed"}]}`)
}

func FuzzReadCycloneDX(f *testing.F) {
	fuzzReport(f, func(b []byte) (*gate.Report, error) { return gate.ReadCycloneDX(b, epoch()) },
		`{"bomFormat":"CycloneDX","metadata":{"timestamp":"2031-05-01T11:00:00Z"},"vulnerabilities":[{"id":"C","ratings":[{"severity":"low"}]}]}`)
}

func FuzzReadSurface(f *testing.F) { fuzzReport(f, gate.ReadSurface, goodSurface) }

func FuzzParseTrailers(f *testing.F) {
	f.Add("x\n\nReviewed-by: A <a@b>\n")
	f.Fuzz(func(t *testing.T, s string) {
		a, r, err := gate.ParseTrailers(s)
		if err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatal(err)
		}
		if err == nil && len(a) > 0 && len(r) > 0 {
			report, err := gate.NewReview(a, r, "", epoch())
			if err != nil {
				t.Fatal(err)
			}
			parsed(t, report)
		}
	})
}

// A statement is read or refused, and what is read of it again says the same.
func FuzzParseStatement(f *testing.F) {
	for uri, p := range map[string]string{
		gate.TypeTest: goodTest, gate.TypeReview: goodReview, gate.TypeHumanReview: `{"result":"pass"}`, gate.TypeScan: goodScan, gate.TypeVulns: goodVulns,
		gate.TypeProvenance: goodBuilt, gate.TypeSVR: goodCSV, gate.TypeSurface: goodSurface, customType: goodCustom,
		gate.TypeVEX:      `{"statements":[{"vulnerability":{"name":"CVE-1","aliases":["x"]},"status":"fixed"}]}`,
		gate.TypeApproval: `{"product":"p","ring":"r","reason":"w","not_after":"2031-05-01T12:00:00Z"}`,
	} {
		b, err := gate.EncodeStatement(about(), uri, json.RawMessage(p))
		if err != nil {
			f.Fatal(uri, err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := gate.ParseStatement(data)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatalf("%v is not an invalid", err)
			}
			return
		}
		if s.SHA256.IsZero() == (s.Commit == "") || s.Predicate == nil || s.Kind == "" {
			t.Fatalf("%+v", s)
		}
		// no evidence, however strange, passes a gate of somebody else
		p := &gate.Policy{Product: "edged", Rings: []string{"prod"}, Gates: []gate.Gate{{Name: "g", Kind: s.Kind, Attesters: []string{"ci"}}}, Attesters: []gate.Attester{{Name: "ci", Authority: "fleet", Identity: "spiffe://x/ci"}}}
		e := &gate.Evidence{Statement: *s, Identity: "spiffe://x/eve", CA: "fleet", SignedAt: epoch()}
		if d := gate.Evaluate(p, request(), []*gate.Evidence{e}, epoch()); d.State == gate.Pass {
			t.Fatal("passes")
		}
		e.Identity = "spiffe://x/ci"
		gate.Evaluate(p, request(), []*gate.Evidence{e}, epoch()) // does not panic
		gate.EvaluateBreakglass(p, request(), []*gate.Evidence{e}, epoch())
	})
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte("version: 1\nname: x\nproduct: y\nrings: [a]\ngates:\n  - {name: u, kind: test, attesters: [ci]}\n"))
	f.Add([]byte("a: &b [*b]\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		p, err := gate.ParsePolicy("f", doc)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatalf("%v is not an invalid", err)
			}
			return
		}
		if len(p.Gates) == 0 || gate.Evaluate(p, gate.Request{Product: p.Product, Epoch: p.MinEpoch}, nil, epoch()).State == gate.Pass {
			t.Fatal("a policy passes without evidence")
		}
	})
}
