package gate

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// failed says whether one piece of evidence is against the release.
func (e *evaluation) failed(g *Gate, v candidate) (Result, bool) {
	switch p := v.Predicate.(type) {
	case *TestResult:
		switch {
		case p.Result == "FAILED" || len(p.Failed) > 0:
			return e.fail(g, CodeTestsFailed, fmt.Sprintf("%d tests failed: %s", len(p.Failed), some(p.Failed)), "make them pass and attest again")
		case len(p.Warned) > g.MaxWarned:
			return e.fail(g, CodeTooManyWarnings, fmt.Sprintf("%d tests were skipped or warned, at most %d may: %s", len(p.Warned), g.MaxWarned, some(p.Warned)), "run them, or raise max_warned")
		}
	case *Review:
		if p.Result == "fail" {
			return e.fail(g, CodeReviewRejected, "the change was rejected in review by "+v.Identity, "change it and have it reviewed again")
		}
	case *Scan:
		for _, l := range levels() {
			if n := p.Counts[l]; n > g.AtMost[l] {
				return e.fail(g, CodeTooManyFindings, fmt.Sprintf("%s found %d of level %s, at most %d may be", p.Tool, n, l, g.AtMost[l]), "fix them, or suppress them in the source with a reason")
			}
		}
	case *Vulns:
		return e.vulnerable(g, p)
	case *Provenance:
		return e.provenance(g, p)
	case *Verification:
		if p.Outcome == "block" {
			return e.fail(g, CodeVerdictAgainst, "the verdict of "+v.Identity+" is that it would be blocked", "see its report for what and why")
		}
	case *Custom:
		for _, k := range slices.Sorted(maps.Keys(g.Require)) {
			if got, ok := p.Field(k); ok && got != g.Require[k] {
				return e.fail(g, CodeFieldDiffers, fmt.Sprintf("%s is %q, must be %q", k, clip(got), g.Require[k]), "see what the check found")
			}
		}
	}
	return Result{}, false
}

// some names a few of many.
func some(list []string) string {
	if len(list) == 0 {
		return "(not named)"
	}
	sorted := slices.Sorted(slices.Values(list))
	for i := range sorted {
		sorted[i] = clip(sorted[i])
	}
	if len(sorted) > 3 {
		return strings.Join(sorted[:3], ", ") + fmt.Sprintf(" and %d more", len(sorted)-3)
	}
	return strings.Join(sorted, ", ")
}

func (e *evaluation) vulnerable(g *Gate, p *Vulns) (Result, bool) {
	excused := e.excused(g)
	found := map[string][]string{}
	for _, f := range p.Found {
		if !excused[f.ID] && !slices.Contains(found[f.Severity], f.ID) {
			found[f.Severity] = append(found[f.Severity], f.ID)
		}
	}
	for _, s := range Severities() {
		if n := len(found[s]); n > g.AtMost[s] {
			return e.fail(g, CodeVulnerable, fmt.Sprintf("%d vulnerabilities of severity %s, at most %d may be: %s", n, s, g.AtMost[s], some(found[s])),
				"update what is affected, or have VEX evidence signed that says why it is not")
		}
	}
	return Result{}, false
}

// excused are the vulnerabilities that VEX evidence says do not matter. A
// statement to the contrary beats it.
func (e *evaluation) excused(g *Gate) map[string]bool {
	out, affected := map[string]bool{}, map[string]bool{}
	for _, v := range e.vex {
		if !slices.Contains(g.VEX, v.attester) || v.Commit != "" && v.Commit != e.d.Revision || e.now.Sub(v.SignedAt) > maxAge {
			continue
		}
		doc, ok := v.Predicate.(*VEX)
		if !ok {
			continue
		}
		for _, s := range doc.Statements {
			if len(s.Hashes) > 0 && !slices.Contains(s.Hashes, e.r.Artefact) {
				continue
			}
			for _, id := range s.Vulnerabilities {
				switch s.Status {
				case "not_affected", "fixed":
					out[id] = true
				default:
					affected[id] = true
				}
			}
		}
	}
	for id := range affected {
		delete(out, id)
	}
	return out
}

