package csv

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/kernelsig"
	"ringwall/internal/strictyaml"
)

// Live is the policy of a cell with the verified content that its hosts have.
type Live struct {
	Policy  *integrity.Policy
	Sources []integrity.Source
	// Supplements are the digests of the documents that were joined into Policy.
	Supplements []integrity.Digest
}

// Cell is hosts that decide alike: one ring, one policy with its sources, one
// agent and one sort of kernel.
type Cell struct {
	Ring       string // empty: not in a fleet yet
	Hosts      int    // 0: nobody runs it yet
	Agent      string // its version, if known
	Classifier int    // of the agent; 0: as in this program
	Kernel     string // what its hosts run, for people
	// Key is equal for cells that decide alike, which are judged once.
	Key string
	// Load reads the policy and its sources. It is called once for each key, and
	// what it returns is dropped before the next cell is loaded.
	Load func(ctx context.Context) (*Live, error)
	// ModuleKeys are the certificates that its kernels take module signatures
	// from; nil: nobody said.
	ModuleKeys []*x509.Certificate
	// DB and DBX are what the firmware allows and forbids, and SBAT the
	// generations that it asks for; a nil DB: nobody said.
	DB, DBX *kernelsig.SignatureDB
	SBAT    []kernelsig.SBATEntry
}

// Inventory is the cells of a fleet at a time.
type Inventory struct {
	Taken time.Time // zero: now, from files
	Rings []string  // in the order of roll-outs
	Cells []Cell
}

// Cells says where a build will go. A file does, and so does a fleet's server.
type Cells interface {
	// Cells returns the cells of the rings named; of every ring when none is. A
	// ring that nobody knows is errs.NotFound.
	Cells(ctx context.Context, rings []string) (*Inventory, error)
}

// Bounds of a file of cells.
const (
	maxCellsFile = 1 << 20
	maxCells     = 1000
	maxListed    = 1000 // files of one cell
)

// CellSpec is a cell as a file says it. Names of files are relative to the
// file that they stand in.
type CellSpec struct {
	Ring        string
	Hosts       int
	Policy      string
	Supplements []string
	Releases    []string
	Packages    []string
	Archive     string
	Agent       string
	Classifier  int
	Kernel      string
	ModuleKeys  []string // certificates
	DB, DBX     []string // certificates, or signature lists (.esl)
	SBAT        string   // a level, as in SbatLevelRT
}

// CellsFile is a fleet's cells as a file says them.
type CellsFile struct {
	Taken time.Time
	Rings []string
	Cells []CellSpec
}

// ParseCells reads a file of cells, whose name stands in errors. It is strict,
// and the *strictyaml.Error lists every problem with its place and the fix.
func ParseCells(name string, doc []byte) (*CellsFile, error) {
	d := cellsDocument{Reader: strictyaml.NewReader(name, strictyaml.Limits{What: "list of cells", Bytes: maxCellsFile, Parts: 100_000, Depth: 6})}
	if root := d.Root(doc); root != nil {
		d.read(root)
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	return &d.f, nil
}

type cellsDocument struct {
	strictyaml.Reader
	f CellsFile
}

func (d *cellsDocument) read(n *yaml.Node) {
	var rings *yaml.Node
	var nodes []*yaml.Node
	d.Mapping(n, "", []strictyaml.Field{
		strictyaml.Required("version", func(n *yaml.Node, at string) { d.Number(n, at, 1, 1) }),
		strictyaml.Optional("taken", func(n *yaml.Node, at string) { d.f.Taken = d.Time(n, at) }),
		strictyaml.Optional("rings", func(n *yaml.Node, at string) { rings, d.f.Rings = n, d.Texts(n, at, maxCells, isName) }),
		strictyaml.Required("cells", func(n *yaml.Node, at string) {
			d.NotEmpty(n, at)
			d.List(n, at, maxCells, func(n *yaml.Node, at string) {
				nodes = append(nodes, n)
				d.cell(n, at)
			})
		}),
	})
	for i, c := range d.f.Cells {
		switch {
		case rings == nil && c.Ring != "" && !slices.Contains(d.f.Rings, c.Ring):
			d.f.Rings = append(d.f.Rings, c.Ring)
		case rings != nil && c.Ring != "" && !slices.Contains(d.f.Rings, c.Ring):
			d.Problem(nodes[i], fmt.Sprintf("cells[%d].ring", i), "ring "+c.Ring+" is not among rings", "add it there, where it belongs in the order")
		}
	}
}

func (d *cellsDocument) cell(n *yaml.Node, where string) {
	var c CellSpec
	text := func(to *string) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) { *to, _ = d.Text(n, at) }
	}
	files := func(to *[]string) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) { *to = d.Texts(n, at, maxListed, nil) }
	}
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Optional("ring", func(n *yaml.Node, at string) {
			s, ok := d.Text(n, at)
			if bad, fix := isName(s); ok && bad != "" {
				d.Problem(n, at, bad, fix)
			}
			c.Ring = s
		}),
		strictyaml.Optional("hosts", func(n *yaml.Node, at string) { c.Hosts = int(d.Number(n, at, 0, 1e9)) }), //nolint:gosec // bounded
		strictyaml.Required("policy", text(&c.Policy)),
		strictyaml.Optional("supplements", files(&c.Supplements)),
		strictyaml.Optional("releases", files(&c.Releases)),
		strictyaml.Optional("packages", files(&c.Packages)),
		strictyaml.Optional("archive", text(&c.Archive)),
		strictyaml.Optional("agent", text(&c.Agent)),
		strictyaml.Optional("classifier", func(n *yaml.Node, at string) { c.Classifier = int(d.Number(n, at, 1, 1<<15)) }), //nolint:gosec // bounded
		strictyaml.Optional("kernel", text(&c.Kernel)),
		strictyaml.Optional("module_keys", files(&c.ModuleKeys)),
		strictyaml.Optional("efi_db", files(&c.DB)),
		strictyaml.Optional("efi_dbx", files(&c.DBX)),
		strictyaml.Optional("efi_sbat", text(&c.SBAT)),
	})
	if c.Ring == "" && c.Hosts > 0 {
		d.Problem(n, where, "has hosts, and no ring", "add `ring: NAME`")
	}
	d.f.Cells = append(d.f.Cells, c)
}

// isName says what is wrong with a ring's name.
func isName(s string) (problem, fix string) {
	if len(s) > 64 || strings.ContainsFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
	}) {
		return "`" + strictyaml.Clip(s) + "` is no name", "use at most 64 letters, digits, - and _"
	}
	return "", ""
}

// Select returns what a build that goes to these rings must pass: their cells,
// and the policies that no host runs yet. No ring named means all.
func (v *Inventory) Select(rings []string) (*Inventory, error) {
	for _, r := range rings {
		if !slices.Contains(v.Rings, r) {
			return nil, fmt.Errorf("ring %q (there are %s): %w", r, strings.Join(v.Rings, ", "), errs.NotFound)
		}
	}
	if len(rings) == 0 {
		return v, nil
	}
	out := &Inventory{Taken: v.Taken}
	for _, r := range v.Rings {
		if slices.Contains(rings, r) {
			out.Rings = append(out.Rings, r)
		}
	}
	for _, c := range v.Cells {
		if c.Ring == "" || slices.Contains(rings, c.Ring) {
			out.Cells = append(out.Cells, c)
		}
	}
	return out, nil
}
