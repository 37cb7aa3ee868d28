package integrity

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // the baseline
	"encoding/base64"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/pki"
)

// Bounds of a policy's parts.
const (
	maxRules     = 4096
	maxDigests   = 65536
	maxPatterns  = 4096
	maxAnchors   = 64
	maxMatches   = 64
	maxDataPaths = 256
	maxKeyring   = 1 << 20

	maxShortName = 15 // of an interpreter, in the kernel
	maxOption    = 48
	maxOptions   = 8
	maxVariable  = 15
	maxSuffix    = 7
	maxSuffixes  = 8
	maxDataPath  = 62
)

//go:embed baseline1.yaml
var baseline1 []byte

// Baseline returns the built-in interpreters, programs and knobs of a number
// that policies may give as their baseline, as YAML; nil for 0.
func Baseline(n int) []byte {
	if n == 1 {
		return bytes.Clone(baseline1)
	}
	return nil
}

// lastBaseline is the highest number that Baseline knows.
const lastBaseline = 1

// ParsePolicy reads a policy document; see ParseNamed.
func ParsePolicy(doc []byte) (*Policy, error) { return ParseNamed("policy.yaml", doc) }

// ParseNamed reads a policy document, whose name stands in errors. It is
// strict: unknown and repeated keys, wrong types, anchors, aliases, tags and
// anything out of bounds are refused, and the *ParseError lists every problem
// with its place. docs/design/policy.md describes the format.
func ParseNamed(name string, doc []byte) (*Policy, error) {
	d := &document{reader: reader{err: ParseError{Name: name}}, p: &Policy{Digest: sha256.Sum256(doc)}}
	if root := d.document(doc); root != nil {
		d.policy(root)
	}
	if err := d.failed(); err != nil {
		return nil, err
	}
	d.p.Prepare()
	return d.p, nil
}

// document reads one policy.
type document struct {
	reader
	p        *Policy
	baseline bool // it is a built-in one: interpreters, programs and knobs only

	ruleLine, programLine, interpreterLine, knobLine map[string]int
	ownInterpreters                                  []ownInterpreter // of p.Interpreters, by index
}

func (d *document) policy(n *yaml.Node) {
	p := d.p
	d.ruleLine, d.programLine, d.interpreterLine, d.knobLine = map[string]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	var mode, modes, trust, baseline *yaml.Node
	var rules []func() // after trust has been read, wherever it stands
	later := func(read func(*yaml.Node, string)) func(*yaml.Node, string) {
		return func(n *yaml.Node, where string) { rules = append(rules, func() { read(n, where) }) }
	}
	keep := func(to **yaml.Node) func(*yaml.Node, string) {
		return func(n *yaml.Node, _ string) { *to = n }
	}
	fields := []field{
		{"version", true, func(n *yaml.Node, where string) { d.number(n, where, 1, 1) }},
		{"name", true, func(n *yaml.Node, where string) { p.Name = d.label(n, where) }},
		{"epoch", true, func(n *yaml.Node, where string) { p.Epoch = d.number(n, where, 1, 1<<62) }},
		{"supplements", false, func(n *yaml.Node, where string) { p.Supplements = d.label(n, where) }},
		{"baseline", false, keep(&baseline)},
		{"mode", false, keep(&mode)},
		{"modes", false, keep(&modes)},
		{"trust", false, keep(&trust)},
		{"allow", false, later(func(n *yaml.Node, where string) { d.list(n, where, maxRules, d.allowRule) })},
		{"deny", false, later(func(n *yaml.Node, where string) { d.list(n, where, maxRules, d.denyRule) })},
		{"exceptions", false, later(func(n *yaml.Node, where string) { d.list(n, where, maxRules, d.exception) })},
		{"programs", false, func(n *yaml.Node, where string) { d.list(n, where, maxRules, d.program) }},
		{"interpreters", false, func(n *yaml.Node, where string) { d.list(n, where, maxRules, d.interpreter) }},
		{"knobs", false, func(n *yaml.Node, where string) { d.list(n, where, maxRules, d.knob) }},
	}
	if d.baseline {
		fields = slices.DeleteFunc(fields, func(f field) bool {
			return !slices.Contains([]string{"version", "programs", "interpreters", "knobs"}, f.key)
		})
		d.mapping(n, "", fields)
		d.mergeInterpreters(nil)
		return
	}
	d.mapping(n, "", fields)
	if n.Kind != yaml.MappingNode {
		return
	}
	if trust != nil {
		d.trust(trust)
	}
	for _, read := range rules {
		read()
	}
	if p.Supplements != "" {
		d.onlyAllows(n)
		return
	}
	if mode == nil {
		d.problem(n, "", "lacks mode", "add `mode: audit` to begin with")
	}
	d.modes(mode, modes)
	d.addBaseline(baseline)
}

