// Package internal_test holds the architecture: which package may import
// which, and how big things may get. docs/ARCHITECTURE.md says why.
package internal_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "ringwall/"

// Limits of house style.
const (
	maxFileLines     = 800
	warnFuncLines    = 80
	maxFuncLines     = 150
	maxMethods       = 8
	maxMainFileLines = 80 // cmd/ringwall/main.go
)

// base knows nothing of the domain; a domain package does no I/O of its own.
var (
	base   = []string{"errs", "id", "pki", "api", "resource", "strictyaml", "agentpb"}
	domain = []string{
		"integrity", "codesign", "codesign/archive", "kernelsig", "gate", "csv", "rollout", "incident", "attest",
		"fleet", "vm", "vault", "identity", "rbac", "policy", "audit",
	}
	adapters = []string{"store", "enforce", "host", "hypervisor", "keystore", "artefact", "image", "transparency", "notify", "syslog"}
)

// floors says which of our packages each package may import. A package that is
// not here fails the test: adding one is a decision, made here. What is listed
// and not yet written is decided already.
var floors = map[string][]string{
	"errs": {},
	"id":   {},
	// The tree that everything managed is in.
	"resource": {"errs"},
	// What people write and sign: one way to read it.
	"strictyaml": {"errs"},
	"pki":        {"errs"},
	"api":        {"errs", "id", "pki"},
	// What agents and the server say to each other, generated.
	"agentpb": {},

	"integrity": {"errs", "id", "pki", "strictyaml"},
	// A release is judged by the policy's own words; the rest of the domain does not look sideways.
	"codesign": {"errs", "id", "pki", "integrity"},
	// Apart from codesign, so that OpenPGP is linked only where a Debian archive is verified.
	"codesign/archive": {"errs", "id", "pki", "codesign"},
	"kernelsig":        {"errs", "id", "pki"},
	"gate":             {"errs", "id", "pki", "strictyaml"},
	// CSV asks the policy's evaluator about a build's members, and the kernel's own signatures about modules.
	"csv":      {"errs", "id", "pki", "strictyaml", "integrity", "codesign", "kernelsig", "gate"},
	"rollout":  {"errs", "id", "pki"},
	"incident": {"errs", "id", "pki"},
	"attest":   {"errs", "id", "pki"},
	// What a host should have is said with signed manifests.
	"fleet":    {"errs", "id", "pki", "resource", "integrity", "codesign", "attest"},
	"vm":       {"errs", "id", "pki", "attest"},
	"vault":    {"errs", "id", "pki"},
	"identity": {"errs", "id", "pki"},
	"rbac":     {"errs", "id", "pki", "resource"},
	"policy":   {"errs", "id", "pki"},
	"audit":    {"errs", "id", "pki"},

	"store":      slices.Concat(base, domain),
	"enforce":    with(base, "integrity"),
	"host":       with(base, "attest"),
	"hypervisor": with(base, "vm"),
	"keystore":   with(base, "vault"),
	// Readers of other people's formats stay out of what a host runs.
	"artefact":     with(base, "integrity", "codesign"),
	"image":        with(base, "integrity", "codesign", "kernelsig"),
	"transparency": base,
	"notify":       base,
	"syslog":       with(base, "audit", "incident"),

	// The only process that holds a build key: it makes the catalogue itself and asks the gates before it signs.
	"signer": with(base, "integrity", "codesign", "gate", "kernelsig", "artefact", "transparency", "keystore", "notify"),
	// For tests only; depguard keeps it out of everything else.
	"testkit": {},
	"control": slices.Concat(base, domain),
	// What the server does beside the tree, each through control's door: hosts and what they are given, rollouts,
	// incidents, attestation. They know each other through small interfaces that the consumer declares.
	"control/hosts":       with(slices.Concat(base, domain), "control"),
	"control/rollouts":    with(slices.Concat(base, domain), "control"),
	"control/incidents":   with(slices.Concat(base, domain), "control"),
	"control/attestation": with(slices.Concat(base, domain), "control"),
	"httpapi":             with(slices.Concat(base, domain), "control"),
	"console":             with(slices.Concat(base, domain), "control"),
	// A host must keep enforcing without any of the server's code.
	"agent": with(base, "integrity", "codesign", "codesign/archive", "attest", "vm", "enforce", "host", "hypervisor"),
}

// doesIO are the standard packages that reach outside the process.
var doesIO = []string{"os", "os/exec", "os/signal", "net", "net/http", "net/rpc", "database/sql", "syscall", "plugin"}

// ioAllowed are the exceptions, with the reason.
var ioAllowed = map[string]map[string]string{
	"agentpb": {"net/http": "the generated client and handler are HTTP's"},
	"pki": {
		"os":  "keys lie in files whose mode is checked where they are read",
		"net": "addresses in TLS certificates",
	},
	"api": {
		"net":      "the client dials the agent's socket and the server",
		"net/http": "the protocol is HTTP",
		"os":       "the agent's socket is a file",
	},
}

