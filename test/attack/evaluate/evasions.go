package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// evasions are techniques that hide from a check of interpreters who the
// interpreter is, what its arguments mean or which file is the script: groups
// 25 to 27.
func evasions() []technique {
	out := append(disguises(), spellings()...)
	for _, l := range languages() {
		if l.name == "busybox-ash" || l.name == "busybox-awk" || l.name == "make" {
			continue
		}
		group := 25
		if shellLike(l) {
			group = 26
		}
		out = append(out, technique{
			ID: "fifo-" + l.name, Group: group, As: asBoth, Title: l.name + " runs a named pipe", Stop: byRead,
			Run: func(a *attempt) error { return runFifo(a, l) },
		}, technique{
			ID: "relative-" + l.name, Group: group, As: asBoth, Title: l.name + " runs ./notes.txt", Stop: byRead,
			Run: func(a *attempt) error {
				if _, err := a.write("notes.txt", a.code(l.code)); err != nil {
					return err
				}
				return a.start(call{argv: append(slices.Clone(l.argv), "./notes.txt"), dir: a.Dir})
			},
		})
	}
	return out
}

// runFifo writes the code into a named pipe while the interpreter reads it.
func runFifo(a *attempt, l language) error {
	p := a.path("fifo")
	if err := unix.Mkfifo(p, 0o666); err != nil {
		return err
	}
	go func() {
		// some interpreters open their script more than once
		for range 3 {
			f, err := os.OpenFile(p, os.O_WRONLY, 0)
			if err != nil {
				return
			}
			_, _ = f.WriteString(a.code(l.code))
			f.Close()
			// the reader must see the end before the next writer comes
			time.Sleep(200 * time.Millisecond)
		}
	}()
	return a.start(call{argv: append(slices.Clone(l.argv), p)})
}

// disguises change who seems to interpret.
func disguises() []technique {
	file := func(id string, group int, code, title string, argv ...string) technique {
		return technique{ID: id, Group: group, As: asBoth, Title: title, Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("s.txt", a.code(code))
			if err != nil {
				return err
			}
			c := call{dir: a.Dir}
			for _, s := range argv {
				c.argv = append(c.argv, strings.ReplaceAll(s, "FILE", p))
			}
			return a.start(c)
		}}
	}
	return []technique{
		file("ldso-python", 25, "python", "ld.so runs Python, which runs FILE", loader, "/usr/bin/python3", "FILE"),
		file("ldso-perl", 25, "perl", "ld.so runs Perl, which runs FILE", loader, "/usr/bin/perl", "FILE"),
		file("ldso-sh", 26, "sh", "ld.so runs sh, which runs FILE", loader, "/bin/sh", "FILE"),
		{ID: "ldso-inline-sh", Group: 27, As: asBoth, Title: "ld.so runs sh -c", Stop: byArgument, Run: func(a *attempt) error {
			return a.run(loader, "/bin/sh", "-c", a.code("sh"))
		}},
		{ID: "copy-python", Group: 25, As: asBoth, Title: "a copy of Python by another name", Stop: byRead, Run: copied("/usr/bin/python3", "python")},
		{ID: "copy-perl", Group: 25, As: asBoth, Title: "a copy of Perl by another name", Stop: byRead, Run: copied("/usr/bin/perl", "perl")},
		{ID: "copy-sh", Group: 26, As: asBoth, Title: "a copy of sh by another name", Stop: byRead, Run: copied("/bin/sh", "sh")},
		{ID: "link-busybox", Group: 27, As: asBoth, Title: "busybox as sh by its name", Stop: byArgument, Run: func(a *attempt) error {
			path, err := exec.LookPath("busybox")
			if err != nil {
				return unavailable("%v", err)
			}
			if err := os.Symlink(path, a.path("sh")); err != nil {
				return err
			}
			return a.run(a.path("sh"), "-c", a.code("sh"))
		}},
		{ID: "python-library", Group: 25, As: asBoth, Title: "libpython in a program that is no interpreter", Stop: byRead, Run: func(a *attempt) error {
			libs, err := filepath.Glob("/usr/lib/x86_64-linux-gnu/libpython3.*.so.1.0")
			if err != nil || len(libs) == 0 {
				return unavailable("no libpython")
			}
			p, err := a.write("s.py", a.code("python"))
			if err != nil {
				return err
			}
			return a.tool("libpython", libs[0], p)
		}},
		file("gdb-script", 25, "python", "gdb runs a Python file", "gdb", "-nx", "-batch", "-ex", "python exec(open('FILE').read())"),
		{ID: "gdb-source", Group: 25, As: asBoth, Title: "gdb runs a command file", Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("s.gdb", "shell "+a.code("sh"))
			if err != nil {
				return err
			}
			return a.run("gdb", "-nx", "-batch", "-x", p)
		}},
		{ID: "dot-fifo", Group: 26, As: asBoth, Title: "authorised shell script reads a named pipe (.)", Stop: byRead, Run: func(a *attempt) error {
			return runFifo(a, language{code: "sh", argv: []string{"sh", a.listed("dot.sh")}})
		}},
		{ID: "dot-memfd", Group: 28, As: asBoth, Title: "authorised shell script reads a memfd (.)", Stop: byRead, Run: func(a *attempt) error {
			fd, err := memfdOf([]byte(a.code("sh")), 0)
			if err != nil {
				return err
			}
			return a.run("sh", a.listed("dot.sh"), fmt.Sprintf("/proc/self/fd/%d", fd))
		}},
		{ID: "python-pycache", Group: 25, As: asBoth, Title: "compiled module put into PYTHONPYCACHEPREFIX", Stop: byRead, Run: pythonCache},
		{ID: "search-bash", Group: 26, As: asBoth, Title: "bash finds its script in PATH", Stop: byRead, Run: searched("bash", "sh")},
		{ID: "search-perl", Group: 25, As: asBoth, Title: "perl -S finds its script in PATH", Stop: byRead, Run: searched("perl", "perl", "-S")},
	}
}