// onlyAllows refuses in a supplement what only a base policy may say.
func (d *document) onlyAllows(n *yaml.Node) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		switch k := n.Content[i]; k.Value {
		case "baseline", "mode", "modes", "trust", "deny", "programs", "interpreters", "knobs":
			d.problem(k, k.Value, "a supplement may only hold allow and exceptions", "move it to policy "+d.p.Supplements)
		}
	}
}

// isLabel says whether s can stand in commands, URLs and file names.
func isLabel(s string) bool {
	alnum := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
	for i := range len(s) {
		if c := s[i]; !alnum(c) && (i == 0 || i == len(s)-1 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return s != "" && len(s) <= 63
}

func (d *document) label(n *yaml.Node, where string) string {
	s, ok := d.text(n, where)
	if ok && !isLabel(s) {
		d.problem(n, where, "`"+clip(s)+"` is no name", "use up to 63 lower-case letters, digits, dots, dashes and underscores")
		return ""
	}
	return s
}

// product reads a product's name, in the form that release records have.
func (d *document) product(n *yaml.Node, where string) string {
	s, ok := d.text(n, where)
	if ok && (len(s) > 64 || strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '+' && c != '-' && c != '.'
	})) {
		d.problem(n, where, "`"+clip(s)+"` is no product", "use the name in the release record: up to 64 of a-z, digits, + - .")
		return ""
	}
	return s
}

// unique reads a name that nothing else of its sort has.
func (d *document) unique(n *yaml.Node, where string, taken map[string]int) string {
	s := d.label(n, where)
	if s == "" {
		return ""
	}
	if line, dup := taken[s]; dup {
		d.problem(n, where, fmt.Sprintf("`%s` is taken, in line %d", s, line), "choose another name")
		return ""
	}
	taken[s] = n.Line
	return s
}

// processModes are the keys of modes that are no kinds.
func (p *ProcessRules) modes() map[string]*Mode {
	return map[string]*Mode{"memory": &p.Memory, "ptrace": &p.Ptrace, "block_writes": &p.BlockWrites, "code_writes": &p.CodeWrites}
}

func parseMode(s string) Mode {
	switch s {
	case "audit":
		return ModeAudit
	case "enforce":
		return ModeEnforce
	}
	return ModeOff
}

func (d *document) modes(mode, modes *yaml.Node) {
	p := d.p
	all := ModeOff
	if mode != nil {
		all = parseMode(d.word(mode, "mode", []string{"audit", "enforce"}))
	}
	to := p.Process.modes()
	for _, k := range Kinds() {
		to[k.String()] = &p.Modes[k]
	}
	var fields []field
	for _, key := range slices.Sorted(maps.Keys(to)) {
		*to[key] = all
		fields = append(fields, field{key, false, func(n *yaml.Node, where string) {
			*to[key] = parseMode(d.word(n, where, []string{"off", "audit", "enforce"}))
		}})
	}
	if modes != nil {
		d.mapping(modes, "modes", fields)
	}
}

