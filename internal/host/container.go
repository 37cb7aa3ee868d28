package host

import (
	"strconv"
	"strings"
)

// ContainerOf tells the container from a cgroup's path, by how runtimes
// name cgroups: with the systemd driver RUNTIME-ID.scope, with the cgroupfs
// driver a directory of the runtime with the id below it. In nested containers
// it is the outermost one: the one that this host runs, and that what is inside
// cannot choose. A runtime's monitor process is in no container.
func ContainerOf(path string) Container {
	if len(path) > maxCgroupPath {
		return Container{}
	}
	parent, pod := "", false
	for e := range strings.SplitSeq(path, "/") {
		if e == "" {
			continue
		}
		if c, ok := containerElement(parent, e, pod); ok {
			return c
		}
		pod = pod || strings.HasPrefix(e, "kubepods")
		parent = e
	}
	return Container{}
}

// containerElement looks at one element of a path. The answer may be the zero
// Container: a monitor that lies below the container's own name.
func containerElement(parent, e string, pod bool) (Container, bool) {
	if name, ok := strings.CutSuffix(e, ".scope"); ok {
		return containerScope(name)
	}
	if name, ok := strings.CutPrefix(e, "systemd-nspawn@"); ok {
		name, ok = strings.CutSuffix(name, ".service")
		return Container{"systemd-nspawn", unescapeUnit(name)}, ok && name != ""
	}
	if name, ok := strings.CutPrefix(e, "lxc.payload."); ok && name != "" {
		return Container{"lxc", name}, true
	}
	if strings.HasPrefix(e, "lxc.monitor") {
		return Container{}, true
	}
	for _, p := range []struct{ prefix, runtime string }{{"libpod-", "podman"}, {"crio-", "cri-o"}} {
		if id, ok := strings.CutPrefix(e, p.prefix); ok {
			id, monitor := strings.CutPrefix(id, "conmon-")
			if monitor {
				return Container{}, isContainerID(id)
			}
			return Container{p.runtime, id}, isContainerID(id)
		}
	}
	switch parent {
	case "docker":
		return Container{"docker", e}, isContainerID(e)
	case "lxc":
		return Container{"lxc", e}, true
	}
	if pod && isContainerID(e) {
		return Container{"cri", e}, true // the cgroupfs driver does not say which
	}
	return Container{}, false
}

func containerScope(name string) (Container, bool) {
	for _, p := range []struct{ prefix, runtime string }{
		{"docker-", "docker"}, {"cri-containerd-", "containerd"}, {"nerdctl-", "containerd"}, {"libpod-", "podman"}, {"crio-", "cri-o"},
	} {
		id, ok := strings.CutPrefix(name, p.prefix)
		if !ok {
			continue
		}
		if id, monitor := strings.CutPrefix(id, "conmon-"); monitor {
			return Container{}, isContainerID(id)
		}
		return Container{p.runtime, id}, isContainerID(id)
	}
	if id, ok := strings.CutPrefix(name, "runc-"); ok && id != "" {
		return Container{"runc", unescapeUnit(id)}, true
	}
	if id, ok := strings.CutPrefix(name, "machine-"); ok && id != "" {
		// Registered with systemd-machined: systemd-nspawn, or libvirt,
		// which puts its driver first.
		id = unescapeUnit(id)
		if lxc, ok := strings.CutPrefix(id, "lxc-"); ok {
			return Container{"lxc", lxc}, true
		}
		return Container{"machine", id}, true
	}
	return Container{}, false
}

// isContainerID is whether s is 64 hex digits.
func isContainerID(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == 64
}

// unescapeUnit undoes systemd's \xNN in names of units (systemd.unit(5)).
func unescapeUnit(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if strings.HasPrefix(s[i:], `\x`) && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+2:i+4], 16, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
