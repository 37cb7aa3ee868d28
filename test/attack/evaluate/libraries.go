package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// libraries are techniques that get an unlisted library into an authorised program: groups 14 and 15.
func libraries() []technique {
	with := func(id string, group int, title string, run func(a *attempt, lib string) error) technique {
		return technique{ID: id, Group: group, As: asBoth, Title: title, Stop: byMap, Run: withLibrary(run)}
	}
	return []technique{
		with("ld-preload", 14, "LD_PRELOAD", func(a *attempt, lib string) error {
			return a.start(call{argv: []string{"/bin/true"}, env: []string{"LD_PRELOAD=" + lib}})
		}),
		with("ld-audit", 14, "LD_AUDIT", func(a *attempt, lib string) error {
			return a.start(call{argv: []string{"/bin/true"}, env: []string{"LD_AUDIT=" + lib}})
		}),
		with("ld-library-path", 14, "LD_LIBRARY_PATH", func(a *attempt, lib string) error {
			// the copy has no library beside it that would be found first
			if err := errors.Join(os.Mkdir(a.path("lib"), 0o755), os.Rename(lib, a.path("lib/librwdemo.so")), copyFile(a.inKit("victim"), a.path("victim"))); err != nil {
				return err
			}
			return a.start(call{argv: []string{a.path("victim")}, env: []string{"LD_LIBRARY_PATH=" + a.path("lib")}})
		}),
		with("ld-runpath", 14, "library beside a copy of an authorised program ($ORIGIN)", func(a *attempt, lib string) error {
			if err := errors.Join(os.Rename(lib, a.path("librwdemo.so")), copyFile(a.inKit("victim"), a.path("victim"))); err != nil {
				return err
			}
			return a.run(a.path("victim"))
		}),
		{ID: "ld-so-preload", Group: 14, As: asRoot, Mounts: true, Title: "/etc/ld.so.preload", Stop: byMap, Run: withLibrary(preloadFile)},
		{ID: "ld-so-cache", Group: 14, As: asRoot, Mounts: true, Title: "ld.so.cache points to an unlisted library", Stop: byMap, Run: withLibrary(loaderCache)},
		with("gconv", 14, "character conversion module (GCONV_PATH)", func(a *attempt, lib string) error {
			if err := os.Rename(lib, a.path("EVIL.so")); err != nil {
				return err
			}
			if _, err := a.write("gconv-modules", "module EVIL// INTERNAL EVIL 1\nmodule INTERNAL EVIL// EVIL 1\n"); err != nil {
				return err
			}
			return a.start(call{argv: []string{"iconv", "-f", "EVIL", "-t", "UTF-8", "/dev/null"}, env: []string{"GCONV_PATH=" + a.Dir}})
		}),
		with("nss", 14, "name service module", func(a *attempt, lib string) error {
			if err := os.Rename(lib, a.path("libnss_evil.so.2")); err != nil {
				return err
			}
			return a.start(call{argv: []string{"getent", "-s", "evil", "passwd", "nobody"}, env: []string{"LD_LIBRARY_PATH=" + a.Dir}})
		}),
		with("openssl-engine", 14, "OpenSSL engine", func(a *attempt, lib string) error {
			return a.run("openssl", "engine", "-t", "-pre", "SO_PATH:"+lib, "-pre", "LOAD", "dynamic")
		}),
		with("openssl-conf", 14, "OpenSSL provider named by OPENSSL_CONF", func(a *attempt, lib string) error {
			conf, err := a.write("c.cnf", "openssl_conf=i\n[i]\nproviders=p\n[p]\nevil=e\n[e]\nmodule="+lib+"\nactivate=1\n")
			if err != nil {
				return err
			}
			return a.start(call{argv: []string{"openssl", "rand", "1"}, env: []string{"OPENSSL_CONF=" + conf}})
		}),
		with("pkcs11", 14, "PKCS#11 module of ssh-keygen", func(a *attempt, lib string) error { return a.run("ssh-keygen", "-D", lib) }),
		with("nginx-module", 14, "load_module of nginx", func(a *attempt, lib string) error {
			conf, err := a.write("n.conf", "load_module "+lib+";\npid "+a.path("pid")+";\nerror_log "+a.path("log")+";\nevents{}\n")
			if err != nil {
				return err
			}
			return a.run("nginx", "-t", "-c", conf)
		}),
		with("bash-enable", 14, "loadable builtin of bash (enable -f)", func(a *attempt, lib string) error {
			return a.run("bash", a.listed("loadlib.bash"), lib)
		}),
		with("gawk-extension", 14, "extension of gawk", func(a *attempt, lib string) error { return a.run("gawk", "-l", lib, "-f", a.listed("noop.awk")) }),
		with("make-load", 14, "load directive of make", func(a *attempt, lib string) error {
			return a.run("make", "-f", a.listed("load.mk"), "LIB="+lib)
		}),
		with("gcc-plugin", 14, "plugin of gcc", func(a *attempt, lib string) error {
			src, err := a.write("x.c", "int x;\n")
			if err != nil {
				return err
			}
			return a.run("gcc", "-fplugin="+lib, "-c", "-o", a.path("x.o"), src)
		}),
		with("ld-plugin", 14, "plugin of the linker", func(a *attempt, lib string) error {
			return a.run("ld", "-plugin", lib, "-o", a.path("x"), "/dev/null")
		}),
		with("nm-plugin", 14, "plugin of nm", func(a *attempt, lib string) error { return a.run("nm", "--plugin", lib, "/bin/true") }),
		with("dlopen", 15, "dlopen", func(a *attempt, lib string) error { return a.tool("dlopen", lib) }),
		with("dlopen-shm", 15, "dlopen from /dev/shm", func(a *attempt, lib string) error {
			p := filepath.Join("/dev/shm", "rw-"+a.Token+".so")
			defer os.Remove(p)
			return errors.Join(a.payload("payload.so", p), a.tool("dlopen", p))
		}),
		with("dlopen-picture", 15, "dlopen of picture.png, mode 0644", func(a *attempt, lib string) error {
			return errors.Join(os.Rename(lib, a.path("picture.png")), os.Chmod(a.path("picture.png"), 0o644), a.tool("dlopen", a.path("picture.png")))
		}),
		with("dlmopen", 15, "dlmopen into a namespace of its own", func(a *attempt, lib string) error { return a.tool("dlmopen", lib) }),
		with("dlopen-memfd", 15, "dlopen of a memfd", func(a *attempt, lib string) error { return a.tool("dlopen-memfd", lib) }),
		with("dlopen-unlinked", 15, "dlopen of a file without a name", func(a *attempt, lib string) error { return a.tool("dlopen-unlinked", lib) }),
	}
}

