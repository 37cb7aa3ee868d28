package csv

import (
	"bytes"
	"path"
	"slices"
	"strings"
)

// Bounds of what is read of a script.
const (
	shebangMax = 256     // the kernel's BINPRM_BUF_SIZE
	scriptMax  = 1 << 20 // of a maintainer script
)

// shebang is the first line of a script.
type shebang struct {
	interp string // without leading slash; "" if it is no absolute path
	raw    string // as it is written
	env    string // the program that env(1) is to look for, if it is env
}

// parseShebang reads "#!" as the kernel does: one path, and the rest as one
// argument. False if there is none.
func parseShebang(head []byte) (shebang, bool) {
	if !bytes.HasPrefix(head, []byte("#!")) {
		return shebang{}, false
	}
	line := head[2:min(len(head), shebangMax)]
	if i := bytes.IndexByte(line, '\n'); i >= 0 {
		line = line[:i]
	}
	text := strings.Trim(string(line), " \t\r")
	interp, arg, _ := strings.Cut(strings.ReplaceAll(text, "\t", " "), " ")
	s := shebang{raw: interp}
	if path.IsAbs(interp) {
		s.interp = clean(interp)
	}
	if path.Base(interp) == "env" {
		s.env = envTarget(strings.Fields(arg))
	}
	return s, true
}

// envTarget skips env's options and assignments.
func envTarget(args []string) string {
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "-u" || a == "-C" || a == "--unset" || a == "--chdir":
			i++
		case a == "--", strings.HasPrefix(a, "-"), strings.Contains(a, "="):
		default:
			return a
		}
	}
	return ""
}

// clean returns a path as the build's members have it, with the merged /usr of
// today's distributions.
func clean(p string) string {
	p = strings.TrimPrefix(path.Clean("/"+p), "/")
	for _, d := range []string{"bin/", "sbin/", "lib/", "lib32/", "lib64/", "libx32/"} {
		if strings.HasPrefix(p, d) {
			return "usr/" + p
		}
	}
	return p
}

// made says what a command of a maintainer script leaves on the host.
type made struct {
	command string
	what    string
	kind    madeKind
}

type madeKind uint8

const (
	madeBytecode madeKind = iota // what an interpreter writes for itself
	madeModule                   // kernel modules
	madeKexec                    // an initramfs or boot image
	madeCode                     // programs, libraries or scripts
	madeFetched                  // whatever the network says
	madeCaps                     // privileges on a file
)

// makers are the commands that leave code behind. ldconfig, depmod and the
// update-* of desktop caches write data only, so they are not here.
func makers() []made {
	return []made{
		{"py3compile", "Python byte code", madeBytecode},
		{"py3clean", "", madeBytecode}, // removes only
		{"pycompile", "Python byte code", madeBytecode},
		{"dh_python3", "Python byte code", madeBytecode},
		{"emacs-package-install", "Emacs byte code", madeCode},
		{"dkms", "kernel modules built from source", madeModule},
		{"m-a", "kernel modules built from source", madeModule},
		{"update-initramfs", "a new initramfs", madeKexec},
		{"dracut", "a new initramfs", madeKexec},
		{"mkinitramfs", "a new initramfs", madeKexec},
		{"kernel-install", "a boot image", madeKexec},
		{"cc", "compiled programs", madeCode},
		{"gcc", "compiled programs", madeCode},
		{"g++", "compiled programs", madeCode},
		{"clang", "compiled programs", madeCode},
		{"make", "what its makefile builds", madeCode},
		{"go", "compiled programs", madeCode},
		{"cargo", "compiled programs", madeCode},
		{"javac", "compiled classes", madeCode},
		{"pip", "Python packages from an index", madeFetched},
		{"pip3", "Python packages from an index", madeFetched},
		{"npm", "Node packages from a registry", madeFetched},
		{"gem", "Ruby packages from an index", madeFetched},
		{"cpan", "Perl modules from an index", madeFetched},
		{"curl", "files from the network", madeFetched},
		{"wget", "files from the network", madeFetched},
		{"apt-get", "packages from an archive", madeFetched},
		{"chmod", "a file that was made executable", madeCode},
		{"unzip", "unpacked files", madeCode},
		{"tar", "unpacked files", madeCode},
		{"setcap", "a file capability", madeCaps},
	}
}

