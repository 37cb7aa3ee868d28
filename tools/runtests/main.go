// Command runtests runs "go test -json" and shows what a person needs: a line
// per package, failures in full, skipped tests with their reason, and a sum.
//
//	runtests test ARGUMENTS...       arguments of go test
//	runtests fuzz EACH ALL PACKAGES  every fuzz target for the time EACH, less if
//	                                 together they would take longer than ALL
//
// A test that has subtests is not counted itself; its subtests are. If the
// environment names a file in CHECK_TALLY, "passed failed skipped" is appended
// to it. The exit code is 0 if nothing failed and at least one test ran.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	start := time.Now()
	s := &session{out: stdout, err: stderr}
	switch {
	case len(args) > 1 && args[0] == "test":
		s.test(args[1:]...)
	case len(args) > 3 && args[0] == "fuzz":
		each, err1 := time.ParseDuration(args[1])
		all, err2 := time.ParseDuration(args[2])
		if err := errors.Join(err1, err2); err != nil {
			fmt.Fprintln(stderr, "runtests:", err)
			return 2
		}
		s.fuzz(args[3:], each, all)
	default:
		fmt.Fprintln(stderr, "usage: runtests test ARGUMENTS... | runtests fuzz EACH ALL PACKAGES...")
		return 2
	}
	s.showSkipped()
	fmt.Fprintf(stdout, "%d passed, %d failed, %d skipped in %s\n", s.passed, s.failed, len(s.skipped), time.Since(start).Round(100*time.Millisecond))
	if err := s.tally(os.Getenv("CHECK_TALLY")); err != nil {
		fmt.Fprintln(stderr, "runtests:", err)
		return 1
	}
	if s.failed > 0 {
		return 1
	}
	if s.passed+len(s.skipped) == 0 {
		fmt.Fprintln(stderr, "runtests: no test ran")
		return 1
	}
	return 0
}

// session adds up the results of one or more runs of go test.
type session struct {
	out, err       io.Writer
	passed, failed int
	skipped        []skip
	timeOver       bool // in this run of go test, see onlyTimeOver
}

type skip struct{ pkg, test, reason string }

// event is a line of "go test -json" (go doc test2json, go help buildjson).
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// test runs go test once.
func (s *session) test(args ...string) {
	s.run("go test "+strings.Join(args, " "), exec.Command("go", append([]string{"test", "-json"}, args...)...))
}

// run reads what a command says in the language of "go test -json". One that
// fails without a failed test (it did not build, it could not start) counts as
// one failure.
func (s *session) run(what string, cmd *exec.Cmd) {
	before := s.failed
	s.timeOver = false
	cmd.Stderr = s.err
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		err = errors.Join(s.read(pipe), cmd.Wait())
	}
	if err != nil && s.failed == before && !s.timeOver {
		s.failed++
		fmt.Fprintf(s.err, "FAIL %s: %v\n", what, err)
	}
}

// pkg is what is known of a package while its tests run.
type pkg struct {
	output                  map[string][]string // by test; "" is the package's own
	tests                   []string            // finished, in order
	result                  map[string]string   // by test: pass, fail, skip
	passed, failed, skipped int
}

