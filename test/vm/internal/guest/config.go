// Package guest is the side of the harness that runs inside a QEMU guest: the
// first process of the initramfs, and the protocol by which it reports.
//
// The guest has two serial ports. ttyS0 is the kernel's console. ttyS1 carries
// what the program under test writes, and frames: a NUL byte, a nonce that
// only this run knows, a verb and an argument, a newline.
package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// Where things are inside the initramfs.
const (
	ConfigPath = "/vm.json"
	ModuleDir  = "/vm.modules"
	Report     = "/dev/ttyS1"
)

// The verbs of the frames.
const (
	VerbBoot  = "boot"  // argument: kernel release
	VerbReady = "ready" // the system is up; argument: seconds since the kernel started
	VerbExit  = "exit"  // argument: exit code
	VerbError = "error" // the harness itself failed in the guest; argument: why
)

// Config tells the first process what to do. It is a file in the initramfs and
// is removed before anything else runs.
type Config struct {
	Nonce   string   // starts every frame
	Modules []string // files below ModuleDir in load order
	Argv    []string // the program to run as root; unused with Debian set
	Env     []string
	Dir     string // working directory
	Debian  *Debian
}

// ReadConfig reads and removes the configuration.
func ReadConfig() (Config, error) {
	var c Config
	b, err := os.ReadFile(ConfigPath)
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("%s: %w", ConfigPath, err)
	}
	return c, os.Remove(ConfigPath)
}

// Frame is the line that reports verb and arg to the host.
func Frame(nonce, verb, arg string) string {
	return "\x00" + nonce + " " + verb + " " + strings.ReplaceAll(arg, "\n", " ") + "\n"
}

// CutFrame splits a line that may hold a frame into what stands before it, the
// verb and the argument.
func CutFrame(nonce string, line []byte) (before []byte, verb, arg string, ok bool) {
	text, frame, ok := strings.Cut(string(line), "\x00"+nonce+" ")
	if !ok {
		return line, "", "", false
	}
	verb, arg, _ = strings.Cut(strings.TrimRight(frame, "\r\n"), " ")
	return []byte(text), verb, arg, true
}
