package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

func TestFromEnvironment(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("RINGWALL_CPUS", "3")
	t.Setenv("RINGWALL_MEM", "2000")
	t.Setenv("RINGWALL_ICOUNT", "1")
	t.Setenv("RINGWALL_CMDLINE", "a b=c")
	t.Setenv("RINGWALL_MODULES", "x,y")
	t.Setenv("RINGWALL_ADD", "/h:/g")
	t.Setenv("RINGWALL_TIMEOUT", "5")
	t.Setenv("RINGWALL_ENV", "WANTED")
	t.Setenv("WANTED", "yes")
	t.Setenv("UNWANTED", "no")
	g, timeout, err := fromEnvironment(vm.Kernel{}, []string{"x.test", "-test.v"})
	if err != nil {
		t.Fatal(err)
	}
	if timeout != 5*time.Second || g.Machine.CPUs != 3 || g.Machine.MemMiB != 2000 || !g.Machine.ICount || g.Cmdline != "a b=c" || g.Dir != wd {
		t.Errorf("%v %+v", timeout, g)
	}
	if want := []string{"/test/x.test", "-test.v"}; !slices.Equal(g.Argv, want) {
		t.Errorf("arguments %q, want %q", g.Argv, want)
	}
	if want := []string{"x", "y"}; !slices.Equal(g.Modules, want) {
		t.Errorf("modules %q, want %q", g.Modules, want)
	}
	files := []vm.File{{Host: filepath.Join(wd, "x.test"), Guest: "/test/x.test"}, {Host: filepath.Join(wd, "testdata")}, {Host: "/h", Guest: "/g"}}
	if !slices.Equal(g.Files, files) {
		t.Errorf("files %v, want %v", g.Files, files)
	}
	if !slices.Contains(g.Env, "WANTED=yes") || !slices.Contains(g.Env, "RINGWALL_CPUS=3") || slices.Contains(g.Env, "UNWANTED=no") {
		t.Errorf("environment %q", g.Env)
	}
}

func TestFromEnvironment_refuses(t *testing.T) {
	for name, value := range map[string]string{"RINGWALL_CPUS": "many", "RINGWALL_MEM": "-1", "RINGWALL_TIMEOUT": "0", "RINGWALL_ADD": "/a:b"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, value)
			if _, _, err := fromEnvironment(vm.Kernel{}, []string{"x"}); !errors.Is(err, errs.Invalid) {
				t.Errorf("%s=%s: %v, want invalid", name, value, err)
			}
		})
	}
}

func TestTestSeconds(t *testing.T) {
	for arg, want := range map[string]int{"-test.timeout=30m0s": 1845, "-test.timeout=0s": 600, "-test.v": 600} {
		if got := testSeconds([]string{arg}); got != want {
			t.Errorf("%s: %d, want %d", arg, got, want)
		}
	}
}

func TestRun_unknownKernel(t *testing.T) {
	t.Setenv("RINGWALL_KERNEL", "2.4")
	var out, problems bytes.Buffer
	if code := run(t.Context(), []string{"x"}, &out, &problems); code != exitBroken || !strings.Contains(problems.String(), "known are") {
		t.Errorf("exit %d: %s", code, &problems)
	}
}

func TestOopses(t *testing.T) {
	console := "fine\nBUG: kernel NULL pointer dereference\ntrace\n"
	if got := oopses(console); got != "BUG: kernel NULL pointer dereference\ntrace\n" {
		t.Errorf("%q", got)
	}
	if got := oopses("fine\n"); got != "" {
		t.Errorf("%q", got)
	}
}
