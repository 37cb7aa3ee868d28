package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

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
	// Of a build that was killed; the lock says that no other runs.
	tmp := dir + ".new"
	if err := removeTree(tmp); err != nil {
		return "", err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return "", err
	}
	defer removeTree(tmp)
	if err := build(tmp); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return dir, os.Rename(tmp, dir)
}

// removeTree removes a directory, unless something is mounted below it.
func removeTree(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), " "+dir+"/") {
		return fmt.Errorf("remove %s: something is mounted below it: %w", dir, errs.Conflict)
	}
	return os.RemoveAll(dir)
}

// lock takes the lock file, waiting for as long as another process holds it.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
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
	return runCommand(c)
}

// isolated is command with a mount namespace of its own: what the program
// mounts cannot be left behind, where the removal of a half-built directory
// would descend into this machine's /dev and /sys. It needs root.
func isolated(ctx context.Context, name string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	return runCommand(c)
}

func runCommand(c *exec.Cmd) (string, error) {
	// INITRD=No: the hooks of kernel packages make no boot image.
	c.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "INITRD=No")
	// Asked to stop rather than killed, mmdebstrap stops its children too.
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 20 * time.Second
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.Output()
	if err == nil {
		return string(out), nil
	}
	if _, look := exec.LookPath(c.Args[0]); look != nil {
		return "", fmt.Errorf("%s is not installed: %w", c.Args[0], errs.Unsupported)
	}
	text := strings.TrimSpace(stderr.String())
	if len(text) > 2000 {
		text = "…" + text[len(text)-2000:]
	}
	return "", fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, text)
}
