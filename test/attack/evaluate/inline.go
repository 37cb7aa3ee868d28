package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// onStdin gives code to an interpreter's standard input.
type onStdin func(a *attempt, code string, argv []string) error

// shells are techniques that put code on standard input: groups 26, 27 and 46.
func shells() []technique {
	var out []technique
	for _, l := range []language{
		{"sh", "sh", "", []string{"sh"}},
		{"bash", "sh", "", []string{"bash"}},
		{"busybox-sh", "sh", "", []string{"busybox", "sh"}},
		{"python", "python", "", []string{"python3"}},
		{"perl", "perl", "", []string{"perl"}},
		{"lua", "lua", "", []string{"lua5.4", "-"}},
		{"node", "node", "", []string{"node"}},
	} {
		add := func(id string, group int, title string, feed onStdin) {
			out = append(out, technique{ID: id + l.name, Group: group, As: asBoth, Title: title, Stop: byStdin, Run: func(a *attempt) error {
				return feed(a, a.code(l.code), l.argv)
			}})
		}
		add("stdin-file-", 26, l.name+" < FILE", stdinFile)
		add("stdin-pipe-", 27, "cat FILE | "+l.name, stdinPipe)
	}
	sh := func(id string, group int, title string, argv []string, feed onStdin) technique {
		return technique{ID: id, Group: group, As: asBoth, Title: title, Stop: byStdin, Run: func(a *attempt) error {
			return feed(a, a.code("sh"), argv)
		}}
	}
	return append(out,
		sh("stdin-socket-sh", 27, "sh reads a socket", []string{"sh"}, stdinSocket),
		sh("stdin-terminal-sh", 27, "commands typed on a terminal", []string{"sh"}, stdinTerminal),
		sh("stdin-memfd-sh", 28, "sh < memfd", []string{"sh"}, stdinMemfd),
		sh("stdin-dash-s", 27, "sh -s with arguments", []string{"sh", "-s", "x"}, stdinPipe),
		sh("stdin-dev", 26, "sh /dev/stdin", []string{"sh", "/dev/stdin"}, stdinFile),
		sh("stdin-dev-fd", 27, "sh /dev/fd/0 from a pipe", []string{"sh", "/dev/fd/0"}, stdinPipe),
		technique{ID: "uring-stdin", Group: 46, As: asBoth, Title: "script opened by io_uring on a shell's standard input", Stop: byStdin, Run: func(a *attempt) error {
			p, err := a.write("s.sh", a.code("sh"))
			if err != nil {
				return err
			}
			return a.tool("uring-stdin", p, "/bin/sh")
		}},
	)
}

