// Package integrations_test runs the shell steps of the CI integrations with the
// real ringwall, the way that each service would start them. What a service does
// around them (downloading, uploading) is not tested here.
package integrations_test

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// built is the directory of the ringwall under test.
var built string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "integrations")
	if err != nil {
		panic(err)
	}
	built = dir
	out, err := exec.Command("go", "build", "-o", filepath.Join(dir, "ringwall"), "ringwall/cmd/ringwall").CombinedOutput()
	if err != nil {
		panic(string(out))
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// lab is a checkout of somebody's build, with a ringwall in PATH.
type lab struct {
	dir, path string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{dir: t.TempDir(), path: built + ":" + os.Getenv("PATH")}
	for name, text := range map[string]string{
		"my dist/bin/run.sh": "#!/bin/sh\n",
		"cells.yaml":         "version: 1\nrings: [canary, prod]\ncells:\n  - {ring: canary, hosts: 1, policy: good.yaml}\n  - {ring: prod, hosts: 9, policy: bad.yaml}\n",
	} {
		p := filepath.Join(l.dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, script := range []string{
		"ringwall -q key init keys --name Fleet",
		"ringwall -q sign 'my dist' --keys keys --product edged --version 1",
		"ringwall -q policy init --keys keys --name base --profile strict --archive none -o good.yaml",
		"sed s#build/main#build/none# good.yaml > bad.yaml",
		"sed 's#^mode: enforce#mode: audit#' bad.yaml > audit.yaml",
	} {
		if code, text := l.sh(t, script, nil); code != 0 {
			t.Fatalf("%s: %d\n%s", script, code, text)
		}
	}
	return l
}

// sh runs a script with nothing but these variables.
func (l *lab) sh(t *testing.T, script string, env map[string]string, args ...string) (int, string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), "sh", append([]string{"-c", script, "step"}, args...)...)
	c.Dir = l.dir
	c.Env = []string{"PATH=" + l.path, "HOME=" + l.dir}
	for k, v := range env {
		c.Env = append(c.Env, k+"="+v)
	}
	out, err := c.CombinedOutput()
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode(), string(out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0, string(out)
}

func (l *lab) read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(l.dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// A build, what it is asked with, and what must come of it.
var cases = []struct {
	name   string
	inputs map[string]string
	code   int
	word   string
}{
	{"passes", map[string]string{"cells": "cells.yaml", "rings": "canary"}, 0, "pass"},
	{"would block", map[string]string{"cells": "cells.yaml"}, 1, "block"},
	{"policies", map[string]string{"policy": "good.yaml audit.yaml", "strict": "true"}, 2, "warn"},
	{"cannot decide", map[string]string{"policy": "good.yaml nowhere.yaml"}, 4, "hold"},
	{"typed wrongly", map[string]string{"policy": "good.yaml", "rings": "canary"}, 3, "error"},
	{"an input that would be a command", map[string]string{"policy": "good.yaml", "artefact": "$(touch owned)"}, 4, "hold"},
	{"an input that would be an option", map[string]string{"policy": "good.yaml", "artefact": "--help"}, 4, "hold"},
}

func inputs(c map[string]string) map[string]string {
	out := map[string]string{"artefact": "my dist", "release": "edged_1.release.json", "cells": "", "policy": "", "rings": "", "baseline": "", "notify": "", "strict": "false"}
	maps.Copy(out, c)
	return out
}

// reports checks what a run left behind, besides its exit code.
func (l *lab) reports(t *testing.T, word string) {
	t.Helper()
	if l.read(t, "owned") != "" {
		t.Error("an input was run")
	}
	if _, err := os.Stat(filepath.Join(l.dir, "owned")); err == nil {
		t.Error("an input was run")
	}
	if word == "error" || l.read(t, "csv.json") == "" {
		return
	}
	for _, name := range []string{"csv.json", "csv.sarif"} {
		if !json.Valid([]byte(l.read(t, name))) {
			t.Errorf("%s is no JSON", name)
		}
	}
	if !strings.Contains(l.read(t, "csv.xml"), "<testsuites") {
		t.Error("csv.xml is no JUnit report")
	}
}

func load(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	d := yaml.NewDecoder(strings.NewReader(string(b)))
	if err := d.Decode(v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func TestGitHubAction(t *testing.T) {
	var action struct {
		Name, Description string
		Inputs            map[string]struct {
			Description, Default string
			Required             bool
		}
		Outputs map[string]struct{ Description, Value string }
		Runs    struct {
			Using string
			Steps []struct {
				ID, Shell, Run, Uses string
				Env                  map[string]string
			}
		}
	}
	load(t, "github/action.yml", &action)
	if action.Runs.Using != "composite" || len(action.Runs.Steps) != 1 || action.Runs.Steps[0].Shell == "" {
		t.Fatalf("%+v", action.Runs)
	}
	step := action.Runs.Steps[0]
	if strings.Contains(step.Run, "${{") {
		t.Error("an expression in the script: an input could become text of it")
	}
	expression := regexp.MustCompile(`^\$\{\{ inputs\.([a-z]+) \}\}$`)
	l := newLab(t)
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			in := inputs(tc.inputs)
			in["policy"] = strings.ReplaceAll(in["policy"], " ", "\n")
			for _, f := range []string{"out", "summary"} {
				_ = os.Remove(filepath.Join(l.dir, f))
			}
			env := map[string]string{"GITHUB_OUTPUT": filepath.Join(l.dir, "out"), "GITHUB_STEP_SUMMARY": filepath.Join(l.dir, "summary")}
			for k, v := range step.Env {
				m := expression.FindStringSubmatch(v)
				if m == nil {
					t.Fatalf("%s: %q", k, v)
				}
				if _, known := action.Inputs[m[1]]; !known {
					t.Fatalf("input %s is not declared", m[1])
				}
				env[k] = in[m[1]]
			}
			code, text := l.sh(t, step.Run, env)
			if code != tc.code {
				t.Errorf("exit code %d, want %d\n%s", code, tc.code, text)
			}
			if out := l.read(t, "out"); !strings.Contains(out, "outcome="+tc.word+"\n") {
				t.Errorf("output %q\n%s", out, text)
			}
			if tc.code < 3 && !strings.Contains(l.read(t, "summary"), "### CSV") {
				t.Error("no summary")
			}
			l.reports(t, tc.word)
		})
	}
	for name := range action.Outputs {
		if want := "${{ steps." + step.ID + ".outputs." + name + " }}"; action.Outputs[name].Value != want {
			t.Errorf("output %s is %s", name, action.Outputs[name].Value)
		}
	}
}

func TestGitLabTemplate(t *testing.T) {
	var file map[string]struct {
		Variables    map[string]string
		Script       []string
		AllowFailure *bool `yaml:"allow_failure"`
		Artifacts    struct {
			When    string
			Expire  string `yaml:"expire_in"`
			Paths   []string
			Reports map[string]string
		}
	}
	load(t, "gitlab/csv.gitlab-ci.yml", &file)
	job, ok := file[".ringwall-csv"]
	if !ok || len(job.Script) != 1 || job.AllowFailure == nil || *job.AllowFailure || job.Artifacts.When != "always" {
		t.Fatalf("%+v", job)
	}
	l := newLab(t)
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			env := maps.Clone(job.Variables)
			for k, v := range inputs(tc.inputs) {
				name := "CSV_" + strings.ToUpper(k)
				if _, known := env[name]; !known {
					t.Fatalf("variable %s is not declared", name)
				}
				env[name] = v
			}
			code, text := l.sh(t, job.Script[0], env)
			if code != tc.code {
				t.Errorf("exit code %d, want %d\n%s", code, tc.code, text)
			}
			if tc.code < 3 {
				for _, p := range append(job.Artifacts.Paths, job.Artifacts.Reports["junit"]) {
					if l.read(t, p) == "" {
						t.Errorf("%s is missing", p)
					}
				}
			}
			l.reports(t, tc.word)
		})
	}
}

