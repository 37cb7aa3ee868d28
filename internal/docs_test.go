package internal_test

import (
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"testing"
)

// docs are the pages whose words must be found in the code, so that they are
// corrected when it changes.
func docs() []string {
	return []string{"README.md", "SECURITY.md", "docs/ARCHITECTURE.md", "docs/threat-model.md", "docs/dependencies.md", "docs/adr/README.md"}
}

// TestDocs_exist: links lead somewhere, and what looks like a file or a name of
// the code is one.
func TestDocs_exist(t *testing.T) {
	root := os.DirFS("..")
	words, err := words(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range docs() {
		text, err := fs.ReadFile(root, doc)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, problem := range stale(root, words, doc, string(text)) {
			t.Errorf("%s: %s", doc, problem)
		}
	}
}

func TestDocs_bite(t *testing.T) {
	root := os.DirFS("..")
	text := "[gone](nowhere.md) [web](https://example.org/x.md) `internal/nothing` `internal/errs` `errs.NoSuchKind` `errs.NotFound` `no_such_hook` `sh -c`"
	words := map[string]bool{"NotFound": true}
	got := strings.Join(stale(root, words, "docs/x.md", text), "; ")
	want := "link to nowhere.md leads nowhere; no file internal/nothing; nothing in the code is called errs.NoSuchKind; nothing in the code is called no_such_hook"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// stale lists what a page names and the tree does not have.
func stale(root fs.FS, words map[string]bool, doc, text string) []string {
	var out []string
	for _, m := range regexp.MustCompile(`\]\(([^)#]+)`).FindAllStringSubmatch(text, -1) {
		if strings.Contains(m[1], ":") {
			continue
		}
		if _, err := fs.Stat(root, path.Join(path.Dir(doc), m[1])); err != nil {
			out = append(out, "link to "+m[1]+" leads nowhere")
		}
	}
	name := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)
	for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(text, -1) {
		token := m[1]
		top, _, isPath := strings.Cut(token, "/")
		switch {
		case isPath && (top == "internal" || top == "cmd" || top == "test" || top == "docs" || top == "tools") && !strings.ContainsAny(token, "* "):
			if _, err := fs.Stat(root, strings.TrimSuffix(token, "/")); err != nil {
				out = append(out, "no file "+token)
			}
		case name.MatchString(token) && strings.ContainsAny(token, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"):
			if !words[token[strings.LastIndexByte(token, '.')+1:]] {
				out = append(out, "nothing in the code is called "+token)
			}
		}
	}
	return out
}

// words are all words of the sources.
func words(root fs.FS) (map[string]bool, error) {
	all := map[string]bool{}
	word := regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_]*`)
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p != "." && d.Name()[0] == '.' {
				return fs.SkipDir
			}
			return nil
		}
		switch path.Ext(p) {
		case ".go", ".c", ".h", ".yaml":
		default:
			return nil
		}
		if p == "internal/docs_test.go" {
			return nil
		}
		b, err := fs.ReadFile(root, p)
		if err != nil {
			return err
		}
		for _, w := range word.FindAll(b, -1) {
			all[string(w)] = true
		}
		return nil
	})
	return all, err
}
