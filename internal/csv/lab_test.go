package csv_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// lab is a fleet with an authority, and the build that is asked about.
type lab struct {
	t   testing.TB
	now time.Time
	a   *pki.Authority
}

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t, now: time.Now().UTC().Truncate(time.Second)}
	var err error
	l.a, err = pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Fleet", Now: func() time.Time { return l.now }})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

const builder = "spiffe://fleet.example/build/main"

// sign makes the release record of a build.
func (l *lab) sign(s codesign.Source, info codesign.ReleaseInfo) *csv.SignedRelease {
	l.t.Helper()
	b, err := codesign.Build(s, codesign.Options{})
	if err != nil {
		l.t.Fatal(err)
	}
	signer, err := l.a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: builder, Now: l.now})
	if err != nil {
		l.t.Fatal(err)
	}
	if info.Product == "" {
		info.Product, info.Version, info.Epoch = "edged", "1", 3
	}
	bundle, err := codesign.SignRelease(signer, info, b.Catalogue, b.Names)
	if err != nil {
		l.t.Fatal(err)
	}
	return &csv.SignedRelease{Bundle: bundle, Catalogue: b.Catalogue, Names: b.Names}
}

// policy is a policy that trusts the lab's authority and has these rules.
func (l *lab) policy(name string, epoch int, mode, rules string) *integrity.Policy {
	l.t.Helper()
	doc := l.document(name, epoch, mode, rules)
	p, err := integrity.ParsePolicy([]byte(doc))
	if err != nil {
		l.t.Fatalf("%v\n%s", err, doc)
	}
	return p
}

func (l *lab) document(name string, epoch int, mode, rules string) string {
	cert := func(pem []byte) string {
		return strings.ReplaceAll(strings.TrimSpace(string(pem)), "\n", "\n        ")
	}
	roots := l.a.Roots(pki.PurposeBuild)
	return fmt.Sprintf(`version: 1
name: %s
epoch: %d
mode: %s
trust:
  authorities:
    - name: Fleet build CA
      signs: [build]
      certificate: |
        %s
  timestamps:
    - name: Fleet TSA
      certificate: |
        %s
%s
`, name, epoch, mode, cert(pki.EncodeCertificate(roots.CAs[0].Cert)), cert(pki.EncodeCertificate(roots.TSAs[0].Cert)), rules)
}

const allowFleet = `allow:
  - {rule: own, signer: {authority: Fleet build CA}}`

// cell is a cell of one policy.
func cell(ring string, hosts int, p *integrity.Policy, sources ...integrity.Source) csv.Cell {
	return csv.Cell{Ring: ring, Hosts: hosts, Load: func(context.Context) (*csv.Live, error) {
		return &csv.Live{Policy: p, Sources: sources}, nil
	}}
}

func (l *lab) verify(s codesign.Source, r *csv.SignedRelease, o csv.Options, cells ...csv.Cell) *csv.Report {
	l.t.Helper()
	if o.Now.IsZero() {
		o.Now = l.now.Add(time.Second)
	}
	v := &csv.Inventory{Cells: cells}
	for _, c := range cells {
		if c.Ring != "" && !slices.Contains(v.Rings, c.Ring) {
			v.Rings = append(v.Rings, c.Ring)
		}
	}
	rep, err := csv.Verify(l.t.Context(), csv.Candidate{Source: s, Release: r, Subject: func() csv.Subject {
		return csv.Subject{Name: "dist", Format: "directory", Digest: integrity.Digest{1}}
	}}, v, o)
	if err != nil {
		l.t.Fatal(err)
	}
	return rep
}

// tree is a build of these files; a name that ends in * is executable.
func tree(files map[string]string) fstest.MapFS {
	out := fstest.MapFS{}
	for name, text := range files {
		mode := 0o644
		if n, ok := strings.CutSuffix(name, "*"); ok {
			name, mode = n, 0o755
		}
		f := &fstest.MapFile{Data: []byte(text)}
		f.Mode = 0
		f.Mode |= 0o777 & modeOf(mode)
		out[name] = f
	}
	return out
}