func copied(interpreter, code string) func(*attempt) error {
	return func(a *attempt) error {
		if err := copyFile(interpreter, a.path("innocent")); err != nil {
			return unavailable("%v", err)
		}
		p, err := a.write("s.txt", a.code(code))
		if err != nil {
			return err
		}
		return a.run(a.path("innocent"), p)
	}
}

func searched(interpreter, code string, flags ...string) func(*attempt) error {
	return func(a *attempt) error {
		if _, err := a.write("bin/notes", a.code(code)); err != nil {
			return err
		}
		argv := append(append([]string{interpreter}, flags...), "notes")
		return a.start(call{argv: argv, dir: a.Dir, env: []string{"PATH=" + a.path("bin") + ":/usr/bin:/bin"}})
	}
}

// pythonCache compiles the payload as a standard module's cached code, whose source Python then does not look at.
func pythonCache(a *attempt) error {
	sources, err := filepath.Glob("/usr/lib/python3.*/colorsys.py")
	if err != nil || len(sources) == 0 {
		return unavailable("no standard library")
	}
	version := strings.ReplaceAll(strings.TrimPrefix(filepath.Base(filepath.Dir(sources[0])), "python"), ".", "")
	to := filepath.Join(a.path("cache"), filepath.Dir(sources[0]), "colorsys.cpython-"+version+".pyc")
	src, err := a.write("colorsys.py", a.code("python"))
	if err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), a.run("/usr/bin/python3", a.listed("compile.py"), src, to), os.Remove(src)); err != nil {
		return err
	}
	return a.start(call{argv: []string{"/usr/bin/python3", a.listed("noop.py")}, env: []string{"PYTHONPYCACHEPREFIX=" + a.path("cache")}})
}

