package csv

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// AuditCopy is the policy document doc as a trial run's guest gets it: every
// mode that enforces audits, and policy and supplements may be signed by ca, with
// timestamps of tsa, beside whom the policy trusts already. Transparency logs are
// not asked for, since nobody enters a throw-away policy into one. Everything
// else is as it was, so the guest's agent decides as a host's would.
//
// The copy is good for nothing but the guest: no host trusts ca.
func AuditCopy(doc []byte, ca, tsa *x509.Certificate) ([]byte, error) {
	before, err := integrity.ParsePolicy(doc)
	if err != nil {
		return nil, fmt.Errorf("audit copy: %w", err)
	}
	if before.Supplements != "" {
		return nil, fmt.Errorf("audit copy: policy %s supplements another: %w", before.Name, errs.Invalid)
	}
	var root yaml.Node
	if err := yaml.Unmarshal(doc, &root); err != nil || len(root.Content) != 1 {
		return nil, fmt.Errorf("audit copy: no document: %w", errs.Invalid)
	}
	top := root.Content[0]
	set(top, "mode", text("audit"))
	if modes := valueOf(top, "modes"); modes != nil {
		for i := 1; i < len(modes.Content); i += 2 {
			if modes.Content[i].Value == "enforce" {
				modes.Content[i].SetString("audit")
			}
		}
	}
	trust := valueOf(top, "trust")
	if trust == nil {
		trust = &yaml.Node{Kind: yaml.MappingNode}
		set(top, "trust", trust)
	}
	remove(trust, "logs")
	signs := &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{text("policy"), text("supplement")}}
	add(trust, "authorities", "csv run policy CA", ca, signs)
	add(trust, "timestamps", "csv run TSA", tsa, nil)
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(&root); err != nil {
		return nil, fmt.Errorf("audit copy: %w", err)
	}
	after, err := integrity.ParsePolicy(out.Bytes())
	if err != nil {
		return nil, fmt.Errorf("audit copy: %w", err)
	}
	return out.Bytes(), onlyAudits(before, after)
}

// onlyAudits holds a copy against its policy: nothing enforces, and nothing that
// was asked is not asked any more. It fails closed.
func onlyAudits(before, after *integrity.Policy) error {
	pairs := [][2]integrity.Mode{
		{before.Process.Memory, after.Process.Memory},
		{before.Process.Ptrace, after.Process.Ptrace},
		{before.Process.BlockWrites, after.Process.BlockWrites},
		{before.Process.CodeWrites, after.Process.CodeWrites},
	}
	for _, k := range integrity.Kinds() {
		pairs = append(pairs, [2]integrity.Mode{before.Modes[k], after.Modes[k]})
	}
	for _, p := range pairs {
		want := p[0]
		if want == integrity.ModeEnforce {
			want = integrity.ModeAudit
		}
		if p[1] != want && !(p[0] == integrity.ModeOff && p[1] == integrity.ModeAudit) {
			return fmt.Errorf("audit copy: a mode is %v where %v was meant: %w", p[1], want, errs.Invalid)
		}
	}
	return nil
}

func text(s string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(s)
	return n
}

// valueOf is what a mapping has under a key; nil: nothing.
func valueOf(m *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			return m.Content[i+1]
		}
	}
	return nil
}

func set(m *yaml.Node, key string, value *yaml.Node) {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			m.Content[i+1] = value
			return
		}
	}
	m.Content = append(m.Content, text(key), value)
}

func remove(m *yaml.Node, key string) {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			m.Content = append(m.Content[:i], m.Content[i+2:]...)
			return
		}
	}
}

// add appends a certificate with its name, and what it signs, to a list of them.
func add(trust *yaml.Node, list, name string, cert *x509.Certificate, signs *yaml.Node) {
	item := &yaml.Node{Kind: yaml.MappingNode}
	set(item, "name", text(name))
	if signs != nil {
		set(item, "signs", signs)
	}
	pem := text(strings.TrimSpace(string(pki.EncodeCertificate(cert))) + "\n")
	pem.Style = yaml.LiteralStyle
	set(item, "certificate", pem)
	to := valueOf(trust, list)
	if to == nil || to.Kind != yaml.SequenceNode {
		to = &yaml.Node{Kind: yaml.SequenceNode}
		set(trust, list, to)
	}
	to.Style = 0
	to.Content = append(to.Content, item)
}