func withLibrary(run func(a *attempt, lib string) error) func(*attempt) error {
	return func(a *attempt) error {
		lib, err := a.library("payload.so")
		if err != nil {
			return err
		}
		return run(a, lib)
	}
}

// inEtc gives the attempt's mount namespace an /etc of its own to write to: the host's stays as it is.
func (a *attempt) inEtc() error {
	for _, d := range []string{"upper", "work"} {
		if err := os.MkdirAll(a.path(d), 0o755); err != nil {
			return err
		}
	}
	options := fmt.Sprintf("lowerdir=/etc,upperdir=%s,workdir=%s", a.path("upper"), a.path("work"))
	if err := unix.Mount("overlay", "/etc", "overlay", 0, options); err != nil {
		return unavailable("overlay on /etc: %v", err)
	}
	return nil
}

func preloadFile(a *attempt, lib string) error {
	if err := a.inEtc(); err != nil {
		return err
	}
	if err := os.WriteFile("/etc/ld.so.preload", []byte(lib+"\n"), 0o644); err != nil {
		return err
	}
	return a.run("/bin/true")
}

func loaderCache(a *attempt, lib string) error {
	if err := a.inEtc(); err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(a.path("lib"), 0o755), os.Rename(lib, a.path("lib/librwdemo.so")), copyFile(a.inKit("victim"), a.path("victim"))); err != nil {
		return err
	}
	if err := a.run("ldconfig", "-X", a.path("lib")); err != nil {
		return err
	}
	return a.run(a.path("victim"))
}

// loaders are authorised programs whose trade is to load what they are told: groups 14 and 29.
func loaders() []technique {
	var out []technique
	for _, l := range []struct{ id, interpreter, script string }{
		{"python-ctypes", "python3", "loadlib.py"},
		{"python-extension", "python3", "extension.py"},
		{"perl-dynaloader", "perl", "loadlib.pl"},
		{"lua-loadlib", "lua5.4", "loadlib.lua"},
		{"node-dlopen", "node", "loadlib.js"},
	} {
		out = append(out, technique{
			ID: l.id, Group: 14, As: asBoth, Title: "library loaded by an authorised script (" + l.script + ")", Stop: byMap,
			Run: withLibrary(func(a *attempt, lib string) error { return a.run(l.interpreter, a.listed(l.script), lib) }),
		})
	}
	for _, l := range []struct{ id, interpreter, script string }{
		{"python-memfd", "python3", "memexec.py"},
		{"perl-memfd", "perl", "memexec.pl"},
	} {
		out = append(out, technique{
			ID: l.id, Group: 29, As: asBoth, Title: "memfd and exec by an authorised script (" + l.script + ")", Stop: byExec,
			Run: func(a *attempt) error {
				p, err := a.program("p")
				if err != nil {
					return err
				}
				return a.run(l.interpreter, a.listed(l.script), p)
			},
		})
	}
	return out
}
