package main

import (
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// language of a payload and how its interpreter takes a file.
type language struct {
	name, code, file string
	argv             []string // the file's name is added
}

func languages() []language {
	return []language{
		{"python", "python", "s.py", []string{"python3"}},
		{"perl", "perl", "s.pl", []string{"perl"}},
		{"lua", "lua", "s.lua", []string{"lua5.4"}},
		{"node", "node", "s.js", []string{"node"}},
		{"mawk", "awk", "s.awk", []string{"mawk", "-f"}},
		{"gawk", "awk", "s.awk", []string{"gawk", "-f"}},
		{"busybox-awk", "awk", "s.awk", []string{"busybox", "awk", "-f"}},
		{"make", "make", "s.mk", []string{"make", "-f"}},
		{"sh", "sh", "s.sh", []string{"sh"}},
		{"bash", "sh", "s.sh", []string{"bash"}},
		{"busybox-sh", "sh", "s.sh", []string{"busybox", "sh"}},
		{"busybox-ash", "sh", "s.sh", []string{"busybox", "ash"}},
	}
}

func shellLike(l language) bool { return l.code == "sh" }

// interpreters are techniques that give an unlisted file to an interpreter: groups 25, 26 and 28.
func interpreters() []technique {
	var out []technique
	for _, l := range languages() {
		group := 25
		if shellLike(l) {
			group = 26
		}
		run := func(a *attempt, file string) error {
			p, err := a.write(file, a.code(l.code))
			if err != nil {
				return err
			}
			return a.run(append(slices.Clone(l.argv), p)...)
		}
		out = append(out,
			technique{ID: "file-" + l.name, Group: group, As: asBoth, Title: l.name + " FILE", Stop: byRead, Run: func(a *attempt) error { return run(a, l.file) }},
			technique{ID: "data-" + l.name, Group: group, As: asBoth, Title: l.name + " runs a file called notes.txt", Stop: byRead, Run: func(a *attempt) error { return run(a, "notes.txt") }},
		)
		if l.name == "make" || l.name == "busybox-ash" || l.name == "busybox-awk" {
			continue
		}
		out = append(out, technique{
			ID: "memfd-" + l.name, Group: 28, As: asBoth, Title: l.name + " runs a memfd", Stop: byRead, Run: func(a *attempt) error {
				fd, err := memfdOf([]byte(a.code(l.code)), 0)
				if err != nil {
					return err
				}
				argv := slices.Clone(l.argv)
				if l.name == "node" {
					argv = append(argv, "--preserve-symlinks-main") // or it looks for the memfd's name
				}
				return a.run(append(argv, fmt.Sprintf("/proc/self/fd/%d", fd))...)
			},
		})
	}
	return append(out,
		technique{ID: "perl-x", Group: 25, As: asBoth, Title: "perl -x skips what looks like a picture", Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("p.png", "\x89PNG\r\n\x1a\nxx\n#!perl\n"+a.code("perl")+"__END__\n")
			if err != nil {
				return err
			}
			return a.run("perl", "-x", p)
		}},
		technique{ID: "python-zipapp", Group: 25, As: asBoth, Title: "Python runs a zip file", Stop: byRead, Run: pythonZip},
		technique{ID: "python-directory", Group: 25, As: asBoth, Title: "Python runs a directory", Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("app/__main__.py", a.code("python"))
			if err != nil {
				return err
			}
			return a.run("python3", filepath.Dir(p))
		}},
		technique{ID: "python-pyc", Group: 25, As: asBoth, Title: "Python runs compiled code", Stop: byRead, Run: pythonCompiled},
		technique{ID: "python-cwd-module", Group: 25, As: asBoth, Title: "python3 -m finds a module in the working directory", Stop: byRead, Run: func(a *attempt) error {
			if _, err := a.write("attackmodule.py", a.code("python")); err != nil {
				return err
			}
			return a.start(call{argv: []string{"python3", "-m", "attackmodule"}, dir: a.Dir})
		}},
		technique{ID: "awk-include", Group: 25, As: asBoth, Title: "gawk -i includes a file", Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("s.txt", a.code("awk"))
			if err != nil {
				return err
			}
			return a.run("gawk", "-i", p, "-f", a.listed("noop.awk"))
		}},
		technique{ID: "sed-file", Group: 25, As: asBoth, Title: "sed -f with the e command", Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("s.sed", "1e "+a.code("sh"))
			if err != nil {
				return err
			}
			return a.run("sed", "-n", "-f", p, "/etc/hostname")
		}},
		technique{ID: "node-module", Group: 25, As: asBoth, Title: "node runs an ECMAScript module", Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("s.mjs", fmt.Sprintf("import fs from 'fs'; fs.writeFileSync('%s','%s')\n", a.Marker, a.Token))
			if err != nil {
				return err
			}
			return a.run("node", p)
		}},
		technique{ID: "perl-require-path", Group: 25, As: asBoth, Title: "perl -I -M loads a module", Stop: byRead, Run: func(a *attempt) error {
			if _, err := a.write("Attack.pm", "package Attack;"+a.code("perl")); err != nil {
				return err
			}
			return a.run("perl", "-I", a.Dir, "-MAttack", a.listed("noop.pl"))
		}},
		technique{ID: "vim-script", Group: 25, As: asBoth, Title: "vim runs a script", Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write("s.vim", "silent !"+a.code("sh")+"qa!\n")
			if err != nil {
				return err
			}
			return a.run("vi", "-e", "-s", "-u", "NONE", "-S", p)
		}},
	)
}

