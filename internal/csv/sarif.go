package csv

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
)

// Limits of code scanning services that read SARIF.
const (
	maxResults   = 5000
	maxLocations = 50
)

// SARIF 2.1.0 (OASIS), as far as a report needs it.
type (
	sarifLog struct {
		Schema  string     `json:"$schema"`
		Version string     `json:"version"`
		Runs    []sarifRun `json:"runs"`
	}
	sarifRun struct {
		Tool        sarifTool         `json:"tool"`
		Artifacts   []sarifArtifact   `json:"artifacts"`
		Results     []sarifResult     `json:"results"`
		Invocations []sarifInvocation `json:"invocations"`
		ColumnKind  string            `json:"columnKind"`
		Properties  map[string]any    `json:"properties,omitempty"`
	}
	sarifTool struct {
		Driver sarifDriver `json:"driver"`
	}
	sarifDriver struct {
		Name    string      `json:"name"`
		Version string      `json:"version,omitempty"`
		Rules   []sarifRule `json:"rules"`
	}
	sarifRule struct {
		ID               string    `json:"id"`
		Name             string    `json:"name"`
		ShortDescription sarifText `json:"shortDescription"`
		Help             sarifText `json:"help"`
	}
	sarifText struct {
		Text string `json:"text"`
	}
	sarifArtifact struct {
		Location sarifURI          `json:"location"`
		Hashes   map[string]string `json:"hashes"`
		Roles    []string          `json:"roles"`
	}
	sarifURI struct {
		URI string `json:"uri"`
	}
	sarifInvocation struct {
		ExecutionSuccessful bool   `json:"executionSuccessful"`
		EndTimeUTC          string `json:"endTimeUtc"`
	}
	sarifResult struct {
		RuleID       string            `json:"ruleId"`
		RuleIndex    int               `json:"ruleIndex"`
		Level        string            `json:"level"`
		Message      sarifText         `json:"message"`
		Locations    []sarifLocation   `json:"locations"`
		Fingerprints map[string]string `json:"partialFingerprints"`
	}
	sarifLocation struct {
		Physical sarifPhysical `json:"physicalLocation"`
	}
	sarifPhysical struct {
		Artifact sarifURI `json:"artifactLocation"`
	}
)