func (d *document) trust(n *yaml.Node) {
	t := &d.p.Trust
	taken := map[string]int{}
	name := func(to *string) field {
		return field{"name", true, func(n *yaml.Node, where string) {
			s, ok := d.text(n, where)
			if line, dup := taken[s]; ok && dup {
				d.problem(n, where, fmt.Sprintf("`%s` is taken, in line %d", clip(s), line), "choose another name")
			}
			taken[s] = n.Line
			*to = s
		}}
	}
	d.mapping(n, "trust", []field{
		{"authorities", false, func(n *yaml.Node, where string) {
			d.list(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a Authority
				d.mapping(n, where, []field{
					name(&a.Name),
					{"signs", true, func(n *yaml.Node, where string) {
						a.Signs = d.texts(n, where, 4, func(s string) (string, string) {
							if !slices.Contains(signs(), s) {
								return "`" + clip(s) + "` must be one of " + strings.Join(signs(), ", "), suggest(s, signs())
							}
							return "", ""
						})
						d.notEmpty(n, where)
					}},
					{"certificate", true, func(n *yaml.Node, where string) {
						c, err := pki.DecodeCertificate([]byte(n.Value))
						if n.Kind != yaml.ScalarNode || err != nil {
							d.problem(n, where, "must be a PEM certificate", "paste the file, indented, after `certificate: |`")
							return
						}
						if !c.IsCA {
							d.problem(n, where, "is not a CA's certificate", "use the certificate of the CA that issues signing certificates")
						}
						a.Certificate = c
					}},
				})
				t.Authorities = append(t.Authorities, a)
			})
		}},
		{"timestamps", false, func(n *yaml.Node, where string) {
			d.list(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a Timestamp
				d.mapping(n, where, []field{name(&a.Name), {"certificate", true, func(n *yaml.Node, where string) {
					c, err := pki.DecodeCertificate([]byte(n.Value))
					if n.Kind != yaml.ScalarNode || err != nil {
						d.problem(n, where, "must be a PEM certificate", "paste the file, indented, after `certificate: |`")
						return
					}
					a.Certificate = c
				}}})
				t.Timestamps = append(t.Timestamps, a)
			})
		}},
		{"logs", false, func(n *yaml.Node, where string) {
			d.list(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a pki.LogAnchor
				d.mapping(n, where, []field{name(&a.Name), {"key", true, func(n *yaml.Node, where string) {
					k, err := pki.ParseLogKey(n.Value)
					if n.Kind != yaml.ScalarNode || err != nil {
						d.problem(n, where, "must be a log's key, such as log.fleet.example+1a2b3c4d+AjBZ…", "paste the line in the log's .pub file")
						return
					}
					a.LogKey = *k
				}}})
				t.Logs = append(t.Logs, a)
			})
		}},
		{"archives", false, func(n *yaml.Node, where string) {
			d.list(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a Archive
				d.mapping(n, where, []field{
					name(&a.Name),
					{"origins", false, func(n *yaml.Node, where string) { a.Origins = d.texts(n, where, maxAnchors, nil) }},
					{"keyring", true, func(n *yaml.Node, where string) { a.Keyring = d.keyring(n, where) }},
				})
				t.Archives = append(t.Archives, a)
			})
		}},
	})
}

func signs() []string { return []string{"build", "policy", "permit", "supplement"} }

// keyring takes an armoured keyring as it is and a binary one in base64. What
// keys it holds is for package codesign to say.
func (d *document) keyring(n *yaml.Node, where string) []byte {
	const begin = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
	fix := "paste /usr/share/keyrings/debian-archive-keyring.gpg as `base64` prints it, or an armoured key, indented, after `keyring: |`"
	if n.Kind != yaml.ScalarNode || len(n.Value) > maxKeyring {
		d.problem(n, where, fmt.Sprintf("must be a keyring of at most %d bytes", maxKeyring), fix)
		return nil
	}
	s := strings.TrimSpace(n.Value)
	if strings.HasPrefix(s, begin) {
		return []byte(s + "\n")
	}
	b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil || len(b) < 16 || b[0]&0x80 == 0 { // every OpenPGP packet starts with this bit (RFC 9580, 4.2)
		d.problem(n, where, "is no keyring of public keys", fix)
		return nil
	}
	return b
}

// indicators are the fields that say what a rule is about.
func (d *document) indicators(r *AllowRule, seen *[]string) []field {
	note := func(key string, read func(*yaml.Node, string)) field {
		return field{key, false, func(n *yaml.Node, where string) {
			*seen = append(*seen, key)
			read(n, where)
		}}
	}
	return []field{
		{"kinds", false, func(n *yaml.Node, where string) { r.Kinds = d.kinds(n, where) }},
		note("signer", func(n *yaml.Node, where string) { r.Signer = d.signer(n, where) }),
		note("package", func(n *yaml.Node, where string) { r.Package = d.packages(n, where) }),
		note("release", func(n *yaml.Node, where string) { r.Releases = d.digests(n, where) }),
		note("sha256", func(n *yaml.Node, where string) { r.SHA256 = d.digests(n, where) }),
		note("fsverity", func(n *yaml.Node, where string) { r.FSVerity = d.digests(n, where) }),
		note("dmverity", func(n *yaml.Node, where string) { r.DMVerity = d.digests(n, where) }),
	}
}

