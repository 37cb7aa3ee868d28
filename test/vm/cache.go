package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"ringwall/internal/errs"
)

// CacheDir is where kernels and images are kept: RINGWALL_CACHE, or .cache at
// the root of the source tree that holds the working directory.
func CacheDir() (string, error) {
	if dir := os.Getenv("RINGWALL_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, ".cache", "vm"), nil
}

// moduleRoot is the directory of the go.mod that declares module ringwall, at
// or above the working directory.
func moduleRoot() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module ringwall\n") {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no source tree of module ringwall at or above %s: %w", wd, errs.NotFound)
		}
	}
}

// cached returns the directory name below the cache. If it does not exist,
// build fills a new directory that then takes the name. Only one process at a
// time builds the same name; the others wait for it.
func cached(name string, build func(dir string) error) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, name)
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(dir + ".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := build(tmp); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return dir, os.Rename(tmp, dir)
}

// lock takes the lock file, waiting for as long as another process holds it.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = f.Close() }, nil
}

// command runs a program in dir and returns its standard output. A program
// that is not installed is errs.Unsupported.
func command(ctx context.Context, dir, name string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = dir
	// INITRD=No: the hooks of kernel packages make no boot image.
	c.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "INITRD=No")
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.Output()
	if err == nil {
		return string(out), nil
	}
	if _, look := exec.LookPath(name); look != nil {
		return "", fmt.Errorf("%s is not installed: %w", name, errs.Unsupported)
	}
	text := strings.TrimSpace(stderr.String())
	if len(text) > 2000 {
		text = "…" + text[len(text)-2000:]
	}
	return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text)
}
