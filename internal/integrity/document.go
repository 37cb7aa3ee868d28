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
	"ringwall/internal/strictyaml"
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
// anything out of bounds are refused, and the *strictyaml.Error lists every problem
// with its place. docs/design/policy.md describes the format.
func ParseNamed(name string, doc []byte) (*Policy, error) {
	d := &document{Reader: strictyaml.NewReader(name, limits()), p: &Policy{Digest: sha256.Sum256(doc)}}
	if root := d.Root(doc); root != nil {
		d.policy(root)
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	d.p.Prepare()
	return d.p, nil
}

// document reads one policy.
type document struct {
	strictyaml.Reader
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
	fields := []strictyaml.Field{
		strictyaml.Required("version", func(n *yaml.Node, where string) { d.Number(n, where, 1, 1) }),
		strictyaml.Required("name", func(n *yaml.Node, where string) { p.Name = d.label(n, where) }),
		strictyaml.Required("epoch", func(n *yaml.Node, where string) { p.Epoch = d.Number(n, where, 1, 1<<62) }),
		strictyaml.Optional("supplements", func(n *yaml.Node, where string) { p.Supplements = d.label(n, where) }),
		strictyaml.Optional("baseline", keep(&baseline)),
		strictyaml.Optional("mode", keep(&mode)),
		strictyaml.Optional("modes", keep(&modes)),
		strictyaml.Optional("trust", keep(&trust)),
		strictyaml.Optional("allow", later(func(n *yaml.Node, where string) { d.List(n, where, maxRules, d.allowRule) })),
		strictyaml.Optional("deny", later(func(n *yaml.Node, where string) { d.List(n, where, maxRules, d.denyRule) })),
		strictyaml.Optional("exceptions", later(func(n *yaml.Node, where string) { d.List(n, where, maxRules, d.exception) })),
		strictyaml.Optional("programs", func(n *yaml.Node, where string) { d.List(n, where, maxRules, d.program) }),
		strictyaml.Optional("interpreters", func(n *yaml.Node, where string) { d.List(n, where, maxRules, d.interpreter) }),
		strictyaml.Optional("knobs", func(n *yaml.Node, where string) { d.List(n, where, maxRules, d.knob) }),
	}
	if d.baseline {
		fields = slices.DeleteFunc(fields, func(f strictyaml.Field) bool {
			return !slices.Contains([]string{"version", "programs", "interpreters", "knobs"}, f.Key())
		})
		d.Mapping(n, "", fields)
		d.mergeInterpreters(nil)
		return
	}
	d.Mapping(n, "", fields)
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
		d.Problem(n, "", "lacks mode", "add `mode: audit` to begin with")
	}
	d.modes(mode, modes)
	d.addBaseline(baseline)
}

// onlyAllows refuses in a supplement what only a base policy may say.
func (d *document) onlyAllows(n *yaml.Node) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		switch k := n.Content[i]; k.Value {
		case "baseline", "mode", "modes", "trust", "deny", "programs", "interpreters", "knobs":
			d.Problem(k, k.Value, "a supplement may only hold allow and exceptions", "move it to policy "+d.p.Supplements)
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
	s, ok := d.Text(n, where)
	if ok && !isLabel(s) {
		d.Problem(n, where, "`"+strictyaml.Clip(s)+"` is no name", "use up to 63 lower-case letters, digits, dots, dashes and underscores")
		return ""
	}
	return s
}

