package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestDocs runs every ```sh block of the pages that tell people what to type,
// block by block, in one directory a page.
func TestDocs(t *testing.T) {
	for _, page := range []string{"make-keys.md", "transparency-log.md", "sign-a-build.md", "build-an-image.md", "write-a-policy.md", "csv-in-ci.md"} {
		t.Run(page, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(filepath.Join("../../docs/ops", page))
			if err != nil {
				t.Fatal(err)
			}
			blocks := shellBlocks(string(text), "sh")
			if len(blocks) == 0 {
				t.Fatal("no commands in it")
			}
			dir := t.TempDir()
			sh := func(what, script string) {
				c := exec.CommandContext(t.Context(), "sh", "-eu", "-c", script)
				c.Dir, c.Env = dir, append(os.Environ(), "PAGE="+page)
				if out, err := c.CombinedOutput(); err != nil {
					t.Fatalf("%s: %v\n%s\n--- said:\n%s", what, err, script, out)
				}
			}
			if page != "make-keys.md" {
				if _, err := exec.LookPath("dpkg-deb"); err != nil {
					t.Skip("SKIPPED: no dpkg-deb here to make the package that the page signs")
				}
				sh("prepare", docsFixture)
			}
			for _, b := range blocks {
				sh("block", b)
			}
		})
	}
}

// docsFixture is what the pages take for granted.
const docsFixture = `
ringwall -q key init keys --name "Example Fleet"
[ "$PAGE" = write-a-policy.md ] || ringwall -q policy init --keys keys --name base --archive none -o base.yaml
mkdir -p dist/bin pkg/DEBIAN pkg/usr/bin
printf '#!/bin/sh\n' > dist/bin/edge
chmod 755 dist/bin/edge
cp dist/bin/edge pkg/usr/bin/edged
printf 'Package: edged\nVersion: 4.7.0-1\nArchitecture: amd64\nMaintainer: Nobody <nobody@example.invalid>\nDescription: a daemon\n' > pkg/DEBIAN/control
dpkg-deb --root-owner-group -b pkg edged_4.7.0-1_amd64.deb
ringwall sign dist --keys keys --product first --version 1 --out releases
[ "$PAGE" = sign-a-build.md ] || exit 0
git init -q src
git -C src -c user.name=Bob -c user.email=bob@example.org commit -q --allow-empty -m 'Serve faster

Reviewed-by: Ann Other <ann@example.org>'
printf '{"Action":"pass","Package":"example.org/edged","Test":"TestA"}\n' > go-test.json
printf '{"version":"2.1.0","runs":[{"tool":{"driver":{"name":"gosec"}},"results":[]}]}' > gosec.sarif
`

// shellBlocks are the fenced blocks that are marked with a language.
func shellBlocks(page, language string) []string {
	var out []string
	for i, part := range strings.Split("\n"+page, "\n```") {
		if body, ok := strings.CutPrefix(part, language+"\n"); ok && i%2 == 1 {
			out = append(out, body)
		}
	}
	return out
}
