package main

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"ringwall/internal/errs"
)

// Where things are in the guest.
const (
	payload  = "/payload"
	buildDir = payload + "/build"    // signed: what the policy authorises
	workDir  = "/run/bench"          // tmpfs: what the work writes
	dataFile = "/var/tmp/bench.data" // ext4: a file that is not code
	library  = "/lib/x86_64-linux-gnu/libc.so.6"
	tiny     = buildDir + "/tiny"
	cProject = workDir + "/project"
	goModule = workDir + "/module"
)

// Kinds of work, each with a goal of its own; "" has none.
const (
	kindExec = "exec"
	kindOpen = "open"
	kindReal = "real"
)

// workload is one thing that is measured.
type workload struct {
	name  string
	about string
	kind  string
	ops   int // what one sample is divided by
	// prepare is not measured.
	prepare func(n int) error
	argv    []string
	// printed: the program measures itself and prints nanoseconds; otherwise
	// its whole run counts.
	printed bool
}

//go:embed testdata/commands.sh
var commandsScript string

// workloads lists what is measured, the small things first. commands is how
// many short commands make one of the real workloads.
func workloads(commands int) []workload {
	micro := func(what string, n int, arg ...string) []string {
		return append([]string{buildDir + "/micro", what, strconv.Itoa(n)}, arg...)
	}
	return []workload{
		{name: "exec-static", about: "vfork, exec of a static program of 9 KiB, wait", kind: kindExec, ops: 250, argv: micro("exec", 250, tiny), printed: true},
		{name: "exec-dynamic", about: "vfork, exec of /bin/true with its libraries, wait", kind: kindExec, ops: 80, argv: micro("exec", 80, "/bin/true"), printed: true},
		{name: "open", about: "open, read 4 KiB, close: a file that is not code", kind: kindOpen, ops: 5000, argv: micro("open", 5000, dataFile), printed: true},
		{name: "open-python", about: "the same by python3, an interpreter", ops: 1500, argv: []string{"/usr/bin/python3", buildDir + "/opens.py", dataFile, "1500"}, printed: true},
		{name: "open-sh", about: "read line <file by sh, an interpreter", ops: 1000, argv: []string{"/bin/sh", buildDir + "/opens.sh", dataFile, "1000"}},
		{name: "mmap", about: "mmap of 64 KiB of libc.so.6 as code, munmap", ops: 2000, argv: micro("map", 2000, library), printed: true},
		{name: "fork", about: "fork, exit, wait", ops: 200, argv: micro("fork", 200), printed: true},
		{name: "make", about: "make of a C project of 8 files (gcc, as, ld)", kind: kindReal, ops: 1, prepare: writeCProject, argv: []string{"/usr/bin/make", "-s", "-C", cProject}},
		{name: "go-build", about: "go build of a module of 3 packages, standard library compiled", kind: kindReal, ops: 1, prepare: writeGoModule, argv: []string{"/usr/bin/go", "build", "-o", goModule + "/prog", "./cmd"}},
		{name: "commands", about: "sh running short commands (coreutils), of one", kind: kindReal, ops: commands, argv: []string{"/bin/sh", "-c", commandsScript, "sh", strconv.Itoa(commands / 10)}},
		{name: "imports", about: "python3 importing 13 modules of its library", kind: kindReal, ops: 1, argv: []string{"/usr/bin/python3", buildDir + "/imports.py"}},
	}
}

func names(list []workload) []string {
	var out []string
	for _, w := range list {
		out = append(out, w.name)
	}
	return out
}

