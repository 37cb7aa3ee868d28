package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// writeModule makes a module of one package with one test file.
func writeModule(t *testing.T, test string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{"go.mod": "module demo\n\ngo 1.26\n", "demo.go": "package demo\n", "demo_test.go": test} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
}

func TestRun(t *testing.T) {
	for name, tc := range map[string]struct {
		test  string
		args  []string
		code  int
		sum   string
		shown []string
	}{
		"pass, subtests count once": {
			test: "func TestA(t *testing.T) { t.Run(\"x\", func(*testing.T) {}); t.Run(\"y\", func(*testing.T) {}) }\nfunc TestB(t *testing.T) { t.Log(\"WARNING: long\") }",
			sum:  "3 passed, 0 failed, 0 skipped", shown: []string{"WARNING: long"},
		},
		"a failed subtest is one failure, shown": {
			test: "func TestA(t *testing.T) { t.Run(\"x\", func(t *testing.T) { t.Error(\"broken thing\") }); t.Run(\"y\", func(*testing.T) {}) }",
			code: 1, sum: "1 passed, 1 failed, 0 skipped", shown: []string{"FAIL demo TestA/x", "broken thing"},
		},
		"a parent that fails by itself": {
			test: "func TestA(t *testing.T) { t.Run(\"x\", func(*testing.T) {}); t.Error(\"after\") }",
			code: 1, sum: "1 passed, 1 failed, 0 skipped", shown: []string{"after"},
		},
		"skips with their reason": {
			test: "func TestA(t *testing.T) { t.Skip(\"no kernel\") }\nfunc TestB(t *testing.T) { t.Skip(\"no kernel\") }\nfunc TestC(*testing.T) {}",
			sum:  "1 passed, 0 failed, 2 skipped", shown: []string{"SKIPPED 2 of demo: no kernel"},
		},
		"a panic": {
			test: "func TestA(t *testing.T) { panic(\"boom\") }",
			code: 1, sum: "0 passed, 1 failed, 0 skipped", shown: []string{"boom"},
		},
		"an exit in the middle": {
			test: "func TestA(t *testing.T) { t.Log(\"last words\"); os.Exit(3) }",
			code: 1, sum: "0 passed, 1 failed, 0 skipped", shown: []string{"last words"},
		},
		"does not build": {
			test: "func TestA(t *testing.T) { nonsense() }",
			code: 1, sum: "0 passed, 1 failed, 0 skipped", shown: []string{"undefined: nonsense"},
		},
		"no test at all": {code: 1, sum: "0 passed, 0 failed, 0 skipped"},
		"no such package": {
			args: []string{"test", "./nowhere"},
			code: 1, sum: "0 passed, 1 failed, 0 skipped",
		},
		"fuzz": {
			test: "func FuzzA(f *testing.F) { f.Fuzz(func(*testing.T, []byte) {}) }\nfunc FuzzB(f *testing.F) { f.Add([]byte(\"x\")); f.Fuzz(func(t *testing.T, b []byte) { t.Error(\"found it\") }) }",
			args: []string{"fuzz", "1s", "1s", "."},
			code: 1, sum: "1 passed, 1 failed, 0 skipped", shown: []string{"found it"},
		},
		"the time of a fuzz target is over": {
			// what go test prints then, see onlyTimeOver
			test: "func TestMain(*testing.M) { os.Stdout.WriteString(\"=== RUN   FuzzA\\nfuzz: elapsed: 1s, execs: 9\\n--- FAIL: FuzzA (1.00s)\\n    context deadline exceeded\\nFAIL\\n\"); os.Exit(1) }",
			args: []string{"test", "-count=1", "."},
			sum:  "1 passed, 0 failed, 0 skipped",
		},
		"a fuzz target with a finding at its end": {
			test: "func TestMain(*testing.M) { os.Stdout.WriteString(\"=== RUN   FuzzA\\n--- FAIL: FuzzA (1.00s)\\n    bad\\n    context deadline exceeded\\nFAIL\\n\"); os.Exit(1) }",
			args: []string{"test", "-count=1", "."},
			code: 1, sum: "0 passed, 1 failed, 0 skipped", shown: []string{"bad"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			writeModule(t, "package demo\n\nimport (\n\"os\"\n\"testing\"\n)\n\nvar _ = os.Exit\nvar _ testing.T\n"+tc.test+"\n")
			tally := filepath.Join(t.TempDir(), "tally")
			t.Setenv("CHECK_TALLY", tally)
			args := tc.args
			if args == nil {
				args = []string{"test", "-count=1", "."}
			}
			var stdout, stderr bytes.Buffer
			if code := run(args, &stdout, &stderr); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			out := stdout.String() + stderr.String()
			for _, want := range append(tc.shown, tc.sum) {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not shown", want)
				}
			}
			sum := strings.NewReplacer(" passed, ", " ", " failed, ", " ", " skipped", "\n").Replace(tc.sum)
			if got, _ := os.ReadFile(tally); string(got) != sum {
				t.Errorf("tally %q, want %q", got, sum)
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}
