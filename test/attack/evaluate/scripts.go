package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// scripts are techniques that execute a script as a program: groups 12 and 13.
func scripts() []technique {
	direct := func(id, language, line, title string) technique {
		return technique{ID: id, Group: 12, As: asBoth, Title: title, Stop: byScript, Run: func(a *attempt) error {
			p, err := a.write("s", line+"\n"+a.code(language))
			if err != nil {
				return err
			}
			return a.run(p)
		}}
	}
	return []technique{
		direct("shebang-sh", "sh", "#!/bin/sh", "shell script"),
		direct("shebang-bash", "sh", "#!/bin/bash", "bash script"),
		direct("shebang-python", "python", "#!/usr/bin/python3", "Python script"),
		direct("shebang-perl", "perl", "#!/usr/bin/perl", "Perl script"),
		direct("shebang-env", "python", "#!/usr/bin/env python3", "Python script by env"),
		direct("shebang-long", "sh", "#!/bin/sh"+strings.Repeat(" ", 180), "script with a long first line"),
		direct("shebang-awk", "awk", "#!/usr/bin/awk -f", "awk script"),
		{ID: "shebang-program", Group: 12, As: asBoth, Title: "script whose interpreter is unlisted", Stop: byScript, Run: func(a *attempt) error {
			p, err := a.program("p")
			if err != nil {
				return err
			}
			s, err := a.write("s", "#!"+p+"\n")
			if err != nil {
				return err
			}
			return a.run(s)
		}},
		{ID: "shebang-nested", Group: 12, As: asBoth, Title: "script whose interpreter is a script", Stop: byScript, Run: func(a *attempt) error {
			inner, err := a.write("i", "#!/bin/sh\n"+a.code("sh"))
			if err != nil {
				return err
			}
			s, err := a.write("s", "#!"+inner+"\n")
			if err != nil {
				return err
			}
			return a.run(s)
		}},
		{ID: "shebang-env-split", Group: 12, As: asBoth, Title: "env -S starts an unlisted program", Stop: byScript, Run: func(a *attempt) error {
			p, err := a.program("p")
			if err != nil {
				return err
			}
			s, err := a.write("s", "#!/usr/bin/env -S "+p+" x\n")
			if err != nil {
				return err
			}
			return a.run(s)
		}},
		{ID: "script-memfd", Group: 12, As: asBoth, Title: "script in a memfd, executed", Stop: byScript, Run: func(a *attempt) error {
			fd, err := memfdOf([]byte("#!/bin/sh\n"+a.code("sh")), 0)
			if err != nil {
				return err
			}
			return a.run(fmt.Sprintf("/proc/self/fd/%d", fd))
		}},
		{ID: "script-no-line", Group: 12, As: asBoth, Title: "script without a first line: execvp falls back to the shell", Stop: byScript, Run: func(a *attempt) error {
			s, err := a.write("s", a.code("sh"))
			if err != nil {
				return err
			}
			return a.run("/usr/bin/env", s)
		}},
		{ID: "binfmt-python", Group: 13, As: asRoot, Mounts: true, Title: "binfmt_misc gives a data file to an interpreter", Stop: byScript, Run: binfmt("/usr/bin/python3", "")},
		{ID: "binfmt-program", Group: 13, As: asRoot, Mounts: true, Title: "binfmt_misc with an unlisted interpreter, opened beforehand (F)", Stop: byExec, Run: binfmt("", "F")},
		{ID: "binfmt-userns", Group: 13, As: asUser, Userns: true, Title: "binfmt_misc in a user namespace", Stop: byScript, Run: binfmt("/usr/bin/python3", "")},
	}
}

// binfmt registers a file name's ending and executes such a file.
func binfmt(interpreter, flags string) func(*attempt) error {
	return func(a *attempt) error {
		m := a.path("b")
		if err := os.Mkdir(m, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("none", m, "binfmt_misc", 0, ""); err != nil {
			return unavailable("binfmt_misc: %v", err)
		}
		text := "pass # " + a.Token + "\n"
		if interpreter == "" {
			p, err := a.program("i")
			if err != nil {
				return err
			}
			interpreter = p
		} else {
			text = a.code("python")
		}
		name := "rw" + a.Token
		line := fmt.Sprintf(":%s:E::%s::%s:%s", name, name, interpreter, flags)
		if err := os.WriteFile(filepath.Join(m, "register"), []byte(line), 0); err != nil {
			return fmt.Errorf("register: %w", err)
		}
		defer os.WriteFile(filepath.Join(m, name), []byte("-1"), 0)
		p, err := a.write("data."+name, text)
		if err != nil {
			return err
		}
		return a.run(p)
	}
}