// run does the work once, n times so far, in a cgroup, and returns the
// nanoseconds of one operation.
func (w workload) run(ctx context.Context, cgroup *os.File, n int) (float64, error) {
	if w.prepare != nil {
		if err := w.prepare(n); err != nil {
			return 0, fmt.Errorf("prepare: %w", err)
		}
	}
	c := exec.CommandContext(ctx, w.argv[0], w.argv[1:]...)
	c.Dir = workDir
	c.Env = workEnv()
	if w.name == "go-build" {
		c.Dir = goModule
	}
	var stdout, stderr bytes.Buffer
	if w.printed {
		c.Stdout = &stdout
	}
	c.Stderr = &stderr
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	start := time.Now()
	if err := c.Run(); err != nil {
		return 0, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	took := time.Since(start)
	if w.printed {
		v, err := strconv.ParseInt(strings.TrimSpace(stdout.String()), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("it printed %q: %w", stdout.String(), errs.Invalid)
		}
		took = time.Duration(v)
	}
	return float64(took) / float64(w.ops), nil
}

func workEnv() []string {
	return []string{
		"PATH=/usr/bin:/bin", "HOME=" + workDir, "TMPDIR=" + workDir + "/tmp", "LC_ALL=C.UTF-8",
		"GOCACHE=" + workDir + "/gocache", "GOFLAGS=-mod=mod", "GOPROXY=off", "GOTELEMETRY=off", "GO111MODULE=on", "CGO_ENABLED=0",
	}
}

const cFiles = 8

// writeCProject writes a C project without its objects.
func writeCProject(int) error {
	if err := os.RemoveAll(cProject); err != nil {
		return err
	}
	files := map[string]string{"Makefile": "CFLAGS = -O1 -Wall\nOBJS = main.o"}
	decls, calls := "", ""
	for i := range cFiles - 1 {
		files["Makefile"] += fmt.Sprintf(" part%d.o", i)
		decls += fmt.Sprintf("int part%d(const char *s, int n);\n", i)
		calls += fmt.Sprintf("\tn += part%d(argv[0], argc + n);\n", i)
		var b strings.Builder
		b.WriteString("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include \"parts.h\"\n\n")
		for j := range 6 {
			fmt.Fprintf(&b, "static int step%d(const char *s, int n)\n{\n\tint sum = %d;\n\tfor (size_t i = 0; i < strlen(s); i++)\n\t\tsum = sum * %d + s[i] * n;\n\tif (sum %% 7 == 0)\n\t\tprintf(\"%%s %%d\\n\", s, sum);\n\treturn sum;\n}\n\n", j, i+j, 31+j)
		}
		fmt.Fprintf(&b, "int part%d(const char *s, int n)\n{\n\treturn step0(s, n) + step1(s, n) + step2(s, n) + step3(s, n) + step4(s, n) + step5(s, n);\n}\n", i)
		files[fmt.Sprintf("part%d.c", i)] = b.String()
	}
	files["Makefile"] += "\nprog: $(OBJS)\n\t$(CC) -o $@ $(OBJS)\n$(OBJS): parts.h\n"
	files["parts.h"] = decls
	files["main.c"] = "#include \"parts.h\"\n\nint main(int argc, char **argv)\n{\n\tint n = 0;\n" + calls + "\treturn n & 1;\n}\n"
	return writeFiles(cProject, files)
}

// writeGoModule writes a Go module that no cache knows: n is in each package.
func writeGoModule(n int) error {
	if err := os.RemoveAll(goModule); err != nil {
		return err
	}
	part := func(name string) string {
		return fmt.Sprintf("package %s\n\nimport (\n\t\"fmt\"\n\t\"strings\"\n)\n\nconst round = %d\n\n// Text joins.\nfunc Text(s []string) string {\n\tvar b strings.Builder\n\tfor i, x := range s {\n\t\tfmt.Fprintf(&b, \"%%d %%s %%d\\n\", i, strings.ToUpper(x), round)\n\t}\n\treturn b.String()\n}\n", name, n)
	}
	return writeFiles(goModule, map[string]string{
		"go.mod":      "module example.com/bench\n\ngo 1.19\n",
		"one/one.go":  part("one"),
		"two/two.go":  part("two"),
		"cmd/main.go": fmt.Sprintf("package main\n\nimport (\n\t\"os\"\n\n\t\"example.com/bench/one\"\n\t\"example.com/bench/two\"\n)\n\nfunc main() {\n\tif len(one.Text(os.Args))+len(two.Text(os.Args)) == %d {\n\t\tos.Exit(1)\n\t}\n}\n", n),
	})
}

func writeFiles(dir string, files map[string]string) error {
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil { //nolint:gosec // a guest's scratch
			return err
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil { //nolint:gosec // a guest's scratch
			return err
		}
	}
	return nil
}