// product reads a product's name, in the form that release records have.
func (d *document) product(n *yaml.Node, where string) string {
	s, ok := d.Text(n, where)
	if ok && (len(s) > 64 || strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '+' && c != '-' && c != '.'
	})) {
		d.Problem(n, where, "`"+strictyaml.Clip(s)+"` is no product", "use the name in the release record: up to 64 of a-z, digits, + - .")
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
		d.Problem(n, where, fmt.Sprintf("`%s` is taken, in line %d", s, line), "choose another name")
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
		all = parseMode(d.Word(mode, "mode", []string{"audit", "enforce"}))
	}
	to := p.Process.modes()
	for _, k := range Kinds() {
		to[k.String()] = &p.Modes[k]
	}
	var fields []strictyaml.Field
	for _, key := range slices.Sorted(maps.Keys(to)) {
		*to[key] = all
		fields = append(fields, strictyaml.Optional(key, func(n *yaml.Node, where string) {
			*to[key] = parseMode(d.Word(n, where, []string{"off", "audit", "enforce"}))
		}))
	}
	if modes != nil {
		d.Mapping(modes, "modes", fields)
	}
}

func (d *document) trust(n *yaml.Node) {
	t := &d.p.Trust
	taken := map[string]int{}
	name := func(to *string) strictyaml.Field {
		return strictyaml.Required("name", func(n *yaml.Node, where string) {
			s, ok := d.Text(n, where)
			if line, dup := taken[s]; ok && dup {
				d.Problem(n, where, fmt.Sprintf("`%s` is taken, in line %d", strictyaml.Clip(s), line), "choose another name")
			}
			taken[s] = n.Line
			*to = s
		})
	}
	d.Mapping(n, "trust", []strictyaml.Field{
		strictyaml.Optional("authorities", func(n *yaml.Node, where string) {
			d.List(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a Authority
				d.Mapping(n, where, []strictyaml.Field{
					name(&a.Name),
					strictyaml.Required("signs", func(n *yaml.Node, where string) {
						a.Signs = d.Texts(n, where, 5, func(s string) (string, string) {
							if !slices.Contains(signs(), s) {
								return "`" + strictyaml.Clip(s) + "` must be one of " + strings.Join(signs(), ", "), strictyaml.Suggest(s, signs())
							}
							return "", ""
						})
						d.NotEmpty(n, where)
					}),
					strictyaml.Required("certificate", func(n *yaml.Node, where string) {
						c, err := pki.DecodeCertificate([]byte(n.Value))
						if n.Kind != yaml.ScalarNode || err != nil {
							d.Problem(n, where, "must be a PEM certificate", "paste the file, indented, after `certificate: |`")
							return
						}
						if !c.IsCA {
							d.Problem(n, where, "is not a CA's certificate", "use the certificate of the CA that issues signing certificates")
						}
						a.Certificate = c
					}),
				})
				t.Authorities = append(t.Authorities, a)
			})
		}),
		strictyaml.Optional("timestamps", func(n *yaml.Node, where string) {
			d.List(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a Timestamp
				d.Mapping(n, where, []strictyaml.Field{name(&a.Name), strictyaml.Required("certificate", func(n *yaml.Node, where string) {
					c, err := pki.DecodeCertificate([]byte(n.Value))
					if n.Kind != yaml.ScalarNode || err != nil {
						d.Problem(n, where, "must be a PEM certificate", "paste the file, indented, after `certificate: |`")
						return
					}
					a.Certificate = c
				})})
				t.Timestamps = append(t.Timestamps, a)
			})
		}),
		strictyaml.Optional("logs", func(n *yaml.Node, where string) {
			d.List(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a pki.LogAnchor
				d.Mapping(n, where, []strictyaml.Field{name(&a.Name), strictyaml.Required("key", func(n *yaml.Node, where string) {
					k, err := pki.ParseLogKey(n.Value)
					if n.Kind != yaml.ScalarNode || err != nil {
						d.Problem(n, where, "must be a log's key, such as log.fleet.example+1a2b3c4d+AjBZ…", "paste the line in the log's .pub file")
						return
					}
					a.LogKey = *k
				})})
				t.Logs = append(t.Logs, a)
			})
		}),
		strictyaml.Optional("archives", func(n *yaml.Node, where string) {
			d.List(n, where, maxAnchors, func(n *yaml.Node, where string) {
				var a Archive
				d.Mapping(n, where, []strictyaml.Field{
					name(&a.Name),
					strictyaml.Optional("origins", func(n *yaml.Node, where string) { a.Origins = d.Texts(n, where, maxAnchors, nil) }),
					strictyaml.Required("keyring", func(n *yaml.Node, where string) { a.Keyring = d.keyring(n, where) }),
				})
				t.Archives = append(t.Archives, a)
			})
		}),
	})
}

