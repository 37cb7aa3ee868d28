package vm

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ringwall/internal/errs"
)

// aptSource is a view of Debian's archive. The zero value is what this machine
// is configured to use.
type aptSource struct {
	options []string
}

const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// newSource makes a private view of one suite, on the mirror that this machine
// uses for Debian, without touching the machine's own lists.
func newSource(ctx context.Context, suite string) (aptSource, error) {
	mirror, err := debianMirror(ctx)
	if err != nil {
		return aptSource{}, err
	}
	cache, err := CacheDir()
	if err != nil {
		return aptSource{}, err
	}
	dir := filepath.Join(cache, "apt-"+suite)
	for _, d := range []string{"state/lists/partial", "cache/archives/partial", "parts"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return aptSource{}, err
		}
	}
	list := filepath.Join(dir, "sources.list")
	if err := os.WriteFile(list, fmt.Appendf(nil, "deb [signed-by=%s] %s %s main\n", debianKeyring, mirror, suite), 0o644); err != nil {
		return aptSource{}, err
	}
	s := aptSource{options: []string{
		"-o", "Dir::State=" + filepath.Join(dir, "state"),
		"-o", "Dir::State::status=/dev/null",
		"-o", "Dir::Cache=" + filepath.Join(dir, "cache"),
		"-o", "Dir::Etc::sourcelist=" + list,
		"-o", "Dir::Etc::sourceparts=" + filepath.Join(dir, "parts"),
		"-o", "Dir::Etc::preferencesparts=" + filepath.Join(dir, "parts"),
		"-o", "Acquire::Languages=none",
		"-o", "APT::Sandbox::User=root",
		"-o", "Acquire::Retries=2",
	}}
	if _, err := s.run(ctx, "", "apt-get", "-qq", "update"); err != nil {
		return aptSource{}, fmt.Errorf("suite %s: %v: %w", suite, err, errs.Unsupported)
	}
	return s, nil
}

// debianMirror is the address from which this machine gets Debian's packages.
func debianMirror(ctx context.Context) (string, error) {
	out, err := command(ctx, "", "apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "Debian" && f[1] == "main" && strings.HasSuffix(strings.TrimSuffix(f[2], "/"), "/debian") {
			return f[2], nil
		}
	}
	return "", fmt.Errorf("no package source of Debian is configured (apt-get update?): %w", errs.Unsupported)
}

func (s aptSource) run(ctx context.Context, dir, name string, args ...string) (string, error) {
	return command(ctx, dir, name, slices.Concat(args[:1], s.options, args[1:])...)
}

// names lists the packages whose name starts with prefix.
func (s aptSource) names(ctx context.Context, prefix string) ([]string, error) {
	out, err := s.run(ctx, "", "apt-cache", "pkgnames", prefix)
	return strings.Fields(out), err
}

// version is the newest version of a package.
func (s aptSource) version(ctx context.Context, pkg string) (string, error) {
	out, err := s.run(ctx, "", "apt-cache", "show", "--no-all-versions", pkg)
	if err != nil {
		return "", err
	}
	v := field(out, "Version")
	if v == "" {
		return "", fmt.Errorf("package %s has no version: %w", pkg, errs.NotFound)
	}
	return v, nil
}

// depends lists the packages that pkg (name=version) names in Depends.
func (s aptSource) depends(ctx context.Context, pkg string) ([]string, error) {
	out, err := s.run(ctx, "", "apt-cache", "show", pkg)
	if err != nil {
		return nil, err
	}
	var names []string
	for dep := range strings.SplitSeq(field(out, "Depends"), ",") {
		if f := strings.Fields(dep); len(f) > 0 {
			names = append(names, f[0])
		}
	}
	return names, nil
}

// field is the value of the first field of that name in a control paragraph.
func field(paragraph, name string) string {
	sc := bufio.NewScanner(strings.NewReader(paragraph))
	for sc.Scan() {
		if v, ok := strings.CutPrefix(sc.Text(), name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// download fetches packages into dir. apt checks them against the signed
// index.
func (s aptSource) download(ctx context.Context, dir string, pkgs ...string) error {
	if _, err := s.run(ctx, dir, "apt-get", append([]string{"-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2", "download"}, pkgs...)...); err != nil {
		return fmt.Errorf("%v: %w", err, errs.Unsupported)
	}
	return nil
}
