package integrity_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func TestLearn(t *testing.T) {
	base, err := integrity.ParsePolicy([]byte(full(t)))
	if err != nil {
		t.Fatal(err)
	}
	exec := integrity.SetOf(integrity.KindExec)
	in := integrity.LearnInput{
		Trust: base.Trust,
		Packages: []integrity.LearnedPackage{
			{Archive: "debian", Name: "bash", Version: "5.2"}, {Archive: "debian", Name: "perl", Version: "5.36", Altered: 2}, {Name: "vendor-agent", Version: "1.0"},
		},
		Releases: []integrity.Origin{
			{Authority: "Example build CA", Identity: "spiffe://fleet.example/build/main", Product: "edged", Epoch: 14},
			{Authority: "Example build CA", Identity: "spiffe://fleet.example/build/main", Product: "edged", Epoch: 12},
		},
		Files: []integrity.LearnedFile{
			{SHA256: digest(1), Path: "/opt/app/run", Kinds: exec, Uses: 7},
			{SHA256: digest(1), Path: "/opt/app/run-again", Kinds: exec},
			{SHA256: digest(2), Path: "/opt/py/bin/python3.13", Kinds: exec},
			{SHA256: digest(3), Path: "/home/u/a\nrule: evil\x01\xff", Kinds: integrity.SetOf(integrity.KindScript)},
		},
		Programs: []integrity.LearnedProgram{
			{Path: "/usr/bin/node", Package: "nodejs", Does: integrity.RoleJIT},
			{Path: "/usr/bin/strace", Package: "strace", Does: integrity.RoleDebug},
			{Path: "/usr/bin/edged[1]", Product: "edged", Does: integrity.RoleJIT | integrity.RoleBPF},
			{Path: "/opt/app/run", SHA256: digest(1), Does: integrity.RoleJIT},
			{Path: "/opt/app2/run", SHA256: digest(4), Does: integrity.RoleJIT},
		},
	}
	for i := range 150 {
		in.Files = append(in.Files, integrity.LearnedFile{SHA256: digest(5 + i), Path: fmt.Sprintf("/opt/big/tool%03d", i), Kinds: exec})
	}
	doc, err := integrity.Learn(in)
	if err != nil {
		t.Fatal(err)
	}
	text := string(doc)
	for _, want := range []string{
		"# 2 packages whose signature chain verified",
		`- {rule: packages-debian, package: {archive: "debian", names: ["*"]}}`,
		"#   vendor-agent 1.0\n", "#   perl 5.36: 2\n",
		`signer: {authority: "Example build CA", identity: "spiffe://fleet.example/build/main", product: "edged", min_epoch: 12}`,
		`" # /opt/app/run: exec, used 7 times`,
		"# /opt/big: 150 executables. Too many to list",
		`- {rule: strace, match: {files: ["usr/bin/strace"], package: "strace"}, may: [debug]} # /usr/bin/strace`,
		`may: [bpf, jit]} # /usr/bin/edged[1]`,
		"- name: python-local\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks %q", want)
		}
	}
	for _, not := range []string{"rule: node", "\nrule: evil", "tool000", "run-again"} {
		if strings.Contains(text, not) {
			t.Errorf("has %q", not)
		}
	}
	if t.Failed() {
		t.Log(text[strings.Index(text, "\nallow:"):])
	}
	p, err := integrity.ParsePolicy(doc)
	if err != nil {
		t.Fatal(err)
	}
	if p.Modes[integrity.KindExec] != integrity.ModeAudit {
		t.Errorf("modes %v", p.Modes)
	}
	o := integrity.Object{Kind: integrity.KindExec, SHA256: digest(2)}
	if v := integrity.Evaluate(p, &o, noon()); !v.Allow || v.Interpreter != "python-local" {
		t.Errorf("the local Python: %+v", v)
	}
	o = integrity.Object{Kind: integrity.KindExec, SHA256: digest(1), Memberships: []integrity.Membership{{
		Origin: &integrity.Origin{Release: digest(9), Authority: "Example build CA", Identity: "spiffe://fleet.example/build/main", Product: "edged", Epoch: 13},
		Kinds:  exec, Names: []string{"usr/bin/edged[1]"},
	}}}
	if v := integrity.Evaluate(p, &o, noon()); !v.Allow || v.Roles != integrity.RoleJIT|integrity.RoleBPF {
		t.Errorf("the release: %+v", v)
	}
	again, err := integrity.Learn(in)
	if err != nil || string(again) != text {
		t.Error("the same input gives another policy")
	}
}

func TestLearn_nothing(t *testing.T) {
	doc, err := integrity.Learn(integrity.LearnInput{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := integrity.ParsePolicy(doc); err != nil {
		t.Error(err)
	}
	if _, err := integrity.Learn(integrity.LearnInput{Name: "No Name"}); !errors.Is(err, errs.Invalid) {
		t.Errorf("bad name: %v", err)
	}
}

func FuzzLearn(f *testing.F) {
	f.Add("/opt/a\n: &x *y # \"", "nodejs [*]")
	f.Fuzz(func(t *testing.T, path, pkg string) {
		if len(path) > 900 || len(pkg) > 200 || pkg == "" || path == "" {
			return
		}
		doc, err := integrity.Learn(integrity.LearnInput{
			Packages: []integrity.LearnedPackage{{Name: pkg, Version: path}},
			Files:    []integrity.LearnedFile{{SHA256: digest(1), Path: path, Kinds: integrity.SetOf(integrity.KindExec)}},
			Programs: []integrity.LearnedProgram{
				{Path: path, SHA256: digest(1), Does: integrity.RoleJIT}, {Path: path, Package: pkg, Does: integrity.RoleJIT},
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		p, err := integrity.ParsePolicy(doc)
		if err != nil || len(p.Allow) != 1 || len(p.Allow[0].SHA256) != 1 || p.Modes[integrity.KindExec] != integrity.ModeAudit {
			t.Fatalf("%v\n%s", err, doc)
		}
	})
}

// Long names that differ behind the cut still become two rules.
func TestLearn_longNames(t *testing.T) {
	long := "/opt/" + strings.Repeat("a-long-directory-name/", 4)
	var in integrity.LearnInput
	for i, dir := range []string{"x", "y", "z"} {
		in.Files = append(in.Files, integrity.LearnedFile{SHA256: digest(i + 1), Path: long + dir + "/run", Kinds: integrity.SetOf(integrity.KindExec)})
	}
	doc, err := integrity.Learn(in)
	if err != nil {
		t.Fatal(err)
	}
	p, err := integrity.ParsePolicy(doc)
	if err != nil || len(p.Allow) != 3 {
		t.Errorf("%d rules, want 3: %v", len(p.Allow), err)
	}
}

// Remarks without a rule are a valid policy, too.
func TestLearn_nothingVerified(t *testing.T) {
	for _, in := range []integrity.LearnInput{
		{}, {Packages: []integrity.LearnedPackage{{Name: "vendor-agent", Version: "1.0"}}},
	} {
		doc, err := integrity.Learn(in)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := integrity.ParsePolicy(doc); err != nil || len(p.Allow) != 0 {
			t.Errorf("%v\n%s", err, doc)
		}
	}
}