func signs() []string { return []string{"build", "breakglass", "policy", "permit", "supplement"} }

// keyring takes an armoured keyring as it is and a binary one in base64. What
// keys it holds is for package codesign to say.
func (d *document) keyring(n *yaml.Node, where string) []byte {
	const begin = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
	fix := "paste /usr/share/keyrings/debian-archive-keyring.gpg as `base64` prints it, or an armoured key, indented, after `keyring: |`"
	if n.Kind != yaml.ScalarNode || len(n.Value) > maxKeyring {
		d.Problem(n, where, fmt.Sprintf("must be a keyring of at most %d bytes", maxKeyring), fix)
		return nil
	}
	s := strings.TrimSpace(n.Value)
	if strings.HasPrefix(s, begin) {
		return []byte(s + "\n")
	}
	b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil || len(b) < 16 || b[0]&0x80 == 0 { // every OpenPGP packet starts with this bit (RFC 9580, 4.2)
		d.Problem(n, where, "is no keyring of public keys", fix)
		return nil
	}
	return b
}

// indicators are the fields that say what a rule is about.
func (d *document) indicators(r *AllowRule, seen *[]string) []strictyaml.Field {
	note := func(key string, read func(*yaml.Node, string)) strictyaml.Field {
		return strictyaml.Optional(key, func(n *yaml.Node, where string) {
			*seen = append(*seen, key)
			read(n, where)
		})
	}
	return []strictyaml.Field{
		strictyaml.Optional("kinds", func(n *yaml.Node, where string) { r.Kinds = d.kinds(n, where) }),
		note("signer", func(n *yaml.Node, where string) { r.Signer = d.signer(n, where) }),
		note("package", func(n *yaml.Node, where string) { r.Package = d.packages(n, where) }),
		note("release", func(n *yaml.Node, where string) { r.Releases = d.digests(n, where) }),
		note("sha256", func(n *yaml.Node, where string) { r.SHA256 = d.digests(n, where) }),
		note("fsverity", func(n *yaml.Node, where string) { r.FSVerity = d.digests(n, where) }),
		note("dmverity", func(n *yaml.Node, where string) { r.DMVerity = d.digests(n, where) }),
	}
}

func (d *document) name(to *string, taken map[string]int) strictyaml.Field {
	return strictyaml.Required("rule", func(n *yaml.Node, where string) { *to = d.unique(n, where, taken) })
}

func (d *document) reason(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, where string) { *to, _ = d.Text(n, where) }
}

func (d *document) allowRule(n *yaml.Node, where string) {
	var r AllowRule
	var seen []string
	d.Mapping(n, where, append(d.indicators(&r, &seen), d.name(&r.Rule, d.ruleLine), strictyaml.Optional("reason", d.reason(&r.Reason))))
	d.oneIndicator(n, where, seen)
	d.p.Allow = append(d.p.Allow, r)
}

func (d *document) exception(n *yaml.Node, where string) {
	var r AllowRule
	var seen []string
	d.Mapping(n, where, append(d.indicators(&r, &seen), d.name(&r.Rule, d.ruleLine), strictyaml.Required("reason", d.reason(&r.Reason)),
		strictyaml.Required("until", func(n *yaml.Node, where string) { r.Until = d.Time(n, where) })))
	d.oneIndicator(n, where, seen)
	d.p.Allow = append(d.p.Allow, r)
}

func (d *document) oneIndicator(n *yaml.Node, where string, seen []string) {
	const which = "signer, package, release, sha256, fsverity, dmverity"
	switch {
	case n.Kind != yaml.MappingNode:
	case len(seen) == 0:
		d.Problem(n, where, "says nothing about what it allows", "add one of "+which)
	case len(seen) > 1:
		d.Problem(n, where, "has "+strings.Join(seen, " and "), "one indicator a rule: make it "+strconv.Itoa(len(seen))+" rules")
	}
}