func (d *document) name(to *string, taken map[string]int) field {
	return field{"rule", true, func(n *yaml.Node, where string) { *to = d.unique(n, where, taken) }}
}

func (d *document) reason(to *string, required bool) field {
	return field{"reason", required, func(n *yaml.Node, where string) { *to, _ = d.text(n, where) }}
}

func (d *document) allowRule(n *yaml.Node, where string) {
	var r AllowRule
	var seen []string
	d.mapping(n, where, append(d.indicators(&r, &seen), d.name(&r.Rule, d.ruleLine), d.reason(&r.Reason, false)))
	d.oneIndicator(n, where, seen)
	d.p.Allow = append(d.p.Allow, r)
}

func (d *document) exception(n *yaml.Node, where string) {
	var r AllowRule
	var seen []string
	d.mapping(n, where, append(d.indicators(&r, &seen), d.name(&r.Rule, d.ruleLine), d.reason(&r.Reason, true),
		field{"until", true, func(n *yaml.Node, where string) { r.Until = d.time(n, where) }}))
	d.oneIndicator(n, where, seen)
	d.p.Allow = append(d.p.Allow, r)
}

func (d *document) oneIndicator(n *yaml.Node, where string, seen []string) {
	const which = "signer, package, release, sha256, fsverity, dmverity"
	switch {
	case n.Kind != yaml.MappingNode:
	case len(seen) == 0:
		d.problem(n, where, "says nothing about what it allows", "add one of "+which)
	case len(seen) > 1:
		d.problem(n, where, "has "+strings.Join(seen, " and "), "one indicator a rule: make it "+strconv.Itoa(len(seen))+" rules")
	}
}

func (d *document) kinds(n *yaml.Node, where string) KindSet {
	var out KindSet
	names := kindNames[KindExec:KindBPF]
	d.list(n, where, len(names), func(n *yaml.Node, where string) {
		if n.Value == KindBPF.String() {
			d.problem(n, where, "no rule authorises bpf", "name the program under programs, with `may: [bpf]`")
			return
		}
		if k, err := ParseKind(d.word(n, where, names)); err == nil {
			if out.Has(k) {
				d.problem(n, where, "repeated", "remove one of the two")
			}
			out |= SetOf(k)
		}
	})
	d.notEmpty(n, where)
	return out
}

func (d *document) signer(n *yaml.Node, where string) *Signer {
	s := &Signer{}
	var at *yaml.Node
	d.mapping(n, where, []field{
		{"authority", true, func(n *yaml.Node, where string) {
			s.Authority, _ = d.text(n, where)
			if d.p.Supplements == "" && s.Authority != "" {
				d.authority(n, where, s.Authority)
			}
		}},
		{"identity", false, func(n *yaml.Node, where string) {
			v, ok := d.text(n, where)
			if u, err := url.Parse(v); ok && (err != nil || u.Scheme == "" || u.Host == "" || u.String() != v) {
				d.problem(n, where, "`"+clip(v)+"` is no URI", "as it stands in the certificate, such as spiffe://fleet.example/build/main")
			}
			s.Identity = v
		}},
		{"product", false, func(n *yaml.Node, where string) { s.Product = d.product(n, where) }},
		{"min_epoch", false, func(n *yaml.Node, where string) {
			at = n
			s.MinEpoch = uint32(d.number(n, where, 1, 1<<32-1)) //nolint:gosec // bounded
		}},
	})
	if at != nil && s.Product == "" {
		d.problem(at, where+".min_epoch", "epochs of different products mean different things", "add `product: …`")
	}
	return s
}

// authority checks that a name is that of a trusted authority for builds.
func (d *document) authority(n *yaml.Node, where, name string) {
	var names []string
	for i := range d.p.Trust.Authorities {
		a := &d.p.Trust.Authorities[i]
		if a.Name != name {
			names = append(names, a.Name)
			continue
		}
		if !slices.Contains(a.Signs, "build") {
			d.problem(n, where, "`"+clip(name)+"` does not sign builds", "add build to its signs, or name another")
		}
		return
	}
	if len(names) == 0 {
		d.problem(n, where, "`"+clip(name)+"` is not trusted", "add it to trust.authorities")
		return
	}
	d.problem(n, where, "`"+clip(name)+"` is not in trust.authorities", suggest(name, names))
}