// outside are the modules from elsewhere that a package's code may import;
// docs/dependencies.md says why these.
var outside = map[string][]string{
	"agentpb":          {"connectrpc.com/connect", "google.golang.org/protobuf"},
	"strictyaml":       {"go.yaml.in/yaml/v3"},
	"integrity":        {"go.yaml.in/yaml/v3"},
	"gate":             {"go.yaml.in/yaml/v3"},
	"signer":           {"go.yaml.in/yaml/v3"},
	"codesign":         {"github.com/klauspost/compress", "github.com/ulikunitz/xz"},
	"codesign/archive": {"github.com/ProtonMail/go-crypto"},
	"kernelsig":        {"github.com/klauspost/compress", "github.com/ulikunitz/xz", "github.com/pierrec/lz4/v4"},
	"csv":              {"go.yaml.in/yaml/v3"},
	"notify":           {"go.yaml.in/yaml/v3"},
	"enforce":          {"github.com/cilium/ebpf", "golang.org/x/sys"},
	"host": {
		"golang.org/x/sys", "github.com/google/go-tpm", "github.com/google/nftables",
		"github.com/klauspost/compress", "github.com/ulikunitz/xz", // apt keeps its lists compressed
	},
	"syslog":        {"golang.org/x/sys"}, // how much of a stream is not acknowledged
	"agent":         {"golang.org/x/sys", "connectrpc.com/connect", "google.golang.org/protobuf"},
	"control/hosts": {"connectrpc.com/connect", "google.golang.org/protobuf"},
	"artefact": {
		"github.com/klauspost/compress", "github.com/ulikunitz/xz", "github.com/pierrec/lz4/v4",
		"golang.org/x/sys", // extended attributes
		"github.com/erofs/go-erofs", "github.com/google/go-containerregistry",
	},
	"hypervisor": {"github.com/klauspost/compress", "github.com/ulikunitz/xz"}, // kernel modules are compressed
	"keystore":   {"github.com/miekg/pkcs11"},                                  // with the build tag pkcs11 only
	"transparency": {
		"github.com/transparency-dev/tessera", "k8s.io/klog", // klog to silence tessera
	},
	"attest":   {"github.com/google/go-tpm"},
	"identity": {"golang.org/x/crypto", "github.com/go-jose/go-jose/v4"},
	"httpapi":  {"github.com/coreos/go-oidc/v3"},
	"store":    {"github.com/jackc/pgx/v5", "modernc.org/sqlite"},
}

// junk are names that say nothing about what a package is for.
var junk = []string{"util", "utils", "common", "helper", "helpers", "types", "model", "models", "manager", "service", "base", "misc"}

func with(a []string, b ...string) []string { return slices.Concat(a, b) }

// finding is one breach; a warning does not fail the test.
type finding struct {
	file, text string
	warning    bool
}

// inspection walks a module's tree.
type inspection struct {
	fsys       fs.FS
	findings   []finding
	documented map[string]bool // package directory → has a package comment
}

// inspect parses the files itself instead of asking "go list": the go command
// then knows what the result depends on and never serves a stale one.
func inspect(fsys fs.FS) ([]finding, error) {
	in := &inspection{fsys: fsys, documented: map[string]bool{}}
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if p != "." && (name == "testdata" || name[0] == '.' || name[0] == '_') {
				return fs.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(name, ".go") {
			return in.file(p)
		}
		return nil
	})
	for dir, ok := range in.documented {
		if !ok {
			in.report(dir, "has no package comment")
		}
	}
	slices.SortFunc(in.findings, func(a, b finding) int { return strings.Compare(a.file+a.text, b.file+b.text) })
	return in.findings, err
}

func (in *inspection) report(file, format string, args ...any) {
	in.findings = append(in.findings, finding{file: file, text: fmt.Sprintf(format, args...)})
}

func (in *inspection) file(p string) error {
	src, err := fs.ReadFile(in.fsys, p)
	if err != nil {
		return err
	}
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, p, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	test := strings.HasSuffix(p, "_test.go")
	dir := path.Dir(p)
	if !test {
		in.documented[dir] = in.documented[dir] || f.Doc != nil
		if slices.Contains(junk, f.Name.Name) {
			in.report(p, "package %s: a name that says nothing", f.Name.Name)
		}
		in.imports(p, f)
	}
	if ast.IsGenerated(f) {
		return nil
	}
	limit := maxFileLines
	if p == "cmd/ringwall/main.go" {
		limit = maxMainFileLines
	}
	if n := set.Position(f.FileEnd).Line; n > limit {
		in.report(p, "%d lines, at most %d", n, limit)
	}
	for _, decl := range f.Decls {
		if fn, ok := decl.(*ast.FuncDecl); ok {
			in.function(p, set, fn, test)
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if i, ok := n.(*ast.InterfaceType); ok && i.Methods.NumFields() > maxMethods {
			in.report(p, "line %d: interface of %d methods, at most %d", set.Position(i.Pos()).Line, i.Methods.NumFields(), maxMethods)
		}
		return true
	})
	return nil
}