func (d *document) kinds(n *yaml.Node, where string) KindSet {
	var out KindSet
	names := kindNames[KindExec:KindBPF]
	d.List(n, where, len(names), func(n *yaml.Node, where string) {
		if n.Value == KindBPF.String() {
			d.Problem(n, where, "no rule authorises bpf", "name the program under programs, with `may: [bpf]`")
			return
		}
		if k, err := ParseKind(d.Word(n, where, names)); err == nil {
			if out.Has(k) {
				d.Problem(n, where, "repeated", "remove one of the two")
			}
			out |= SetOf(k)
		}
	})
	d.NotEmpty(n, where)
	return out
}

func (d *document) signer(n *yaml.Node, where string) *Signer {
	s := &Signer{}
	var at *yaml.Node
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("authority", func(n *yaml.Node, where string) {
			s.Authority, _ = d.Text(n, where)
			if d.p.Supplements == "" && s.Authority != "" {
				d.authority(n, where, s.Authority)
			}
		}),
		strictyaml.Optional("identity", func(n *yaml.Node, where string) {
			v, ok := d.Text(n, where)
			if u, err := url.Parse(v); ok && (err != nil || u.Scheme == "" || u.Host == "" || u.String() != v) {
				d.Problem(n, where, "`"+strictyaml.Clip(v)+"` is no URI", "as it stands in the certificate, such as spiffe://fleet.example/build/main")
			}
			s.Identity = v
		}),
		strictyaml.Optional("product", func(n *yaml.Node, where string) { s.Product = d.product(n, where) }),
		strictyaml.Optional("min_epoch", func(n *yaml.Node, where string) {
			at = n
			s.MinEpoch = uint32(d.Number(n, where, 1, 1<<32-1)) //nolint:gosec // bounded
		}),
	})
	if at != nil && s.Product == "" {
		d.Problem(at, where+".min_epoch", "epochs of different products mean different things", "add `product: …`")
	}
	return s
}

// authority checks that a name is that of a trusted authority for builds, be
// they past their gates.
func (d *document) authority(n *yaml.Node, where, name string) {
	var names []string
	for i := range d.p.Trust.Authorities {
		a := &d.p.Trust.Authorities[i]
		if a.Name != name {
			names = append(names, a.Name)
			continue
		}
		if !slices.Contains(a.Signs, "build") && !slices.Contains(a.Signs, "breakglass") {
			d.Problem(n, where, "`"+strictyaml.Clip(name)+"` does not sign builds", "add build to its signs, or name another")
		}
		return
	}
	if len(names) == 0 {
		d.Problem(n, where, "`"+strictyaml.Clip(name)+"` is not trusted", "add it to trust.authorities")
		return
	}
	d.Problem(n, where, "`"+strictyaml.Clip(name)+"` is not in trust.authorities", strictyaml.Suggest(name, names))
}

func (d *document) packages(n *yaml.Node, where string) *PackageSet {
	s := &PackageSet{}
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("archive", func(n *yaml.Node, where string) {
			var ok bool
			if s.Archive, ok = d.Text(n, where); !ok || d.p.Supplements != "" {
				return
			}
			var names []string
			for i := range d.p.Trust.Archives {
				names = append(names, d.p.Trust.Archives[i].Name)
			}
			switch {
			case slices.Contains(names, s.Archive):
			case len(names) == 0:
				d.Problem(n, where, "`"+strictyaml.Clip(s.Archive)+"` is not trusted", "add it to trust.archives")
			default:
				d.Problem(n, where, "`"+strictyaml.Clip(s.Archive)+"` is not in trust.archives", strictyaml.Suggest(s.Archive, names))
			}
		}),
		strictyaml.Required("names", func(n *yaml.Node, where string) {
			s.Names = d.Texts(n, where, maxPatterns, checkPattern)
			d.NotEmpty(n, where)
		}),
	})
	return s
}