// spellings write inline code in ways that a scan of the arguments may misread.
func spellings() []technique {
	many := strings.Repeat("e", 20)
	arg := func(id, code, title string, argv ...string) technique {
		return technique{ID: id, Group: 27, As: asBoth, Title: title, Stop: byArgument, Run: func(a *attempt) error {
			c := call{}
			for _, s := range argv {
				s = strings.ReplaceAll(s, "CODE", strings.TrimSpace(a.code(code)))
				c.argv = append(c.argv, strings.ReplaceAll(s, "KIT", a.Kit))
			}
			return a.start(c)
		}}
	}
	repeat := func(s string, n int) []string { return slices.Repeat([]string{s}, n) }
	return []technique{
		arg("inline-sh-many-letters", "sh", "sh with twenty option letters before the c", "sh", "-"+many+"c", "CODE"),
		arg("inline-bash-many-letters", "sh", "bash with twenty option letters before the c", "bash", "-"+many+"c", "CODE"),
		arg("inline-python-many-letters", "python", "python3 with twenty option letters before the c", "python3", "-"+strings.Repeat("B", 20)+"c", "CODE"),
		arg("inline-perl-many-letters", "perl", "perl with twenty option letters before the e", "perl", "-"+strings.Repeat("w", 20)+"e", "CODE"),
		arg("inline-sh-option-c", "sh", "sh -oc: the option's value comes in between", "sh", "-oc", "errexit", "CODE"),
		arg("inline-bash-option-c", "sh", "bash -oc", "bash", "-oc", "errexit", "CODE"),
		arg("inline-bash-shopt-c", "sh", "bash -Oc", "bash", "-Oc", "extglob", "CODE"),
		arg("inline-sh-plus", "sh", "sh +e -c", "sh", "+e", "-c", "CODE"),
		arg("inline-sh-after", "sh", "sh -c -e: options after the c", "sh", "-c", "-e", "CODE"),
		arg("inline-sh-dashes", "sh", "sh -c -- CODE", "sh", "-c", "--", "CODE"),
		arg("inline-sh-many-arguments", "sh", "sh with thirty options before the c", append(append([]string{"sh"}, repeat("-e", 30)...), "-c", "CODE")...),
		arg("inline-python-warning", "python", "python3 -W VALUE -c", "python3", "-W", "ignore", "-c", "CODE"),
		arg("inline-python-long", "python", "python3 --check-hash-based-pycs VALUE -c", "python3", "--check-hash-based-pycs", "always", "-c", "CODE"),
		arg("inline-python-x", "python", "python3 -X VALUE -c", "python3", "-X", "utf8", "-c", "CODE"),
		arg("inline-perl-zero", "perl", "perl -0777e", "perl", "-0777e", "CODE"),
		arg("inline-perl-upper", "perl", "perl -E", "perl", "-E", "CODE"),
		arg("inline-perl-loop", "perl", "perl -ne", "perl", "-ne", "CODE", "/etc/hostname"),
		arg("inline-perl-debugger", "perl", "perl -d:Module=code", "perl", "-d:SelfStubber;CODE", "KIT/authorised/noop.pl"),
		arg("inline-node-long", "node", "node --eval=", "node", "--eval=CODE"),
		arg("inline-node-pe", "node", "node -pe", "node", "-pe", "CODE"),
		arg("inline-node-late", "node", "node with an option before -e", "node", "--no-warnings", "-e", "CODE"),
		arg("inline-gawk-short", "awk", "gawk --sou", "gawk", "--sou", "CODE"),
		arg("inline-gawk-variable", "awk", "gawk -v VALUE PROGRAM", "gawk", "-v", "x=1", "CODE"),
		arg("inline-make-short", "sh", "make --ev", "make", "--ev=attack: ; @CODE", "-f", "KIT/authorised/noop.mk", "attack"),
		arg("inline-make-override", "sh", "SHELL variable of an authorised makefile", "make", "-f", "KIT/authorised/runs.mk", "SHELL=/bin/sh", ".SHELLFLAGS=-c 'CODE'"),
		arg("inline-sed-long", "sh", "sed --expr", "sed", "-n", "--expr=1e CODE", "/etc/hostname"),
		arg("inline-gdb", "sh", "gdb -ex shell", "gdb", "-nx", "-batch", "-ex", "shell CODE"),
		arg("inline-gdb-python", "python", "gdb -ex python", "gdb", "-nx", "-batch", "-ex", "python CODE"),
		arg("inline-busybox-find", "sh", "busybox find -exec sh -c", "busybox", "find", "/etc/hostname", "-exec", "sh", "-c", "CODE", ";"),
		{ID: "inline-bash-env", Group: 27, As: asBoth, Title: "BASH_ENV with a command substitution", Stop: byArgument, Run: func(a *attempt) error {
			return a.start(call{argv: []string{"bash", a.listed("noop.sh")}, env: []string{"BASH_ENV=$(" + strings.TrimSpace(a.code("sh")) + ")"}})
		}},
		{ID: "inline-no-arguments", Group: 27, As: asBoth, Title: "sh without argv[0] as a login shell reads its profile", Stop: byArgument, Run: func(a *attempt) error {
			if _, err := a.write(".profile", a.code("sh")); err != nil {
				return err
			}
			cmd := exec.Command("/bin/sh")
			cmd.Args, cmd.Env, cmd.Dir = []string{"-"}, a.environment(), a.Dir
			return cmd.Run()
		}},
	}
}