func (e *evaluation) provenance(g *Gate, p *Provenance) (Result, bool) {
	switch {
	case !slices.Contains(g.Builders, p.Builder):
		return e.fail(g, CodeWrongBuilder, fmt.Sprintf("it was built by %q", clip(p.Builder)), "build it with "+strings.Join(g.Builders, " or "))
	case len(g.BuildTypes) > 0 && !slices.Contains(g.BuildTypes, p.BuildType):
		return e.fail(g, CodeWrongBuilder, fmt.Sprintf("build type %q is not allowed", clip(p.BuildType)), "use "+strings.Join(g.BuildTypes, " or "))
	case g.SourceURI != "" && !slices.ContainsFunc(p.Sources, func(s Source) bool { return s.URI == g.SourceURI }):
		return e.fail(g, CodeWrongSource, "it was not built from "+g.SourceURI, "build it from there")
	}
	commits := map[string]bool{}
	for _, s := range p.Sources {
		if s.URI == g.SourceURI {
			commits[s.Commit] = true
		}
	}
	if len(commits) > 1 {
		return e.fail(g, CodeWrongSource, "it was built from more than one revision of "+g.SourceURI, "build one revision")
	}
	return Result{}, false
}

// passed says whether fresh evidence, none of it against the release, is enough.
func (e *evaluation) passed(g *Gate, list []candidate) Result {
	ok := func(format string, a ...any) Result {
		return Result{State: Pass, Code: CodePassed, Text: fmt.Sprintf(format, a...)}
	}
	switch g.Kind {
	case KindTest:
		names := map[string]bool{}
		for _, v := range list {
			for _, n := range v.Predicate.(*TestResult).Passed {
				names[n] = true
			}
		}
		if len(names) < g.AtLeast {
			r, _ := e.fail(g, CodeTooFewTests, fmt.Sprintf("%d tests passed, at least %d must", len(names), g.AtLeast), "run all of them")
			return r
		}
		return ok("%d tests passed", len(names))
	case KindReview:
		return e.reviewed(g, list)
	case KindScan:
		return ok("no more findings than allowed")
	case KindVulns:
		return e.database(g, list)
	case KindProvenance:
		return ok("built by %s", list[0].Predicate.(*Provenance).Builder)
	case KindVerification:
		return e.verified(g, list)
	case KindSurface:
		return e.surface(g, list)
	}
	return e.custom(g, list)
}

func (e *evaluation) custom(g *Gate, list []candidate) Result {
	for _, k := range slices.Sorted(maps.Keys(g.Require)) {
		if !slices.ContainsFunc(list, func(v candidate) bool {
			got, ok := v.Predicate.(*Custom).Field(k)
			return ok && got == g.Require[k]
		}) {
			return e.hold(g, CodeFieldMissing, "the evidence does not have "+k, "attest a predicate that has it")
		}
	}
	return Result{State: Pass, Code: CodePassed, Text: "every required value is there"}
}

