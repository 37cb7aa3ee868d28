package internal_test

import (
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocs: links lead somewhere, and what looks like a file or a name of
// the code is one.
func TestDocs(t *testing.T) {
	root := os.DirFS("..")
	words, err := words(root)
	if err != nil {
		t.Fatal(err)
	}
	err = walk(root, func(doc string, text []byte) {
		for _, problem := range stale(root, words, doc, string(text)) {
			t.Errorf("%s: %s", doc, problem)
		}
	}, ".md")
	if err != nil {
		t.Fatal(err)
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

// stale lists what a page names and the tree does not have. Names of the code
// are looked for in the pages about the code only: designs and decisions speak
// of other people's formats too.
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
	aboutCode := path.Dir(doc) == "." || path.Dir(doc) == "docs"
	name := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)
	for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(text, -1) {
		token := m[1]
		top, _, isPath := strings.Cut(token, "/")
		switch {
		case isPath && (top == "internal" || top == "cmd" || top == "test" || top == "docs" || top == "tools") && !strings.ContainsAny(token, "* "):
			if _, err := fs.Stat(root, strings.TrimSuffix(token, "/")); err != nil {
				out = append(out, "no file "+token)
			}
		case aboutCode && name.MatchString(token) && strings.ContainsAny(token, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"):
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
	err := walk(root, func(p string, text []byte) {
		if p == "internal/docs_test.go" {
			return
		}
		for _, w := range word.FindAll(text, -1) {
			all[string(w)] = true
		}
	}, ".go", ".c", ".h", ".yaml", ".yml", ".sh", ".py", ".txtar")
	return all, err
}

// walk visits the files with one of the extensions.
func walk(root fs.FS, visit func(p string, text []byte), extensions ...string) error {
	return fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && p != "." && d.Name()[0] == '.' {
			return fs.SkipDir
		}
		if d.IsDir() || !slices.Contains(extensions, path.Ext(p)) {
			return nil
		}
		text, err := fs.ReadFile(root, p)
		if err != nil {
			return err
		}
		visit(p, text)
		return nil
	})
}