// find returns the findings of a check, in a line each: severity, cells, members.
func find(r *csv.Report, id csv.ID) []string {
	var out []string
	for _, f := range r.Findings {
		if f.ID != id {
			continue
		}
		var names []string
		for _, m := range f.Members {
			names = append(names, strings.Join(m.Paths, "+"))
		}
		out = append(out, fmt.Sprintf("%s %v %s", f.Severity, f.Cells, strings.Join(names, " ")))
	}
	slices.Sort(out)
	return out
}

func wantFindings(t *testing.T, r *csv.Report, want map[csv.ID][]string) {
	t.Helper()
	for _, c := range csv.Checks() {
		if got := find(r, c.ID); !slices.Equal(got, want[c.ID]) {
			t.Errorf("%s: %q, want %q", c.ID, got, want[c.ID])
		}
	}
	if t.Failed() {
		for _, f := range r.Findings {
			t.Logf("%s %s %s | %s", f.Severity, f.ID, f.Cause, f.Fix)
		}
	}
}

// elfImage is a small 64-bit ELF with what a test wants in it.
type elfImage struct {
	kind    uint16 // 2 ET_EXEC, 3 ET_DYN
	interp  string
	needed  []string
	soname  string
	rwx     bool
	stackX  bool
	noRelro bool
	now     bool
}

func (x elfImage) bytes() string {
	le := binary.LittleEndian
	type ph struct {
		kind, flags     uint32
		off, addr, size uint64
	}
	const base, header = 0, 64
	var body, strs []byte
	str := func(s string) uint64 {
		n := uint64(len(strs))
		strs = append(append(strs, s...), 0)
		return n
	}
	str("")
	var dyn []uint64
	for _, n := range x.needed {
		dyn = append(dyn, 1, str(n))
	}
	if x.soname != "" {
		dyn = append(dyn, 14, str(x.soname))
	}
	if x.now {
		dyn = append(dyn, 24, 0)
	}
	phs := []ph{{kind: 1, flags: 5}}
	if x.interp != "" {
		phs = append(phs, ph{kind: 3, flags: 4})
	}
	phs = append(phs, ph{kind: 2, flags: 6}, ph{kind: 0x6474e551, flags: 6})
	if x.stackX {
		phs[len(phs)-1].flags = 7
	}
	if !x.noRelro {
		phs = append(phs, ph{kind: 0x6474e552, flags: 4})
	}
	if x.rwx {
		phs[0].flags = 7
	}
	at := uint64(header + 56*len(phs))
	place := func(b []byte) (off, size uint64) {
		off = at + uint64(len(body))
		body = append(body, b...)
		return off, uint64(len(b))
	}
	soff, ssize := place(strs)
	dyn = append(dyn, 5, soff, 10, ssize, 0, 0)
	var raw []byte
	for _, v := range dyn {
		raw = le.AppendUint64(raw, v)
	}
	doff, dsize := place(raw)
	var ioff, isize uint64
	if x.interp != "" {
		ioff, isize = place(append([]byte(x.interp), 0))
	}
	for i := range phs {
		p := &phs[i]
		switch p.kind {
		case 1:
			p.off, p.addr, p.size = 0, base, at+uint64(len(body))
		case 2:
			p.off, p.addr, p.size = doff, doff, dsize
		case 3:
			p.off, p.addr, p.size = ioff, ioff, isize
		}
	}
	out := make([]byte, header)
	copy(out, "\x7fELF\x02\x01\x01")
	le.PutUint16(out[16:], x.kind)
	le.PutUint16(out[18:], 62)
	le.PutUint32(out[20:], 1)
	le.PutUint64(out[32:], header)
	le.PutUint16(out[52:], header)
	le.PutUint16(out[54:], 56)
	le.PutUint16(out[56:], uint16(len(phs)))
	for _, p := range phs {
		out = le.AppendUint32(out, p.kind)
		out = le.AppendUint32(out, p.flags)
		for _, v := range []uint64{p.off, p.addr, p.addr, p.size, p.size, 4096} {
			out = le.AppendUint64(out, v)
		}
	}
	return string(out) + string(body)
}