func stdinFile(a *attempt, code string, argv []string) error {
	p, err := a.write("s", code)
	if err != nil {
		return err
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	return a.start(call{argv: argv, stdin: f})
}

// stdinPipe: os/exec makes a pipe for a reader that is no file.
func stdinPipe(a *attempt, code string, argv []string) error {
	return a.start(call{argv: argv, stdin: strings.NewReader(code)})
}

func stdinMemfd(a *attempt, code string, argv []string) error {
	fd, err := memfdOf([]byte(code), unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return a.start(call{argv: argv, stdin: f})
}

func stdinSocket(a *attempt, code string, argv []string) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if _, err := unix.Write(pair[0], []byte(code)); err != nil {
		return err
	}
	unix.Close(pair[0])
	f := os.NewFile(uintptr(pair[1]), "socket")
	defer f.Close()
	return a.start(call{argv: argv, stdin: f})
}

func stdinTerminal(a *attempt, code string, argv []string) error {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return unavailable("%v", err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		return err
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		return err
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer slave.Close()
	go func() {
		time.Sleep(200 * time.Millisecond)
		_, _ = io.WriteString(master, code+"exit\n\x04")
	}()
	return a.start(call{argv: argv, stdin: slave})
}

// inline are techniques that put code into arguments or the environment: group 27.
func inline() []technique {
	arg := func(id, code, title string, argv ...string) technique {
		return technique{ID: id, Group: 27, As: asBoth, Title: title, Stop: byArgument, Run: func(a *attempt) error {
			c := call{dir: a.Dir}
			for _, s := range argv {
				s = strings.ReplaceAll(s, "CODE", strings.TrimSpace(a.code(code)))
				c.argv = append(c.argv, strings.ReplaceAll(s, "KIT", a.Kit))
			}
			return a.start(c)
		}}
	}
	env := func(id, code, title, variable, value string, argv ...string) technique {
		return technique{ID: id, Group: 27, As: asBoth, Title: title, Stop: byArgument, Run: func(a *attempt) error {
			c := call{env: []string{variable + "=" + strings.ReplaceAll(value, "CODE", strings.TrimSpace(a.code(code)))}}
			for _, s := range argv {
				c.argv = append(c.argv, strings.ReplaceAll(s, "KIT", a.Kit))
			}
			return a.start(c)
		}}
	}
	return []technique{
		arg("inline-sh", "sh", "sh -c", "sh", "-c", "CODE"),
		arg("inline-sh-joined", "sh", "sh -ec", "sh", "-ec", "CODE"),
		arg("inline-bash", "sh", "bash -c", "bash", "-c", "CODE"),
		arg("inline-bash-late", "sh", "bash -O extglob -c", "bash", "-O", "extglob", "-c", "CODE"),
		arg("inline-busybox-sh", "sh", "busybox sh -c", "busybox", "sh", "-c", "CODE"),
		arg("inline-python", "python", "python3 -c", "python3", "-c", "CODE"),
		arg("inline-python-joined", "python", "python3 -Ic'...'", "python3", "-IcCODE"),
		arg("inline-python-timeit", "python", "python3 -m timeit", "python3", "-m", "timeit", "-n1", "-r1", "CODE"),
		arg("inline-perl", "perl", "perl -e", "perl", "-e", "CODE"),
		arg("inline-perl-module", "perl", "perl -M with code in it", "perl", "-Mconstant;CODE", "KIT/authorised/noop.pl"),
		arg("inline-lua", "lua", "lua -e", "lua5.4", "-e", "CODE"),
		arg("inline-node", "node", "node -e", "node", "-e", "CODE"),
		arg("inline-node-print", "node", "node -p", "node", "-p", "CODE"),
		arg("inline-node-import", "node", "node --import data:", "node", "--import", "data:text/javascript,import{createRequire}from'module';const require=createRequire('/');CODE", "KIT/authorised/noop.js"),
		arg("inline-mawk", "awk", "mawk PROGRAM", "mawk", "CODE"),
		arg("inline-gawk", "awk", "gawk PROGRAM", "gawk", "CODE"),
		arg("inline-gawk-source", "awk", "gawk -e", "gawk", "-e", "CODE"),
		arg("inline-busybox-awk", "awk", "busybox awk PROGRAM", "busybox", "awk", "CODE"),
		{ID: "inline-awk-system", Group: 27, As: asBoth, Title: "awk system()", Stop: byArgument, Run: func(a *attempt) error {
			return a.run("awk", fmt.Sprintf(`BEGIN{system("%s")}`, strings.TrimSpace(a.code("sh"))))
		}},
		arg("inline-sed", "sh", "sed 1e", "sed", "-n", "1e CODE", "/etc/hostname"),
		arg("inline-make-eval", "sh", "make --eval", "make", "--eval=attack: ; @CODE", "-f", "KIT/authorised/noop.mk", "attack"),
		arg("inline-make-variable", "sh", "command variable of an authorised makefile", "make", "-f", "KIT/authorised/shell.mk", "COMMAND=CODE"),
		arg("inline-find", "sh", "find -exec sh -c", "find", "/etc/hostname", "-exec", "sh", "-c", "CODE", ";"),
		arg("inline-xargs", "sh", "xargs sh -c", "xargs", "-a", "/etc/hostname", "sh", "-c", "CODE"),
		arg("inline-env-split", "sh", "env -S", "env", "-S", "sh -c 'CODE'"),
		arg("inline-tar", "sh", "tar --checkpoint-action=exec", "tar", "-cf", "/dev/null", "--checkpoint=1", "--checkpoint-action=exec=CODE", "/etc/hostname"),
		arg("inline-tar-filter", "sh", "tar -I with a command", "tar", "-cf", "/dev/stdout", "-I", "sh -c 'CODE; cat'", "/etc/hostname"),
		arg("inline-script", "sh", "script -c", "script", "-qc", "CODE", "/dev/null"),
		arg("inline-flock", "sh", "flock -c", "flock", "/tmp", "-c", "CODE"),
		arg("inline-split", "sh", "split --filter", "split", "--filter=CODE", "/etc/hostname"),
		arg("inline-watch", "sh", "watch", "watch", "-g", "-n1", "CODE; date +%N"),
		arg("inline-git-alias", "sh", "git alias", "git", "-c", "alias.x=!CODE;:", "x"),
		arg("inline-ssh-proxy", "sh", "ssh ProxyCommand", "ssh", "-o", "ProxyCommand=sh -c 'CODE'", "-o", "BatchMode=yes", "nobody@localhost"),
		arg("inline-vim", "sh", "vim -c", "vi", "-e", "-s", "-u", "NONE", "-c", "silent !CODE", "-c", "qa!"),
		env("inline-perl5db", "perl", "PERL5DB", "PERL5DB", "BEGIN{CODE}sub DB::DB{}", "perl", "-d", "KIT/authorised/noop.pl"),
		env("inline-perl5opt", "perl", "PERL5OPT with code in it", "PERL5OPT", "-Mconstant;CODE", "perl", "KIT/authorised/noop.pl"),
		env("inline-lua-init", "lua", "LUA_INIT with code in it", "LUA_INIT", "CODE", "lua5.4", "KIT/authorised/noop.lua"),
		env("inline-node-options", "node", "NODE_OPTIONS=--import data:", "NODE_OPTIONS", "--import=data:text/javascript,import{createRequire}from'module';const/**/require=createRequire('/');CODE", "node", "KIT/authorised/noop.js"),
		{ID: "inline-makeflags", Group: 27, As: asBoth, Title: "function call in MAKEFLAGS", Stop: byArgument, Run: func(a *attempt) error {
			flag := fmt.Sprintf("$(file >%s,%s)", a.Marker, a.Token)
			return a.start(call{argv: []string{"make", "-f", a.listed("noop.mk")}, env: []string{"MAKEFLAGS=" + flag}})
		}},
		env("inline-bash-function", "sh", "function exported to an authorised bash script", "BASH_FUNC_attack_me%%", "() { CODE; }", "bash", "KIT/authorised/function.sh"),
		env("inline-prompt", "sh", "PROMPT_COMMAND of an interactive bash", "PROMPT_COMMAND", "CODE", "bash", "--norc", "-i"),
		env("inline-ps4", "sh", "PS4 of a traced bash", "PS4", "$(CODE)", "bash", "-x", "KIT/authorised/noop.sh"),
		env("inline-git-ssh", "sh", "GIT_SSH_COMMAND", "GIT_SSH_COMMAND", "CODE;:", "git", "ls-remote", "ssh://localhost/x"),
	}
}

// spawners are authorised programs that start what they are told: group 30.
func spawners() []technique {
	with := func(id, title string, argv ...string) technique {
		return technique{ID: id, Group: 30, As: asBoth, Title: title, Stop: byExec, Run: func(a *attempt) error {
			p, err := a.program("p")
			if err != nil {
				return err
			}
			c := call{dir: a.Dir}
			for _, s := range argv {
				c.argv = append(c.argv, strings.ReplaceAll(strings.ReplaceAll(s, "PROGRAM", p), "DIR", a.Dir))
			}
			return a.start(c)
		}}
	}
	return []technique{
		with("spawn-find", "find -exec", "find", "/etc/hostname", "-exec", "PROGRAM", ";"),
		with("spawn-xargs", "xargs", "xargs", "-a", "/etc/hostname", "PROGRAM"),
		with("spawn-env", "env", "env", "PROGRAM"),
		with("spawn-busybox-env", "busybox env", "busybox", "env", "PROGRAM"),
		with("spawn-timeout", "timeout", "timeout", "5", "PROGRAM"),
		with("spawn-setsid", "setsid", "setsid", "-w", "PROGRAM"),
		with("spawn-start-stop-daemon", "start-stop-daemon", "start-stop-daemon", "--start", "--pidfile", "DIR/pid", "--exec", "PROGRAM"),
		with("spawn-tar", "tar -I PROGRAM", "tar", "-cf", "DIR/x.tar", "-I", "PROGRAM", "/etc/hostname"),
		with("spawn-sort", "sort --compress-program", "sort", "-S", "1K", "--compress-program=PROGRAM", "-T", "DIR", "/usr/share/common-licenses/GPL-3"),
		with("spawn-gcc-wrapper", "gcc -wrapper", "gcc", "-wrapper", "PROGRAM", "-c", "-x", "c", "-o", "DIR/x.o", "/dev/null"),
		with("spawn-gcc-prefix", "gcc -B finds an unlisted assembler", "gcc", "-wrapper", "PROGRAM,x", "-c", "-x", "assembler", "-o", "DIR/x.o", "/dev/null"),
		{ID: "spawn-run-parts", Group: 30, As: asBoth, Title: "run-parts", Stop: byExec, Run: func(a *attempt) error {
			if err := os.Mkdir(a.path("parts"), 0o755); err != nil {
				return err
			}
			if _, err := a.program("parts/p"); err != nil {
				return err
			}
			return a.run("run-parts", a.path("parts"))
		}},
	}
}

// buildTools are techniques that make a new program on the host: group 47. By
// default a policy stops them, too; a build host authorises them deliberately.
func buildTools() []technique {
	source := func(a *attempt, lib bool) (string, error) {
		body := "int main(void)"
		if lib {
			body = "__attribute__((constructor)) static void f(void)"
		}
		return a.write("x.c", fmt.Sprintf("#include <stdio.h>\n%s{FILE*f=fopen(%q,\"w\");fputs(%q,f);fclose(f);}\n", body, a.Marker, a.Token))
	}
	return []technique{
		{ID: "compile-run", Group: 47, As: asBoth, Title: "compiled on the host and started", Stop: byExec, Limit: 60, Run: func(a *attempt) error {
			src, err := source(a, false)
			if err != nil {
				return err
			}
			if err := a.run("gcc", "-o", a.path("x"), src); err != nil {
				return err
			}
			return a.run(a.path("x"))
		}},
		{ID: "compile-load", Group: 47, As: asBoth, Title: "library compiled on the host and loaded", Stop: byMap, Limit: 60, Run: func(a *attempt) error {
			src, err := source(a, true)
			if err != nil {
				return err
			}
			if err := a.run("gcc", "-shared", "-fPIC", "-o", a.path("x.so"), src); err != nil {
				return err
			}
			return a.tool("dlopen", a.path("x.so"))
		}},
	}
}