// reviewed counts people, not signatures: each once, and nobody who wrote it.
func (e *evaluation) reviewed(g *Gate, list []candidate) Result {
	var authors, reviewers []Person
	for _, v := range list {
		r := v.Predicate.(*Review)
		authors = append(authors, r.Authors...)
		reviewers = append(reviewers, r.Reviewers...)
		if len(r.Reviewers) == 0 {
			reviewers = append(reviewers, Person{URI: v.Identity})
		}
	}
	if len(authors) == 0 {
		return e.hold(g, CodeNoAuthor, "the review does not say who wrote the change", "attest with --author, or from the commit")
	}
	var others, own []Person
	count := 0
	for _, one := range people(reviewers) {
		if slices.ContainsFunc(one, func(p Person) bool { return slices.ContainsFunc(authors, p.same) }) {
			own = append(own, one...)
			continue
		}
		others = append(others, one[0])
		count++
	}
	switch {
	case count >= g.Reviewers:
		return Result{State: Pass, Code: CodePassed, Text: "reviewed by " + names(others)}
	case len(own) > 0:
		r, _ := e.fail(g, CodeSelfReview, "the reviewer is the author: "+names(own), fmt.Sprintf("have it reviewed by %d others", g.Reviewers))
		return r
	}
	return e.hold(g, CodeTooFewReviewers, fmt.Sprintf("reviewed by %d, %d are required: %s", count, g.Reviewers, names(others)), "ask for more reviews")
}

// people groups what is written of persons by person, in a fixed order: A <1>,
// B <1> and B <2> are one.
func people(list []Person) [][]Person {
	list = slices.SortedFunc(slices.Values(list), func(a, b Person) int {
		return strings.Compare(a.URI+"\x00"+a.Name, b.URI+"\x00"+b.Name)
	})
	var groups [][]Person
	for _, p := range list {
		one := []Person{p}
		groups = slices.DeleteFunc(groups, func(g []Person) bool {
			if !slices.ContainsFunc(g, p.same) {
				return false
			}
			one = append(one, g...)
			return true
		})
		groups = append(groups, one)
	}
	return groups
}

func names(list []Person) string {
	var out []string
	for _, p := range list {
		out = append(out, clip(p.String()))
	}
	if len(out) == 0 {
		return "nobody"
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), ", ")
}

func (e *evaluation) database(g *Gate, list []candidate) Result {
	for _, v := range list {
		if p := v.Predicate.(*Vulns); e.now.Sub(p.Database) <= g.DatabaseAge {
			return Result{State: Pass, Code: CodePassed, Text: fmt.Sprintf("no more vulnerabilities than allowed, by %s with a database of %s", p.Scanner, stamp(p.Database))}
		}
	}
	return e.hold(g, CodeDatabaseStale, "the scanner's vulnerability database is older than "+formatDuration(g.DatabaseAge), "update it and scan again")
}

func (e *evaluation) verified(g *Gate, list []candidate) Result {
	lacks := ""
	for _, v := range list {
		p := v.Predicate.(*Verification)
		if len(g.Verifiers) > 0 && !slices.Contains(g.Verifiers, p.Verifier) {
			lacks = "the verdict is of another verifier, " + clip(p.Verifier)
			continue
		}
		missing := slices.DeleteFunc(slices.Clone(g.Properties), func(s string) bool { return slices.Contains(p.Properties, s) })
		if len(missing) == 0 {
			return Result{State: Pass, Code: CodePassed, Text: fmt.Sprintf("%s verified %s", p.Verifier, strings.Join(g.Properties, ", "))}
		}
		lacks = p.Verifier + " did not verify " + strings.Join(missing, ", ")
	}
	return e.hold(g, CodeNotVerified, lacks, "see its report for why")
}

func (e *evaluation) surface(g *Gate, list []candidate) Result {
	var open []string
	all := 0
	for _, v := range list {
		p := v.Predicate.(*Surface)
		all += len(p.New)
		for _, item := range p.New {
			var by []Person
			for _, a := range p.Approved {
				if a.Item == item {
					by = append(by, a.By)
				}
			}
			if len(people(by)) < g.Reviewers {
				open = append(open, item)
			}
		}
	}
	if len(open) > 0 {
		return e.hold(g, CodeSurfaceUnreviewed, fmt.Sprintf("%d new on the attack surface and not accepted by %d: %s", len(open), g.Reviewers, some(open)), "have them reviewed, or remove them")
	}
	return Result{State: Pass, Code: CodePassed, Text: fmt.Sprintf("%d new on the attack surface, all accepted", all)}
}