func (d *document) packages(n *yaml.Node, where string) *PackageSet {
	s := &PackageSet{}
	d.mapping(n, where, []field{
		{"archive", true, func(n *yaml.Node, where string) {
			var ok bool
			if s.Archive, ok = d.text(n, where); !ok || d.p.Supplements != "" {
				return
			}
			var names []string
			for i := range d.p.Trust.Archives {
				names = append(names, d.p.Trust.Archives[i].Name)
			}
			switch {
			case slices.Contains(names, s.Archive):
			case len(names) == 0:
				d.problem(n, where, "`"+clip(s.Archive)+"` is not trusted", "add it to trust.archives")
			default:
				d.problem(n, where, "`"+clip(s.Archive)+"` is not in trust.archives", suggest(s.Archive, names))
			}
		}},
		{"names", true, func(n *yaml.Node, where string) {
			s.Names = d.texts(n, where, maxPatterns, checkPattern)
			d.notEmpty(n, where)
		}},
	})
	return s
}

func (d *document) denyRule(n *yaml.Node, where string) {
	var r DenyRule
	d.mapping(n, where, []field{
		d.name(&r.Rule, d.ruleLine), d.reason(&r.Reason, false),
		{"sha256", false, func(n *yaml.Node, where string) { r.SHA256 = d.digests(n, where) }},
		{"release", false, func(n *yaml.Node, where string) { r.Releases = d.digests(n, where) }},
		{"package", false, func(n *yaml.Node, where string) { r.Package = d.packages(n, where) }},
		{"certificate", false, func(n *yaml.Node, where string) {
			d.list(n, where, maxRules, func(n *yaml.Node, where string) {
				var v Revocation
				d.mapping(n, where, []field{
					{"sha256", true, func(n *yaml.Node, where string) { v.Certificate, _ = d.digest(n, where) }},
					{"from", false, func(n *yaml.Node, where string) { v.From = d.time(n, where) }},
				})
				r.Certificates = append(r.Certificates, v)
			})
			d.notEmpty(n, where)
		}},
		{"product", false, func(n *yaml.Node, where string) {
			d.list(n, where, maxRules, func(n *yaml.Node, where string) {
				var v Outdated
				d.mapping(n, where, []field{
					{"name", true, func(n *yaml.Node, where string) { v.Product = d.product(n, where) }},
					{"below_epoch", true, func(n *yaml.Node, where string) {
						v.BelowEpoch = uint32(d.number(n, where, 1, 1<<32-1)) //nolint:gosec // bounded
					}},
				})
				r.Products = append(r.Products, v)
			})
			d.notEmpty(n, where)
		}},
	})
	if n.Kind == yaml.MappingNode && len(r.SHA256)+len(r.Releases)+len(r.Certificates)+len(r.Products) == 0 && r.Package == nil {
		d.problem(n, where, "says nothing about what it denies", "add one of sha256, release, package, certificate, product")
	}
	d.p.Deny = append(d.p.Deny, r)
}

func (d *document) match(n *yaml.Node, where string) Match {
	var m Match
	d.mapping(n, where, []field{
		{"files", false, func(n *yaml.Node, where string) {
			m.Files = d.texts(n, where, maxPatterns, func(s string) (string, string) {
				if strings.HasPrefix(s, "/") {
					return "`" + clip(s) + "` starts with a slash", "names are as in the package: " + clip(strings.TrimLeft(s, "/"))
				}
				return checkPattern(s)
			})
			d.notEmpty(n, where)
		}},
		{"package", false, func(n *yaml.Node, where string) {
			m.Package, _ = d.text(n, where)
			if bad, fix := checkPattern(m.Package); bad != "" {
				d.problem(n, where, bad, fix)
			}
		}},
		{"product", false, func(n *yaml.Node, where string) { m.Product = d.product(n, where) }},
		{"sha256", false, func(n *yaml.Node, where string) { m.SHA256 = d.digests(n, where) }},
	})
	if n.Kind == yaml.MappingNode && len(n.Content) == 0 {
		d.problem(n, where, "matches nothing", "add files, package, product or sha256")
	}
	return m
}

func roleNames() map[string]Role {
	return map[string]Role{
		"jit": RoleJIT, "jit-shared": RoleJITShared, "bpf": RoleBPF, "debug": RoleDebug, "packages": RolePackages, "block": RoleBlock, "modules": RoleModules,
	}
}

