package integrity_test

import (
	"os"
	"path/filepath"
	"testing"

	"ringwall/internal/integrity"
)

// examples returns the policies that the documentation shows, by name.
func examples(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("../../docs/examples/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	out := map[string][]byte{}
	for _, f := range files {
		if out[filepath.Base(f)], err = os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestExamples(t *testing.T) {
	inline := map[string]integrity.Mode{"audit-first.yaml": integrity.ModeOff, "server.yaml": integrity.ModeOff, "strict.yaml": integrity.ModeEnforce}
	for name, doc := range examples(t) {
		p, err := integrity.ParseNamed(name, doc)
		if err != nil {
			t.Error(err)
			continue
		}
		want := integrity.ModeEnforce
		if name == "audit-first.yaml" {
			want = integrity.ModeAudit
		}
		if p.Modes[integrity.KindExec] != want || p.Modes[integrity.KindScript] != want {
			t.Errorf("%s: modes %v", name, p.Modes)
		}
		for _, r := range p.Interpreters {
			if r.Name == "shell" && r.Inline != inline[name] {
				t.Errorf("%s: code on a shell's command line: %v", name, r.Inline)
			}
		}
		if len(p.Interpreters) > integrity.MaxInterpreters || len(p.Programs) == 0 || len(p.Knobs) == 0 {
			t.Errorf("%s: %d interpreters, %d programs, %d knobs", name, len(p.Interpreters), len(p.Programs), len(p.Knobs))
		}
	}
}