func (d *document) denyRule(n *yaml.Node, where string) {
	var r DenyRule
	d.Mapping(n, where, []strictyaml.Field{
		d.name(&r.Rule, d.ruleLine), strictyaml.Optional("reason", d.reason(&r.Reason)),
		strictyaml.Optional("sha256", func(n *yaml.Node, where string) { r.SHA256 = d.digests(n, where) }),
		strictyaml.Optional("release", func(n *yaml.Node, where string) { r.Releases = d.digests(n, where) }),
		strictyaml.Optional("package", func(n *yaml.Node, where string) { r.Package = d.packages(n, where) }),
		strictyaml.Optional("certificate", func(n *yaml.Node, where string) {
			d.List(n, where, maxRules, func(n *yaml.Node, where string) {
				var v Revocation
				d.Mapping(n, where, []strictyaml.Field{
					strictyaml.Required("sha256", func(n *yaml.Node, where string) { v.Certificate, _ = d.digest(n, where) }),
					strictyaml.Optional("from", func(n *yaml.Node, where string) { v.From = d.Time(n, where) }),
				})
				r.Certificates = append(r.Certificates, v)
			})
			d.NotEmpty(n, where)
		}),
		strictyaml.Optional("product", func(n *yaml.Node, where string) {
			d.List(n, where, maxRules, func(n *yaml.Node, where string) {
				var v Outdated
				d.Mapping(n, where, []strictyaml.Field{
					strictyaml.Required("name", func(n *yaml.Node, where string) { v.Product = d.product(n, where) }),
					strictyaml.Required("below_epoch", func(n *yaml.Node, where string) {
						v.BelowEpoch = uint32(d.Number(n, where, 1, 1<<32-1)) //nolint:gosec // bounded
					}),
				})
				r.Products = append(r.Products, v)
			})
			d.NotEmpty(n, where)
		}),
	})
	if n.Kind == yaml.MappingNode && len(r.SHA256)+len(r.Releases)+len(r.Certificates)+len(r.Products) == 0 && r.Package == nil {
		d.Problem(n, where, "says nothing about what it denies", "add one of sha256, release, package, certificate, product")
	}
	d.p.Deny = append(d.p.Deny, r)
}

func (d *document) match(n *yaml.Node, where string) Match {
	var m Match
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Optional("files", func(n *yaml.Node, where string) {
			m.Files = d.Texts(n, where, maxPatterns, func(s string) (string, string) {
				if strings.HasPrefix(s, "/") {
					return "`" + strictyaml.Clip(s) + "` starts with a slash", "names are as in the package: " + strictyaml.Clip(strings.TrimLeft(s, "/"))
				}
				return checkPattern(s)
			})
			d.NotEmpty(n, where)
		}),
		strictyaml.Optional("package", func(n *yaml.Node, where string) {
			m.Package, _ = d.Text(n, where)
			if bad, fix := checkPattern(m.Package); bad != "" {
				d.Problem(n, where, bad, fix)
			}
		}),
		strictyaml.Optional("product", func(n *yaml.Node, where string) { m.Product = d.product(n, where) }),
		strictyaml.Optional("sha256", func(n *yaml.Node, where string) { m.SHA256 = d.digests(n, where) }),
	})
	if n.Kind == yaml.MappingNode && len(n.Content) == 0 {
		d.Problem(n, where, "matches nothing", "add files, package, product or sha256")
	}
	return m
}

func roleNames() map[string]Role {
	return map[string]Role{
		"agent": RoleAgent, "jit": RoleJIT, "jit-shared": RoleJITShared, "bpf": RoleBPF, "debug": RoleDebug, "packages": RolePackages, "block": RoleBlock, "modules": RoleModules,
	}
}