func (s *session) read(r io.Reader) error {
	pkgs := map[string]*pkg{}
	builds := map[string][]string{}
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil {
				fmt.Fprintf(s.err, "%s", line) // not ours to hide
			} else {
				s.handle(pkgs, builds, &e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *session) handle(pkgs map[string]*pkg, builds map[string][]string, e *event) {
	if e.ImportPath != "" { // build-output, build-fail
		builds[e.ImportPath] = append(builds[e.ImportPath], e.Output)
		return
	}
	p := pkgs[e.Package]
	if p == nil {
		p = &pkg{output: map[string][]string{}, result: map[string]string{}}
		pkgs[e.Package] = p
	}
	switch e.Action {
	case "output":
		p.output[e.Test] = append(p.output[e.Test], e.Output)
	case "pass", "fail", "skip":
		if e.Action == "fail" && (e.Test != "" && onlyTimeOver(p.output[e.Test]) || e.Test == "" && s.timeOver) {
			e.Action, s.timeOver = "pass", true
		}
		if e.Test != "" {
			p.tests = append(p.tests, e.Test)
			p.result[e.Test] = e.Action
			return
		}
		s.finish(p, e, builds[e.FailedBuild])
		delete(pkgs, e.Package)
	}
}

// onlyTimeOver tells whether all that a fuzz target said is that its time was
// over: its workers sometimes report the end of -fuzztime as a failure
// (golang.org/issue/75804). A finding comes with its input, a crash with more.
func onlyTimeOver(output []string) bool {
	over := false
	for _, line := range output {
		switch line = strings.TrimSpace(line); {
		case line == "context deadline exceeded":
			over = true
		case strings.HasPrefix(line, "=== "), strings.HasPrefix(line, "--- FAIL: Fuzz"), strings.HasPrefix(line, "fuzz: elapsed: "), line == "":
		default:
			return false
		}
	}
	return over
}

// finish prints a package's line and, if there were any, its failures.
func (s *session) finish(p *pkg, e *event, build []string) {
	for _, t := range p.tests {
		switch result := p.result[t]; {
		case result != "fail" && p.hasSubtests(t):
			// its subtests count
		case result == "pass":
			p.passed++
			p.warn(s.out, t)
		case result == "skip":
			p.skipped++
			s.skipped = append(s.skipped, skip{e.Package, t, p.reason(t)})
		case !p.hasFailedSubtest(t):
			p.failed++
			fmt.Fprintf(s.out, "---- FAIL %s %s\n%s", e.Package, t, strings.Join(p.output[t], ""))
		}
	}
	if e.Action == "fail" && p.failed == 0 {
		p.failed++
		// no test says why: a failed build, a panic, a time-out
		fmt.Fprintf(s.out, "---- FAIL %s\n%s%s", e.Package, strings.Join(build, ""), strings.Join(p.output[""], ""))
		for t, lines := range p.output {
			if t != "" && p.result[t] == "" {
				fmt.Fprintf(s.out, "---- unfinished: %s\n%s", t, strings.Join(lines, ""))
			}
		}
	}
	s.passed += p.passed
	s.failed += p.failed
	if len(p.tests) > 0 || e.Action == "fail" {
		word := map[bool]string{true: "FAIL", false: "ok  "}[e.Action == "fail"]
		fmt.Fprintf(s.out, "%s %-40s %6.1fs  %d passed, %d failed, %d skipped\n", word, e.Package, e.Elapsed, p.passed, p.failed, p.skipped)
	}
}

func (p *pkg) hasSubtests(test string) bool {
	return slices.ContainsFunc(p.tests, func(t string) bool { return strings.HasPrefix(t, test+"/") })
}

func (p *pkg) hasFailedSubtest(test string) bool {
	return slices.ContainsFunc(p.tests, func(t string) bool { return strings.HasPrefix(t, test+"/") && p.result[t] == "fail" })
}

// warn shows the lines of a passed test that ask to be seen.
func (p *pkg) warn(w io.Writer, test string) {
	for _, line := range p.output[test] {
		if strings.Contains(line, "WARNING:") {
			fmt.Fprint(w, line)
		}
	}
}

// reason is what the test said when it skipped.
func (p *pkg) reason(test string) string {
	var said []string
	for _, line := range p.output[test] {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			said = append(said, line)
		}
	}
	if len(said) == 0 {
		return "no reason given"
	}
	why := strings.Join(said, " ")
	// "file_test.go:12: " differs between tests that skip for one reason
	if at, rest, ok := strings.Cut(why, ": "); ok && strings.Contains(at, ".go:") {
		why = rest
	}
	return why
}

// showSkipped prints each reason once, with the tests that it kept from running.
func (s *session) showSkipped() {
	for i, k := range s.skipped {
		same := func(o skip) bool { return o.pkg == k.pkg && o.reason == k.reason }
		if slices.ContainsFunc(s.skipped[:i], same) {
			continue
		}
		var names []string
		for _, o := range s.skipped[i:] {
			if same(o) {
				names = append(names, o.test)
			}
		}
		fmt.Fprintf(s.out, "SKIPPED %d of %s: %s\n        %s\n", len(names), k.pkg, k.reason, strings.Join(names, " "))
	}
}

// target is a fuzz target in the test binary of its package.
type target struct{ pkg, dir, bin, cache, name string }

// fuzz runs every fuzz target of the packages. Each package's tests are built
// once, where go test -fuzz would link them again for every target.
func (s *session) fuzz(pkgs []string, each, budget time.Duration) {
	tmp, err := os.MkdirTemp("", "runtests-fuzz-")
	if err != nil {
		s.failed++
		fmt.Fprintf(s.err, "FAIL fuzz: %v\n", err)
		return
	}
	defer os.RemoveAll(tmp)
	var targets []target
	for i, p := range pkgs {
		found, err := fuzzTargets(p, filepath.Join(tmp, strconv.Itoa(i)))
		if err != nil {
			s.failed++
			fmt.Fprintf(s.out, "---- FAIL %s: %v\n", p, err)
		}
		targets = append(targets, found...)
	}
	if len(targets) == 0 {
		return
	}
	each = max(time.Second, min(each, budget/time.Duration(len(targets))))
	fmt.Fprintf(s.out, "%d fuzz targets, %s each\n", len(targets), each.Round(time.Second/10))
	for _, t := range targets {
		fmt.Fprintf(s.out, "%s: ", t.name)
		cmd := exec.Command("go", "tool", "test2json", "-t", "-p", t.pkg, t.bin, "-test.v=test2json", "-test.paniconexit0", "-test.run=^$",
			"-test.fuzz=^"+t.name+"$", "-test.fuzztime="+each.String(), "-test.fuzzcachedir="+t.cache,
			"-test.fuzzminimizetime=10x") // by default one interesting input is made smaller for a minute, and nothing else is tried
		cmd.Dir = t.dir
		s.run(t.name, cmd)
	}
}

// fuzzTargets builds a package's tests into a file and lists its fuzz targets.
func fuzzTargets(pkg, bin string) ([]target, error) {
	var said strings.Builder
	output := func(dir, name string, args ...string) (string, error) {
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Stderr = dir, &said
		b, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, said.String(), b)
		}
		return strings.TrimSpace(string(b)), nil
	}
	where, err := output("", "go", "list", "-f", "{{.ImportPath}} {{.Dir}}", pkg)
	if err != nil {
		return nil, err
	}
	path, dir, _ := strings.Cut(where, " ")
	cache, err := output("", "go", "env", "GOCACHE")
	if err != nil {
		return nil, err
	}
	if _, err := output("", "go", "test", "-c", "-fuzz=.", "-o", bin, pkg); err != nil {
		return nil, err
	}
	list, err := output(dir, bin, "-test.list=^Fuzz")
	if err != nil {
		return nil, err
	}
	var out []target
	for name := range strings.FieldsSeq(list) {
		if strings.HasPrefix(name, "Fuzz") {
			out = append(out, target{path, dir, bin, filepath.Join(cache, "fuzz", path), name})
		}
	}
	return out, nil
}

func (s *session) tally(file string) error {
	if file == "" {
		return nil
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%d %d %d\n", s.passed, s.failed, len(s.skipped))
	return errors.Join(err, f.Close())
}
