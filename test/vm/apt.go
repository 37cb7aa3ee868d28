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
	lists   string // where a private view keeps the indexes
	options []string
}

const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// newSource makes a private view of one suite, on the mirror that this machine
// uses for Debian, without touching the machine's own lists.
func newSource(ctx context.Context, suite string) (aptSource, error) {
	mirror, _, err := debianMirrors(ctx)
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
	s := aptSource{lists: filepath.Join(dir, "state/lists"), options: []string{
		"-o", "Dir::State=" + filepath.Join(dir, "state"),
		"-o", "Dir::State::status=/dev/null",
		"-o", "Dir::Cache=" + filepath.Join(dir, "cache"),
		"-o", "Dir::Etc::sourcelist=" + list,
		"-o", "Dir::Etc::sourceparts=" + filepath.Join(dir, "parts"),
		"-o", "Dir::Etc::preferencesparts=" + filepath.Join(dir, "parts"),
		"-o", "Acquire::Languages=none",
		"-o", "Acquire::GzipIndexes=false",
		"-o", "APT::Sandbox::User=root",
		"-o", "Acquire::Retries=2",
	}}
	if _, err := s.run(ctx, "", "apt-get", "-qq", "update"); err != nil {
		return aptSource{}, fmt.Errorf("suite %s: %w: %w", suite, err, errs.Unsupported)
	}
	return s, nil
}

// debianMirrors are the addresses from which this machine gets Debian's
// packages and their security updates.
func debianMirrors(ctx context.Context) (main, security string, err error) {
	out, err := command(ctx, "", "apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 3 || f[0] != "Debian" || f[1] != "main" {
			continue
		}
		switch uri := strings.TrimSuffix(f[2], "/"); {
		case strings.HasSuffix(uri, "/debian"):
			main = uri
		case strings.HasSuffix(uri, "/debian-security"):
			security = uri
		}
	}
	if main == "" || security == "" {
		return "", "", fmt.Errorf("no package sources of Debian and its security updates are configured (apt-get update?): %w", errs.Unsupported)
	}
	return main, security, nil
}

// copyLists copies the indexes of a private view to a new directory.
func (s aptSource) copyLists(to string) error {
	if s.lists == "" {
		return nil
	}
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	for _, pattern := range []string{"*_InRelease", "*_Packages", "*_Packages.*"} {
		files, err := filepath.Glob(filepath.Join(s.lists, pattern))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := copyFile(filepath.Join(to, filepath.Base(f)), f); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyFile copies a file and its modification time: apt compares that.
func copyFile(to, from string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.WriteFile(to, b, 0o644); err != nil {
		return err
	}
	return os.Chtimes(to, st.ModTime(), st.ModTime())
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
		return fmt.Errorf("%w: %w", err, errs.Unsupported)
	}
	return nil
}