func TestTektonTask(t *testing.T) {
	var task struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Metadata   struct{ Name string }
		Spec       struct {
			Description string
			Params      []struct {
				Name, Type, Description string
				Default                 any
			}
			Workspaces []struct{ Name, Description string }
			Results    []struct{ Name, Type, Description string }
			Steps      []struct {
				Name, Image, Script string
				WorkingDir          string `yaml:"workingDir"`
				Env                 []struct{ Name, Value string }
				Args                []string
				SecurityContext     map[string]bool `yaml:"securityContext"`
			}
		}
	}
	load(t, "tekton/csv-verify.yaml", &task)
	if task.APIVersion != "tekton.dev/v1" || task.Kind != "Task" || len(task.Spec.Steps) != 1 {
		t.Fatalf("%+v", task)
	}
	step := task.Spec.Steps[0]
	if strings.Contains(step.Script, "$(params") {
		t.Error("a parameter in the script would be text of it")
	}
	known := map[string]bool{}
	for _, p := range task.Spec.Params {
		known[p.Name] = true
	}
	l := newLab(t)
	result := filepath.Join(l.dir, "outcome")
	reference := regexp.MustCompile(`^\$\((params|results)\.([a-z]+)(\.path)?\)$`)
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			_ = os.Remove(result)
			in, env := inputs(tc.inputs), map[string]string{}
			for _, e := range step.Env {
				m := reference.FindStringSubmatch(e.Value)
				switch {
				case m == nil:
					t.Fatalf("%s: %q", e.Name, e.Value)
				case m[1] == "results":
					env[e.Name] = result
				case !known[m[2]]:
					t.Fatalf("parameter %s is not declared", m[2])
				default:
					env[e.Name] = in[m[2]]
				}
			}
			code, text := l.sh(t, step.Script, env, strings.Fields(in["policy"])...)
			if code != tc.code || l.read(t, "outcome") != tc.word {
				t.Errorf("exit code %d, want %d; outcome %q, want %q\n%s", code, tc.code, l.read(t, "outcome"), tc.word, text)
			}
			l.reports(t, tc.word)
		})
	}
}
