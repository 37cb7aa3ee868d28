// Command build makes the directory that the attack suite needs in a guest:
//
//	go run ./test/attack/build -o DIR
//
// It needs gcc with 32-bit code generation, mksquashfs and mke2fs. What is in
// DIR is for guests of this project only.
package main

import (
	"context"
	"embed"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"ringwall/internal/errs"
)

//go:embed src authorised
var sources embed.FS

func main() {
	out := flag.String("o", "", "directory to make")
	flag.Parse()
	if err := build(context.Background(), *out); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		os.Exit(1)
	}
}

// authorised lists what a policy must authorise for the suite to mean
// anything: the attacker sits inside these programs. Everything else in the
// directory, and all that the evaluator writes, is unlisted.
func authorised() []string {
	return []string{"evaluate", "attack", "attack-static", "abort", "victim", "librwdemo.so"}
}

func build(ctx context.Context, out string) error {
	if out == "" {
		return fmt.Errorf("-o DIR is missing: %w", errs.Invalid)
	}
	out, err := filepath.Abs(out)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "attack-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := os.CopyFS(work, sources); err != nil {
		return err
	}
	if err := compile(ctx, filepath.Join(work, "src"), out); err != nil {
		return err
	}
	if err := images(ctx, work, out); err != nil {
		return err
	}
	return finish(ctx, out)
}

func compile(ctx context.Context, src, out string) error {
	tool := []string{"main.c", "memory.c", "process.c", "library.c", "file.c", "fuse.c"}
	// the payloads carry no libc: small, and quick to hash
	bare := []string{"-O1", "-nostdlib", "-fno-stack-protector", "-fno-builtin", "-Wl,--build-id=none", "-Wl,-z,noseparate-code", "-Wl,-z,norelro", "payload.c"}
	steps := []struct {
		out  string
		args []string
	}{
		{"attack", append([]string{"-O1", "-Wall", "-fno-stack-protector"}, append(tool, "-lpthread", "-ldl")...)},
		{"attack-static", append([]string{"-O1", "-Wall", "-fno-stack-protector", "-static", "-DSTATIC"}, append(tool, "-lpthread")...)},
		{"abort", []string{"-O1", "abort.c"}},
		{"payload", append([]string{"-static"}, bare...)},
		{"payload32", append([]string{"-m32", "-static", "-fno-pic", "-no-pie"}, bare...)},
		{"payload.so", append([]string{"-shared", "-fPIC", "-DLIBRARY"}, bare...)},
		{"payload-dyn", []string{"-O1", "-DWITH_LIBC", "payload.c"}},
		{"librwdemo.so", []string{"-O1", "-shared", "-fPIC", "-Wl,-z,noseparate-code", "demo.c"}},
		{"victim", []string{"-O1", "victim.c", "-L" + out, "-lrwdemo", "-Wl,-rpath,$ORIGIN", "-Wl,--enable-new-dtags"}},
	}
	for _, s := range steps {
		if err := run(ctx, src, "gcc", append([]string{"-o", filepath.Join(out, s.out)}, s.args...)...); err != nil {
			return err
		}
	}
	return nil
}

// images makes a squashfs with a payload on it and an empty ext4. The squashfs
// is not compressed so that the payload's slot can be filled in place.
func images(ctx context.Context, work, out string) error {
	tree := filepath.Join(work, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(out, "payload"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tree, "p"), raw, 0o755); err != nil {
		return err
	}
	if err := run(ctx, work, "mksquashfs", tree, filepath.Join(out, "image.squashfs"), "-noappend", "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX"); err != nil {
		return err
	}
	ext4 := filepath.Join(out, "image.ext4")
	if err := os.RemoveAll(ext4); err != nil {
		return err
	}
	return run(ctx, work, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal", ext4, "8M")
}

func finish(ctx context.Context, out string) error {
	if err := os.RemoveAll(filepath.Join(out, "authorised")); err != nil {
		return err
	}
	scripts, err := fs.Sub(sources, "authorised")
	if err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(out, "authorised"), scripts); err != nil {
		return err
	}
	cmd := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(out, "evaluate"), "ringwall/test/attack/evaluate"}
	if err := run(ctx, "", "go", cmd...); err != nil {
		return err
	}
	list := authorised()
	err = fs.WalkDir(scripts, ".", func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			list = append(list, "authorised/"+p)
		}
		return err
	})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "authorised.txt"), []byte(strings.Join(list, "\n")+"\n"), 0o644)
}

// run starts a build tool in dir. Go must not use cgo: the evaluator runs where there may be no libc.
func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, said)
	}
	return nil
}