func pythonZip(a *attempt) error {
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	w, err := z.Create("__main__.py")
	if err != nil {
		return err
	}
	if _, err := w.Write([]byte(a.code("python"))); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	p, err := a.write("archive.zip", b.String())
	if err != nil {
		return err
	}
	return a.run("python3", p)
}

// pythonCompiled has the host's Python compile the payload: the format changes with every release.
func pythonCompiled(a *attempt) error {
	src, err := a.write("s.py", a.code("python"))
	if err != nil {
		return err
	}
	if err := a.run("python3", a.listed("compile.py"), src, a.path("s.pyc")); err != nil {
		return err
	}
	return errors.Join(os.Remove(src), a.run("python3", a.path("s.pyc")))
}

// environments are techniques that make an authorised script load an unlisted one: groups 25 and 26.
func environments() []technique {
	type file struct{ name, code string }
	load := func(id string, group int, title string, f file, argv []string, env ...string) technique {
		return technique{ID: id, Group: group, As: asBoth, Title: title, Stop: byRead, Run: func(a *attempt) error {
			p, err := a.write(f.name, a.code(f.code))
			if err != nil {
				return err
			}
			expand := func(s string) string {
				return os.Expand(s, func(k string) string {
					return map[string]string{"DIR": a.Dir, "FILE": p, "LISTED": filepath.Join(a.Kit, "authorised"), "SUB": filepath.Dir(p)}[k]
				})
			}
			c := call{dir: a.Dir}
			for _, s := range argv {
				c.argv = append(c.argv, expand(s))
			}
			for _, s := range env {
				c.env = append(c.env, expand(s))
			}
			return a.start(c)
		}}
	}
	return []technique{
		load("pythonpath-site", 25, "PYTHONPATH with sitecustomize", file{"sitecustomize.py", "python"}, []string{"python3", "${LISTED}/noop.py"}, "PYTHONPATH=${DIR}"),
		load("pythonpath-shadow", 25, "PYTHONPATH with a module of a standard name", file{"colorsys.py", "python"}, []string{"python3", "${LISTED}/noop.py"}, "PYTHONPATH=${DIR}"),
		load("python-user-site", 25, "usercustomize in the user's site directory", file{".local/lib/python3.11/site-packages/usercustomize.py", "python"}, []string{"python3", "${LISTED}/noop.py"}),
		load("python-startup", 25, "PYTHONSTARTUP", file{"s.py", "python"}, []string{"python3", "-i"}, "PYTHONSTARTUP=${FILE}"),
		{ID: "python-pth", Group: 25, As: asBoth, Title: ".pth file in the user's site directory", Stop: byRead, Run: func(a *attempt) error {
			if _, err := a.write(".local/lib/python3.11/site-packages/x.pth", "import sys;"+a.code("python")); err != nil {
				return err
			}
			return a.run("python3", a.listed("noop.py"))
		}},
		{ID: "python-home", Group: 25, As: asBoth, Title: "PYTHONHOME with another standard library", Stop: byRead, Run: pythonHome},
		{ID: "python-site-packages", Group: 25, As: asRoot, Mounts: true, Title: ".pth file in /usr/local/lib", Stop: byRead, Run: func(a *attempt) error {
			if err := mount("none", "/usr/local/lib", "tmpfs", 0, ""); err != nil {
				return err
			}
			const dir = "/usr/local/lib/python3.11/dist-packages"
			return errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(dir+"/x.pth", []byte("import sys;"+a.code("python")), 0o644),
				a.run("python3", a.listed("noop.py")))
		}},
		load("perl5lib", 25, "PERL5LIB with a module of a standard name", file{"constant.pm", "perl"}, []string{"perl", "${LISTED}/noop.pl"}, "PERL5LIB=${DIR}"),
		load("perl5opt", 25, "PERL5OPT=-M", file{"Attack.pm", "perl"}, []string{"perl", "${LISTED}/noop.pl"}, "PERL5LIB=${DIR}", "PERL5OPT=-MAttack"),
		load("perl-debugger", 25, "perl -d reads .perldb", file{".perldb", "perl"}, []string{"perl", "-d", "${LISTED}/noop.pl"}),
		load("lua-init-file", 25, "LUA_INIT=@FILE", file{"s.lua", "lua"}, []string{"lua5.4", "${LISTED}/noop.lua"}, "LUA_INIT=@${FILE}"),
		load("lua-path", 25, "LUA_PATH", file{"attackmodule.lua", "lua"}, []string{"lua5.4", "${LISTED}/require.lua"}, "LUA_PATH=${DIR}/?.lua"),
		load("node-require", 25, "NODE_OPTIONS=--require", file{"s.js", "node"}, []string{"node", "${LISTED}/noop.js"}, "NODE_OPTIONS=--require=${FILE}"),
		load("node-path", 25, "NODE_PATH", file{"attackmodule.js", "node"}, []string{"node", "${LISTED}/require.js"}, "NODE_PATH=${DIR}"),
		load("gawk-path", 25, "AWKPATH", file{"attackmodule.awk", "awk"}, []string{"gawk", "-i", "attackmodule", "-f", "${LISTED}/noop.awk"}, "AWKPATH=${DIR}"),
		load("make-files", 25, "MAKEFILES", file{"s.mk", "make"}, []string{"make", "-f", "${LISTED}/noop.mk"}, "MAKEFILES=${FILE}"),
		load("eval-python", 25, "authorised Python script executes a file", file{"config.txt", "python"}, []string{"python3", "${LISTED}/evalfile.py", "${FILE}"}),
		load("eval-perl", 25, "authorised Perl script executes a file (do)", file{"config.txt", "perl"}, []string{"perl", "${LISTED}/evalfile.pl", "${FILE}"}),
		load("eval-lua", 25, "authorised Lua script executes a file (dofile)", file{"config.txt", "lua"}, []string{"lua5.4", "${LISTED}/evalfile.lua", "${FILE}"}),
		load("eval-node", 25, "authorised node script executes a file", file{"config.txt", "node"}, []string{"node", "${LISTED}/evalfile.js", "${FILE}"}),
		load("dot-sh", 26, "authorised shell script reads a file (.)", file{"s.txt", "sh"}, []string{"sh", "${LISTED}/dot.sh", "${FILE}"}),
		load("dot-bash", 26, "authorised bash script reads a file (source)", file{"s.txt", "sh"}, []string{"bash", "${LISTED}/dot.sh", "${FILE}"}),
		load("eval-sh", 26, "authorised shell script evaluates what it reads", file{"s.txt", "sh"}, []string{"sh", "${LISTED}/evalfile.sh", "${FILE}"}),
		load("bash-env", 26, "BASH_ENV", file{"s.txt", "sh"}, []string{"bash", "${LISTED}/noop.sh"}, "BASH_ENV=${FILE}"),
		load("sh-env", 26, "ENV of an interactive shell", file{"s.txt", "sh"}, []string{"sh", "-i"}, "ENV=${FILE}"),
		load("bash-rcfile", 26, "bash --rcfile", file{"s.txt", "sh"}, []string{"bash", "--rcfile", "${FILE}", "-i"}),
		load("bash-profile", 26, "profile of a login shell", file{".bash_profile", "sh"}, []string{"bash", "-l"}),
		load("sh-profile", 26, "profile of a login sh", file{".profile", "sh"}, []string{"sh", "-l"}),
	}
}

// pythonHome is a standard library of links to the real one, with one module of our own.
func pythonHome(a *attempt) error {
	real, err := filepath.Glob("/usr/lib/python3.*")
	if err != nil || len(real) == 0 {
		return unavailable("no /usr/lib/python3.*")
	}
	lib := a.path("lib/" + filepath.Base(real[0]))
	if err := os.MkdirAll(lib, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(real[0])
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "colorsys.py" || e.Name() == "__pycache__" {
			continue
		}
		if err := os.Symlink(filepath.Join(real[0], e.Name()), filepath.Join(lib, e.Name())); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(lib, "colorsys.py"), []byte(a.code("python")), 0o644); err != nil {
		return err
	}
	return a.start(call{argv: []string{"/usr/bin/python3", a.listed("noop.py")}, env: []string{"PYTHONHOME=" + a.Dir}})
}