// scanScript lists what a maintainer script makes. It reads a shell's words,
// not its language: a command counts where a command can stand. It cannot see
// through variables and eval.
func scanScript(text []byte) []made {
	var out []made
	known := makers()
	for _, words := range commands(text) {
		if slices.ContainsFunc(words, func(w string) bool { return strings.Contains(w, "py_compile") || strings.Contains(w, "compileall") }) {
			words = []string{"py3compile"}
		}
		i := slices.IndexFunc(known, func(m made) bool { return m.command == path.Base(words[0]) })
		if i < 0 || known[i].what == "" || !makes(known[i], words) {
			continue
		}
		if !slices.Contains(out, known[i]) {
			out = append(out, known[i])
		}
	}
	return out
}

// makes leaves out uses of a command that make nothing.
func makes(m made, words []string) bool {
	has := func(s ...string) bool {
		return slices.ContainsFunc(words[1:], func(w string) bool { return slices.Contains(s, w) })
	}
	switch m.command {
	case "chmod":
		return slices.ContainsFunc(words[1:], func(w string) bool {
			return strings.Contains(w, "+x") // by number it is most often a directory
		})
	case "tar":
		return slices.ContainsFunc(words[1:], func(w string) bool {
			return w == "--extract" || !strings.HasPrefix(w, "--") && !strings.Contains(w, "/") && strings.Contains(w, "x") && strings.Trim(w, "-xvzjJfCpPkm") == ""
		})
	case "dkms":
		return !has("remove", "status")
	case "update-initramfs":
		return !has("-d")
	case "pip", "pip3", "npm", "gem", "apt-get":
		return has("install", "i", "ci")
	case "go", "cargo":
		return has("build", "install")
	case "curl", "wget":
		return !has("--version", "--help")
	}
	return true
}

// commands splits a shell script into simple commands of at least one word.
func commands(text []byte) [][]string {
	var out [][]string
	lines := strings.Split(strings.ReplaceAll(string(text), "\\\n", " "), "\n")
	heredoc := ""
	for _, line := range lines {
		if heredoc != "" {
			if strings.TrimSpace(line) == heredoc {
				heredoc = ""
			}
			continue
		}
		if _, after, ok := strings.Cut(line, "<<"); ok && !strings.HasPrefix(after, "<") {
			if f := strings.Fields(strings.TrimLeft(after, "-~ ")); len(f) > 0 {
				heredoc = strings.Trim(f[0], `'";&|)`)
			}
		}
		for _, simple := range splitCommands(line) {
			if w := commandWords(simple); len(w) > 0 {
				out = append(out, w)
			}
		}
	}
	return out
}

// splitCommands cuts a line where one command ends, outside quotes, and drops
// its comment.
func splitCommands(line string) []string {
	var out []string
	var quote byte
	start := 0
	cut := func(i int) {
		out = append(out, line[start:i])
		start = i + 1
	}
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case c == '\\' && quote != '\'':
			i++
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'' || c == '"':
			quote = c
		case c == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t'):
			return append(out, line[start:i])
		case strings.IndexByte(";&|(){}`", c) >= 0:
			cut(i)
		}
	}
	return append(out, line[min(start, len(line)):])
}

// commandWords drops what may stand before a command.
func commandWords(s string) []string {
	words := strings.Fields(s)
	for len(words) > 0 {
		w := words[0]
		switch w {
		case "if", "then", "else", "elif", "do", "while", "until", "!", "exec", "sudo", "env", "nice", "ionice", "time", "-", "eval", "&&", "||":
			words = words[1:]
			continue
		case "command":
			if len(words) > 1 && strings.HasPrefix(words[1], "-") {
				return nil // asks whether there is one
			}
			words = words[1:]
			continue
		}
		if name, _, ok := strings.Cut(w, "="); ok && name != "" && !strings.ContainsAny(name, "/-.$") {
			words = words[1:]
			continue
		}
		break
	}
	for i := range words {
		words[i] = strings.Trim(words[i], `'"`)
	}
	if len(words) == 0 || words[0] == "" {
		return nil
	}
	return words
}
