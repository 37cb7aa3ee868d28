package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// services are techniques that have the system's own services start the payload: group 33 and, with inline code, 27.
func services() []technique {
	unit := func(id string, group int, title, stop, exec string) technique {
		return technique{ID: id, Group: group, As: asRoot, Host: true, Title: title, Stop: stop, Limit: 40, Run: func(a *attempt) error { return startUnit(a, exec) }}
	}
	return []technique{
		unit("unit-program", 33, "systemd unit starts an unlisted program", byExec, "PROGRAM"),
		unit("unit-inline", 27, "systemd unit with inline shell code", byArgument, `/bin/sh -c "CODE"`),
		unit("unit-script", 26, "systemd unit gives a shell an unlisted script", byRead, "/bin/sh SCRIPT"),
		{ID: "systemd-run", Group: 33, As: asRoot, Host: true, Title: "systemd-run", Stop: byExec, Limit: 40, Run: func(a *attempt) error {
			p, err := a.program("p")
			if err != nil {
				return err
			}
			return errors.Join(a.run("systemd-run", "--wait", "--quiet", p), a.await(2*time.Second))
		}},
		{ID: "systemd-generator", Group: 33, As: asRoot, Host: true, Title: "systemd generator", Stop: byExec, Limit: 60, Run: func(a *attempt) error {
			const dir = "/run/systemd/system-generators"
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			p := dir + "/attack-" + a.Token
			defer os.Remove(p)
			return errors.Join(a.payload("payload", p), a.run("systemctl", "daemon-reload"), a.await(2*time.Second))
		}},
		{ID: "udev-run", Group: 33, As: asRoot, Host: true, Title: "udev rule with RUN", Stop: byExec, Limit: 40, Run: func(a *attempt) error {
			p, err := a.program("p")
			if err != nil {
				return err
			}
			if err := os.MkdirAll("/run/udev/rules.d", 0o755); err != nil {
				return unavailable("%v", err)
			}
			rule := "/run/udev/rules.d/99-attack.rules"
			defer os.Remove(rule)
			return errors.Join(os.WriteFile(rule, []byte(`KERNEL=="null", RUN+="`+p+`"`+"\n"), 0o644), a.run("udevadm", "control", "--reload"),
				a.run("udevadm", "trigger", "--action=change", "/sys/class/mem/null"), a.await(5*time.Second))
		}},
		{ID: "apt-hook", Group: 27, As: asBoth, Title: "apt option with a command", Stop: byArgument, Run: func(a *attempt) error {
			return a.run("apt-get", "-o", "APT::Update::Pre-Invoke::="+strings.TrimSpace(a.code("sh")), "-o", "Dir::Etc::SourceList=/dev/null", "-o", "Dir::Etc::SourceParts=/dev/null", "update")
		}},
		{ID: "dpkg-hook", Group: 27, As: asRoot, Title: "dpkg option with a command", Stop: byArgument, Run: func(a *attempt) error {
			return a.run("dpkg", "--pre-invoke="+strings.TrimSpace(a.code("sh")), "--configure", "-a")
		}},
		{ID: "dpkg-scriptlet", Group: 25, As: asRoot, Mounts: true, Title: "package with an unlisted maintainer script", Stop: byScript, Limit: 60, Run: debScriptlet},
		{ID: "logrotate", Group: 27, As: asRoot, Title: "logrotate with a command", Stop: byArgument, Run: func(a *attempt) error {
			log, err := a.write("log", "x\n")
			if err != nil {
				return err
			}
			conf, err := a.write("conf", log+" {\nsu root root\nrotate 1\npostrotate\n"+a.code("sh")+"endscript\n}\n")
			if err != nil {
				return err
			}
			return a.run("logrotate", "-f", "-s", a.path("state"), conf)
		}},
		{ID: "pam-module", Group: 14, As: asRoot, Mounts: true, Title: "PAM module", Stop: byMap, Run: func(a *attempt) error {
			lib, err := a.library("pam_evil.so")
			if err != nil {
				return err
			}
			if err := a.inEtc(); err != nil {
				return err
			}
			line := fmt.Sprintf("auth sufficient %s\naccount sufficient pam_permit.so\nsession optional pam_permit.so\n", lib)
			return errors.Join(os.WriteFile("/etc/pam.d/su", []byte(line), 0o644), a.run("su", "nobody", "-s", "/bin/true"))
		}},
	}
}

func startUnit(a *attempt, exec string) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	script, err := a.write("s", a.code("sh"))
	if err != nil {
		return err
	}
	line := strings.NewReplacer("PROGRAM", p, "SCRIPT", script, "CODE", strings.TrimSpace(a.code("sh"))).Replace(exec)
	name := "attack-" + a.Token + ".service"
	file := "/run/systemd/system/" + name
	if err := os.MkdirAll("/run/systemd/system", 0o755); err != nil {
		return err
	}
	defer os.Remove(file)
	if err := os.WriteFile(file, []byte("[Service]\nType=oneshot\nExecStart="+line+"\n"), 0o644); err != nil {
		return err
	}
	return errors.Join(a.run("systemctl", "start", name), a.await(2*time.Second))
}

// debScriptlet installs a package made on the spot into a dpkg database of the attempt's own.
func debScriptlet(a *attempt) error {
	control := "Package: attack\nVersion: 1\nArchitecture: all\nMaintainer: none <none@localhost>\nDescription: attack\n"
	if _, err := a.write("deb/DEBIAN/control", control); err != nil {
		return err
	}
	if _, err := a.write("deb/DEBIAN/preinst", "#!/bin/sh\n"+a.code("sh")); err != nil {
		return err
	}
	for _, d := range []string{"admin/updates", "admin/info", "root"} {
		if err := os.MkdirAll(a.path(d), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(a.path("admin/status"), nil, 0o644); err != nil {
		return err
	}
	if err := a.run("dpkg-deb", "--build", a.path("deb"), a.path("x.deb")); err != nil {
		return err
	}
	return a.run("dpkg", "--admindir="+a.path("admin"), "--force-not-root", "--force-depends", "--log=/dev/null", "-i", a.path("x.deb"))
}