// String names the roles, joined by commas; "none" if there are none.
func (r Role) String() string {
	names := roleNames()
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
	d.Mapping(n, where, []strictyaml.Field{
		d.name(&r.Rule, d.programLine),
		strictyaml.Required("match", func(n *yaml.Node, where string) { r.Match = d.match(n, where) }),
		strictyaml.Required("may", func(n *yaml.Node, where string) {
			d.List(n, where, len(words), func(n *yaml.Node, where string) { r.May |= roles[d.Word(n, where, words)] })
			d.NotEmpty(n, where)
		}),
	})
	if r.May&RoleAgent != 0 && r.Match.Product == "" && len(r.Match.SHA256) == 0 {
		d.Problem(n, where, "the agent's role to whatever has such a name", "add the product that is signed as, or sha256")
	}
	d.p.Programs = append(d.p.Programs, r)
}

func (d *document) knob(n *yaml.Node, where string) {
	var k Knob
	var sysctl, boot bool
	word := func(to *string) func(*yaml.Node, string) {
		return func(n *yaml.Node, where string) {
			s, ok := d.Text(n, where)
			if ok && strings.ContainsAny(s, " =\"'") {
				d.Problem(n, where, "`"+strictyaml.Clip(s)+"` is no name of a setting", "")
				return
			}
			if line, dup := d.knobLine[s]; ok && dup {
				d.Problem(n, where, fmt.Sprintf("`%s` is set in line %d already", strictyaml.Clip(s), line), "remove one of the two")
			}
			d.knobLine[s] = n.Line
			*to = s
		}
	}
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Optional("sysctl", func(n *yaml.Node, where string) { sysctl = true; word(&k.Name)(n, where) }),
		strictyaml.Optional("boot", func(n *yaml.Node, where string) { boot = true; word(&k.Name)(n, where) }),
		strictyaml.Required("want", func(n *yaml.Node, where string) { k.Want, _ = d.Text(n, where) }),
		strictyaml.Optional("rule", func(n *yaml.Node, where string) {
			k.Rule = d.Word(n, where, []string{"exactly", "at_least", "contains"})
		}),
		strictyaml.Optional("apply", func(n *yaml.Node, where string) {
			k.Apply = d.Boolean(n, where)
			if k.Apply && boot {
				d.Problem(n, where, "a boot parameter cannot be applied", "remove it; Ringwall reports whether it is set")
			}
		}),
		strictyaml.Optional("since", func(n *yaml.Node, where string) { k.Since = d.kernel(n, where) }),
	})
	if n.Kind == yaml.MappingNode && sysctl == boot {
		d.Problem(n, where, "must have one of sysctl and boot", "")
	}
	if k.Rule == "" {
		k.Rule = "exactly"
	}
	k.Boot = boot
	d.p.Knobs = append(d.p.Knobs, k)
}

func (d *document) kernel(n *yaml.Node, where string) [2]int {
	s, ok := d.Text(n, where)
	if !ok {
		return [2]int{}
	}
	a, b, found := strings.Cut(s, ".")
	major, err := strconv.ParseUint(a, 10, 8)
	minor, err2 := strconv.ParseUint(b, 10, 8)
	if !found || err != nil || err2 != nil {
		d.Problem(n, where, "must be a kernel version", `as in "6.12"`)
	}
	return [2]int{int(major), int(minor)}
}

// addBaseline adds the built-in entries whose names the policy does not have.
func (d *document) addBaseline(n *yaml.Node) {
	b := &Policy{}
	if n != nil && d.Number(n, "baseline", 0, lastBaseline) == 1 {
		var err error
		if b, err = parseBaseline(); err != nil { // a test keeps this from happening
			d.Problem(n, "baseline", err.Error(), "")
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
	b := &document{Reader: strictyaml.NewReader("baseline", limits()), p: &Policy{}, baseline: true}
	if root := b.Root(baseline1); root != nil {
		b.policy(root)
	}
	if err := b.Err(); err != nil {
		return nil, err
	}
	b.p.Prepare()
	return b.p, nil
}