func (in *inspection) function(p string, set *token.FileSet, fn *ast.FuncDecl, test bool) {
	if fn.Recv == nil && fn.Name.Name == "init" {
		in.report(p, "init(): what happens at start must be seen in main")
	}
	lines := set.Position(fn.End()).Line - set.Position(fn.Pos()).Line + 1
	switch {
	case test: // a table of cases may be long
	case lines > maxFuncLines:
		in.report(p, "%s: %d lines, at most %d", fn.Name.Name, lines, maxFuncLines)
	case lines > warnFuncLines:
		in.report(p, "%s: %d lines, better at most %d", fn.Name.Name, lines, warnFuncLines)
		in.findings[len(in.findings)-1].warning = true
	}
}

func (in *inspection) imports(p string, f *ast.File) {
	name, internal := strings.CutPrefix(path.Dir(p), "internal/")
	may, known := floors[name]
	if internal && !known {
		in.report(p, "package %s is on no floor", name)
		return
	}
	pure := slices.Contains(base, name) || slices.Contains(domain, name) || name == "control"
	for _, spec := range f.Imports {
		im, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			in.report(p, "import %s: %v", spec.Path.Value, err)
			continue
		}
		own, isOwn := strings.CutPrefix(im, module)
		ownInternal, isInternal := strings.CutPrefix(own, "internal/")
		first, _, _ := strings.Cut(im, "/")
		switch {
		case im == "testing" || strings.HasPrefix(im, "testing/"):
			if internal && name != "testkit" || strings.HasPrefix(p, "cmd/") {
				in.report(p, "must not import %s outside tests", im)
			}
		case !internal:
			// cmd sees everything, and so do tests' own programs
		case isOwn && !isInternal:
			in.report(p, "%s must not import %s: only internal packages are for others", name, im)
		case isOwn:
			if ownInternal != name && !slices.Contains(may, ownInternal) {
				in.report(p, "%s must not import %s", name, ownInternal)
			}
		case strings.Contains(first, "."):
			if !slices.ContainsFunc(outside[name], func(m string) bool { return im == m || strings.HasPrefix(im, m+"/") }) {
				in.report(p, "%s must not import %s: not among its modules from elsewhere", name, im)
			}
		case pure && slices.Contains(doesIO, im) && ioAllowed[name][im] == "":
			in.report(p, "%s must not import %s: base and domain do no I/O", name, im)
		}
	}
}

func TestFloors(t *testing.T) {
	found, err := inspect(os.DirFS(".."))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		if f.warning {
			t.Logf("WARNING: %s: %s", f.file, f.text)
			continue
		}
		t.Errorf("%s: %s", f.file, f.text)
	}
}

// A rule of the table that contradicts the architecture is caught here.
func TestFloorsTable(t *testing.T) {
	for _, a := range adapters {
		for _, b := range adapters {
			if slices.Contains(floors[a], b) {
				t.Errorf("%s may import %s: adapters never import each other", a, b)
			}
		}
	}
	for _, server := range []string{"store", "control", "httpapi", "console"} {
		if slices.Contains(floors["agent"], server) {
			t.Errorf("agent may import %s: a host must enforce without the server's code", server)
		}
	}
	for name, reasons := range ioAllowed {
		for im, why := range reasons {
			if why == "" {
				t.Errorf("%s may import %s for no reason", name, im)
			}
		}
	}
}

// testdata/badtree breaks every rule once; what is not reported there would
// not be reported here either.
func TestFloors_bite(t *testing.T) {
	got, err := inspect(os.DirFS("testdata/badtree"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"cmd/ringwall/main.go: 81 lines, at most 80",
		"cmd/ringwall/main.go: must not import testing outside tests",
		"internal/agent/agent.go: agent must not import control",
		"internal/agent/agent.go: agent must not import httpapi",
		"internal/agent/agent.go: agent must not import store",
		"internal/codesign/big.go: 801 lines, at most 800",
		"internal/enforce/enforce.go: enforce must not import ringwall/cmd/ringwall: only internal packages are for others",
		"internal/enforce/enforce.go: enforce must not import host",
		"internal/enforce/enforce.go: init(): what happens at start must be seen in main",
		"internal/errs: has no package comment",
		"internal/host/long.go: endless: 151 lines, at most 150",
		"internal/host/long.go: lengthy: 81 lines, better at most 80 (warning)",
		"internal/integrity/integrity.go: integrity must not import enforce",
		"internal/integrity/integrity.go: integrity must not import github.com/spf13/cobra: not among its modules from elsewhere",
		"internal/integrity/integrity.go: integrity must not import net/http: base and domain do no I/O",
		"internal/integrity/integrity.go: integrity must not import os/exec: base and domain do no I/O",
		"internal/integrity/integrity.go: line 13: interface of 9 methods, at most 8",
		"internal/util/util.go: package util is on no floor",
		"internal/util/util.go: package util: a name that says nothing",
	}
	var have []string
	for _, f := range got {
		line := f.file + ": " + f.text
		if f.warning {
			line += " (warning)"
		}
		have = append(have, line)
	}
	for _, w := range want {
		if !slices.Contains(have, w) {
			t.Errorf("not reported: %s", w)
		}
	}
	for _, h := range have {
		if !slices.Contains(want, h) {
			t.Errorf("reported without cause: %s", h)
		}
	}
}
