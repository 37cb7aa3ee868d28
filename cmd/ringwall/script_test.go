package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/rogpeppe/go-internal/testscript"

	"ringwall/internal/errs"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ringwall": main})
}

// TestScript runs what a person types. Besides testscript's own commands there are
//
//	exits N COMMAND...    the command must end with exit code N
//	json PATH WANT        the value at PATH (a.b.0.c, or a.len for a count) of the last output
//
// $TESTDATA is where recordings lie that no script can make.
func TestScript(t *testing.T) {
	recordings, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Setup:               func(e *testscript.Env) error { e.Setenv("TESTDATA", recordings); return nil },
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits,
			"json":  jsonValue,
		},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits N COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	if err != nil {
		ts.Fatalf("exits: %v", err)
	}
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var e *exec.ExitError
		if !errors.As(err, &e) {
			ts.Fatalf("exits: %v", err)
		}
		got = e.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func jsonValue(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: json PATH WANT")
	}
	got, err := lookup(ts.ReadFile("stdout"), args[0])
	if err != nil {
		ts.Fatalf("json %s: %v", args[0], err)
	}
	if (got == args[1]) == neg {
		ts.Fatalf("json %s: %q, want %q (neg %v)", args[0], got, args[1], neg)
	}
}

func lookup(doc, path string) (string, error) {
	var v any
	if err := json.Unmarshal([]byte(doc), &v); err != nil {
		return "", err
	}
	for key := range strings.SplitSeq(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			next, ok := x[key]
			if !ok {
				return "", fmt.Errorf("no %q", key)
			}
			v = next
		case []any:
			if key == "len" {
				v = float64(len(x))
				continue
			}
			i, err := strconv.Atoi(key)
			if err != nil || i >= len(x) {
				return "", fmt.Errorf("no element %q of %d", key, len(x))
			}
			v = x[i]
		default:
			return "", fmt.Errorf("%q of a %T", key, v)
		}
	}
	return fmt.Sprint(v), nil
}

// Text for people must not steer their terminal.
func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain – ümlaut\n\ttab": "plain – ümlaut\n\ttab",
		"\x1b[2Jgone":           `\x1b[2Jgone`,
		"a\rb\x00":              `a\rb\x00`,
		"\u202eevil":            `\u202eevil`,
		"bad\xffutf8":           `bad\xffutf8`,
		"real \ufffd":           "real \ufffd",
		"quote'":                "quote'",
	} {
		if got := printable(in); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{
		"usr/bin/ls": "usr/bin/ls", "a b": `"a b"`, "": `""`, "a\nb": `"a\nb"`, `a"b`: `"a\"b"`, "x\xff": `"x\xff"`,
	} {
		if got := shown(in); got != want {
			t.Errorf("shown(%q) = %s, want %s", in, got, want)
		}
	}
}

func TestReleaseStem_cannotLeaveTheDirectory(t *testing.T) {
	for _, tc := range [][2]string{
		{releaseStem("edged", "4.7.0-1~rc+2", ""), "edged_4.7.0-1~rc+2"},
		{releaseStem("edged", "1:2", "amd64"), "edged_1%3a2_amd64"},
		{releaseStem("edged", "/../../x y", ""), "edged_%2f..%2f..%2fx%20y"},
		{releaseStem("edged", "%2f_", ""), "edged_%252f%5f"},
	} {
		if tc[0] != tc[1] {
			t.Errorf("%q, want %q", tc[0], tc[1])
		}
	}
}

// An event log is text from elsewhere: a line is a record or an error with its
// number, and the log never costs more than its longest line.
func FuzzReadEventLines(f *testing.F) {
	f.Add([]byte(`{"type":"audit","kind":"exec","digest":"sha256:00","count":3}` + "\n\n{}\n"))
	f.Add([]byte("{\"count\":-1,\"path\":\"\x1b\"}\n[]\n"))
	f.Fuzz(func(t *testing.T, log []byte) {
		n := 0
		err := readEventLines(&env{stdin: bytes.NewReader(log)}, "-", func(r *recorded) error {
			n++
			return nil
		})
		if err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatalf("%v is not an invalid", err)
		}
		if lines := bytes.Count(log, []byte("\n")) + 1; n > lines {
			t.Fatalf("%d records in %d lines", n, lines)
		}
	})
}

// What is printed never steers a terminal, and keeps what is printable.
func FuzzPrintable(f *testing.F) {
	f.Add("a\x1b[31m\u202e\xff\n")
	f.Fuzz(func(t *testing.T, s string) {
		out := printable(s)
		for _, r := range out {
			if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
				t.Fatalf("%q keeps %q", out, r)
			}
		}
		if printable(out) != out {
			t.Fatalf("%q is not stable", out)
		}
		if strings.ContainsAny(shown(s), "\n\t") {
			t.Fatalf("shown(%q) = %q ends its line", s, shown(s))
		}
	})
}