// WriteSARIF writes the report as SARIF 2.1.0: one run, a result for each
// finding and directory, the worst first, at most 5,000.
func (r *Report) WriteSARIF(w io.Writer, version string) error {
	run := sarifRun{
		ColumnKind: "utf16CodeUnits", Results: []sarifResult{},
		Tool:        sarifTool{sarifDriver{Name: "ringwall csv", Version: version}},
		Invocations: []sarifInvocation{{ExecutionSuccessful: true, EndTimeUTC: utc(r.At)}},
		Artifacts:   []sarifArtifact{{sarifURI{uriOf(r.Artefact.Name)}, map[string]string{"sha-256": r.Artefact.SHA256}, []string{"analysisTarget"}}},
		Properties:  map[string]any{"outcome": r.Outcome, "hosts": r.Hosts, "hostsBlocked": r.HostsBlocked},
	}
	index := map[ID]int{}
	for i, c := range Checks() {
		index[c.ID] = i
		run.Tool.Driver.Rules = append(run.Tool.Driver.Rules, sarifRule{string(c.ID), c.Name, sarifText{c.Title}, sarifText{c.Help}})
	}
	omitted := 0
	for i := range r.Findings {
		for _, res := range r.results(&r.Findings[i]) {
			if len(run.Results) == maxResults {
				omitted++
				continue
			}
			res.RuleIndex = index[ID(res.RuleID)]
			run.Results = append(run.Results, res)
		}
	}
	if omitted > 0 {
		run.Properties["omittedResults"] = omitted
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(sarifLog{
		Schema: "https://json.schemastore.org/sarif-2.1.0.json", Version: "2.1.0", Runs: []sarifRun{run},
	}); err != nil {
		return fmt.Errorf("csv: write SARIF: %w", err)
	}
	return nil
}

// results folds a finding by directory.
func (r *Report) results(f *Finding) []sarifResult {
	level := map[Severity]string{Block: "error", Hold: "error", Warn: "warning", Note: "note"}[f.Severity]
	one := func(about, subject string, paths []string) sarifResult {
		res := sarifResult{
			RuleID: string(f.ID), Level: level, Locations: []sarifLocation{},
			Message:      sarifText{about + f.Cause + ". Fix: " + f.Fix},
			Fingerprints: map[string]string{"ringwall/v1": f.fingerprint(subject)},
		}
		if where := r.where(f); where != "" {
			res.Message.Text += " [" + where + "]"
		}
		for _, p := range paths[:min(len(paths), maxLocations)] {
			res.Locations = append(res.Locations, sarifLocation{sarifPhysical{sarifURI{uriOf(p)}}})
		}
		return res
	}
	dirs := f.folded(0)
	if len(dirs) == 0 {
		return []sarifResult{one("", "", []string{r.Artefact.Name})}
	}
	var out []sarifResult
	for _, d := range dirs {
		paths := make([]string, len(d.names))
		for i, n := range d.names {
			paths[i] = strings.TrimPrefix(d.name+"/"+n, "./")
		}
		about, subject := paths[0]+": ", paths[0]
		if len(paths) > 1 {
			about, subject = fmt.Sprintf("%d files in %s: ", len(paths), d.name), d.name
		}
		out = append(out, one(about, subject, paths))
	}
	return out
}

// fingerprint is equal for the same problem in two builds.
func (f *Finding) fingerprint(subject string) string {
	h := sha256.Sum256([]byte(string(f.ID) + "\x00" + subject + "\x00" + f.Cause))
	return hex.EncodeToString(h[:16])
}

// Fingerprint is equal for reports of the same problems: their checks, causes
// and members' names, whatever the contents and hosts are.
func (r *Report) Fingerprint() string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%s\x00", r.Artefact.Package, r.Outcome)
	for i := range r.Findings {
		f := &r.Findings[i]
		if f.Severity.rank() < Hold.rank() {
			continue
		}
		fmt.Fprintf(h, "%s\x00", f.fingerprint(""))
		for _, m := range f.Members {
			if len(m.Paths) > 0 {
				fmt.Fprintf(h, "%s\x00", m.Paths[0])
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// uriOf is a path within the build as a relative URI reference.
func uriOf(p string) string {
	u := url.URL{Path: strings.TrimPrefix(p, "/")}
	return strings.TrimPrefix(u.String(), "./")
}

// JUnit's XML, as CI systems read it.
type (
	junitSuites struct {
		XMLName  xml.Name     `xml:"testsuites"`
		Name     string       `xml:"name,attr"`
		Tests    int          `xml:"tests,attr"`
		Failures int          `xml:"failures,attr"`
		Errors   int          `xml:"errors,attr"`
		Suites   []junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name      string      `xml:"name,attr"`
		Tests     int         `xml:"tests,attr"`
		Failures  int         `xml:"failures,attr"`
		Errors    int         `xml:"errors,attr"`
		Timestamp string      `xml:"timestamp,attr"`
		Cases     []junitCase `xml:"testcase"`
	}
	junitCase struct {
		Name    string     `xml:"name,attr"`
		Class   string     `xml:"classname,attr"`
		Time    string     `xml:"time,attr"`
		Failure *junitText `xml:"failure,omitempty"`
		Error   *junitText `xml:"error,omitempty"`
		Out     string     `xml:"system-out,omitempty"`
	}
	junitText struct {
		Message string `xml:"message,attr"`
		Type    string `xml:"type,attr"`
		Text    string `xml:",chardata"`
	}
)

// WriteJUnit writes a suite for each ring and a case for each of its cells. A
// block is a failure, what cannot be decided an error.
func (r *Report) WriteJUnit(w io.Writer) error {
	out := junitSuites{Name: "csv " + r.Artefact.Name}
	at := map[string]int{}
	for i := range r.Cells {
		c := &r.Cells[i]
		name := "ring " + c.Ring
		if c.NotLive {
			name = "policies without hosts"
		}
		n, ok := at[name]
		if !ok {
			n = len(out.Suites)
			at[name] = n
			out.Suites = append(out.Suites, junitSuite{Name: name, Timestamp: r.At.UTC().Format("2006-01-02T15:04:05")})
		}
		s := &out.Suites[n]
		k := r.junitCase(i)
		s.Tests, out.Tests = s.Tests+1, out.Tests+1
		if k.Failure != nil {
			s.Failures, out.Failures = s.Failures+1, out.Failures+1
		}
		if k.Error != nil {
			s.Errors, out.Errors = s.Errors+1, out.Errors+1
		}
		s.Cases = append(s.Cases, k)
	}
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return fmt.Errorf("csv: write JUnit: %w", err)
	}
	e := xml.NewEncoder(w)
	e.Indent("", "  ")
	if err := e.Encode(out); err != nil {
		return fmt.Errorf("csv: write JUnit: %w", err)
	}
	if _, err := io.WriteString(w, "\n"); err != nil {
		return fmt.Errorf("csv: write JUnit: %w", err)
	}
	return nil
}

func (r *Report) junitCase(n int) junitCase {
	c := &r.Cells[n]
	k := junitCase{Name: fmt.Sprintf("policy %s, %s hosts", c.label(), thousands(c.Hosts)), Class: "csv." + c.Ring, Time: "0"}
	bad := map[Severity][]string{}
	var ids []string
	for i := range r.Findings {
		f := &r.Findings[i]
		if len(f.Cells) > 0 && !slices.Contains(f.Cells, n) {
			continue
		}
		lines := []string{fmt.Sprintf("%s %s: %s. Fix: %s", f.Severity, f.ID, f.Cause, f.Fix)}
		for i, d := range f.folded(foldTo) {
			if i == shownDirectories {
				lines = append(lines, "    …")
				break
			}
			lines = append(lines, "    "+d.text(func(s string) string { return s }))
		}
		bad[f.Severity] = append(bad[f.Severity], strings.Join(lines, "\n"))
		if (f.Severity == Block || f.Severity == Hold) && !slices.Contains(ids, string(f.ID)) {
			ids = append(ids, string(f.ID))
		}
	}
	switch {
	case bad[Block] != nil:
		k.Failure = &junitText{"would block: " + strings.Join(ids, ", "), "block", strings.Join(append(bad[Block], bad[Hold]...), "\n")}
	case bad[Hold] != nil:
		k.Error = &junitText{"cannot be decided: " + strings.Join(ids, ", "), "hold", strings.Join(bad[Hold], "\n")}
	}
	k.Out = strings.Join(append(bad[Warn], bad[Note]...), "\n")
	return k
}
