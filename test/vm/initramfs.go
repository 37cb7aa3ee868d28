package vm

import (
	"io"
	"io/fs"
	"path"
	"strings"

	"ringwall/internal/hypervisor"
)

// cpio is a guest's first file system, laid out as Debian's is. What is there
// already stays: the second of a name is ignored.
type cpio struct{ *hypervisor.Initramfs }

// merged are the directories that Debian 12 keeps below /usr.
var merged = []string{"bin", "sbin", "lib", "lib64"}

func newCPIO(w io.Writer) *cpio {
	c := &cpio{hypervisor.NewInitramfs(w)}
	for _, d := range merged {
		c.Dir("usr/" + d)
		c.Symlink(d, "usr/"+d)
	}
	return c
}

// clean puts a name where Debian keeps it.
func clean(name string) string {
	name = path.Clean("/" + name)
	first, rest, _ := strings.Cut(name[1:], "/")
	for _, d := range merged {
		if first == d && rest != "" {
			return "/usr" + name
		}
	}
	return name
}

func (c *cpio) has(name string) bool { return c.Has(clean(name)) }

func (c *cpio) dir(name string) { c.Dir(clean(name)) }

func (c *cpio) symlink(name, target string) {
	if !c.has(name) {
		c.Symlink(clean(name), target)
	}
}

func (c *cpio) file(name string, perm fs.FileMode, content string) {
	if !c.has(name) {
		c.File(clean(name), perm, []byte(content))
	}
}

// copy adds a regular file of the host, following links.
func (c *cpio) copy(name, host string) {
	if !c.has(name) {
		c.Copy(clean(name), host)
	}
}