// String names the roles, joined by commas; "none" if there are none.
func (r Role) String() string {
	names := roleNames()
	names["agent"] = RoleAgent
	var out []string
	for _, s := range slices.Sorted(maps.Keys(names)) {
		if r&names[s] != 0 {
			out = append(out, s)
		}
	}
	if len(out) == 0 {
		return "none"
	}
	return strings.Join(out, ", ")
}

func (d *document) program(n *yaml.Node, where string) {
	var r ProgramRule
	roles := roleNames()
	words := slices.Sorted(maps.Keys(roles))
	d.mapping(n, where, []field{
		d.name(&r.Rule, d.programLine),
		{"match", true, func(n *yaml.Node, where string) { r.Match = d.match(n, where) }},
		{"may", true, func(n *yaml.Node, where string) {
			d.list(n, where, len(words), func(n *yaml.Node, where string) { r.May |= roles[d.word(n, where, words)] })
			d.notEmpty(n, where)
		}},
	})
	d.p.Programs = append(d.p.Programs, r)
}

func (d *document) knob(n *yaml.Node, where string) {
	var k Knob
	var sysctl, boot bool
	word := func(to *string) func(*yaml.Node, string) {
		return func(n *yaml.Node, where string) {
			s, ok := d.text(n, where)
			if ok && strings.ContainsAny(s, " =\"'") {
				d.problem(n, where, "`"+clip(s)+"` is no name of a setting", "")
				return
			}
			if line, dup := d.knobLine[s]; ok && dup {
				d.problem(n, where, fmt.Sprintf("`%s` is set in line %d already", clip(s), line), "remove one of the two")
			}
			d.knobLine[s] = n.Line
			*to = s
		}
	}
	d.mapping(n, where, []field{
		{"sysctl", false, func(n *yaml.Node, where string) { sysctl = true; word(&k.Name)(n, where) }},
		{"boot", false, func(n *yaml.Node, where string) { boot = true; word(&k.Name)(n, where) }},
		{"want", true, func(n *yaml.Node, where string) { k.Want, _ = d.text(n, where) }},
		{"rule", false, func(n *yaml.Node, where string) {
			k.Rule = d.word(n, where, []string{"exactly", "at_least", "contains"})
		}},
		{"apply", false, func(n *yaml.Node, where string) {
			k.Apply = d.boolean(n, where)
			if k.Apply && boot {
				d.problem(n, where, "a boot parameter cannot be applied", "remove it; Ringwall reports whether it is set")
			}
		}},
		{"since", false, func(n *yaml.Node, where string) { k.Since = d.kernel(n, where) }},
	})
	if n.Kind == yaml.MappingNode && sysctl == boot {
		d.problem(n, where, "must have one of sysctl and boot", "")
	}
	if k.Rule == "" {
		k.Rule = "exactly"
	}
	k.Boot = boot
	d.p.Knobs = append(d.p.Knobs, k)
}

func (d *document) kernel(n *yaml.Node, where string) [2]int {
	s, ok := d.text(n, where)
	if !ok {
		return [2]int{}
	}
	a, b, found := strings.Cut(s, ".")
	major, err := strconv.ParseUint(a, 10, 8)
	minor, err2 := strconv.ParseUint(b, 10, 8)
	if !found || err != nil || err2 != nil {
		d.problem(n, where, "must be a kernel version", `as in "6.12"`)
	}
	return [2]int{int(major), int(minor)}
}

// addBaseline adds the built-in entries whose names the policy does not have.
func (d *document) addBaseline(n *yaml.Node) {
	b := &Policy{}
	if n != nil && d.number(n, "baseline", 0, lastBaseline) == 1 {
		var err error
		if b, err = parseBaseline(); err != nil { // a test keeps this from happening
			d.problem(n, "baseline", err.Error(), "")
			return
		}
	}
	p := d.p
	d.mergeInterpreters(b.Interpreters)
	for _, r := range b.Programs {
		if _, own := d.programLine[r.Rule]; !own {
			p.Programs = append(p.Programs, r)
		}
	}
	for _, k := range b.Knobs {
		if _, own := d.knobLine[k.Name]; !own {
			p.Knobs = append(p.Knobs, k)
		}
	}
}

func parseBaseline() (*Policy, error) {
	b := &document{reader: reader{err: ParseError{Name: "baseline"}}, p: &Policy{}, baseline: true}
	if root := b.document(baseline1); root != nil {
		b.policy(root)
	}
	if err := b.failed(); err != nil {
		return nil, err
	}
	b.p.Prepare()
	return b.p, nil
}
