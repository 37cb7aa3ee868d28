package signer

import (
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/strictyaml"
)

// Config is how a Server runs. Paths are relative to the file that it is read
// from. Everything that is not said has the value given here.
type Config struct {
	Listen string // address; 127.0.0.1:8620

	Certificate string // the server's TLS certificate, PEM
	Key         string // its key, PEM
	ClientCAs   string // CAs of client certificates, PEM
	Clients     []ClientRule

	Keys           string // an authority's directory
	PassphraseFile string // of its keys; empty: none
	Identity       string // in signing certificates; empty: the authority's build/main
	TSA            string // URL of a timestamp authority; empty: the authority's own
	Log            string // directory of the transparency log; empty: none

	KernelKey            string // FILE of FILE.key and FILE.crt, for signatures that kernels check; empty: none are made
	KernelPassphraseFile string // of that key; empty: none

	Policies string   // directory of release policies
	State    string   // directory for epochs, the audit and alerts
	Notify   []string // command that is told of alerts on its standard input; empty: none

	Spool       string // directory for uploads; spool, under State
	SpoolMax    int64  // bytes in it; 16 GiB
	ArtefactMax int64  // bytes of one artefact; 4 GiB
}

// ClientRule says what one client may ask for.
type ClientRule struct {
	Name       string
	Identity   string   // the client certificate's URI
	Products   []string // or "*" for all
	Breakglass bool     // may ask for break-glass signatures
}

const (
	defaultListen   = "127.0.0.1:8620"
	defaultSpool    = 16 << 30
	defaultArtefact = 4 << 30
	maxConfigList   = 1024
)

// ParseConfig reads a configuration; dir is where its relative paths start.
// Unknown keys are refused, and the *strictyaml.Error lists every problem.
func ParseConfig(name, dir string, doc []byte) (*Config, error) {
	c := &Config{Listen: defaultListen, SpoolMax: defaultSpool, ArtefactMax: defaultArtefact}
	d := &configReader{Reader: strictyaml.NewReader(name, strictyaml.Limits{What: "configuration", Bytes: 1 << 20, Parts: 50_000, Depth: 8}), dir: dir}
	if root := d.Root(doc); root != nil {
		d.config(root, c)
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	if c.Spool == "" {
		c.Spool = filepath.Join(c.State, "spool")
	}
	return c, nil
}

type configReader struct {
	strictyaml.Reader
	dir string
}

func (d *configReader) path(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, where string) {
		if s, ok := d.Text(n, where); ok {
			if *to = s; !filepath.IsAbs(s) {
				*to = filepath.Join(d.dir, s)
			}
		}
	}
}

func (d *configReader) config(n *yaml.Node, c *Config) {
	d.Mapping(n, "", []strictyaml.Field{
		strictyaml.Required("version", func(n *yaml.Node, where string) { d.Number(n, where, 1, 1) }),
		strictyaml.Optional("listen", func(n *yaml.Node, where string) {
			s, ok := d.Text(n, where)
			host, port, err := net.SplitHostPort(s)
			if ok && (err != nil || net.ParseIP(host) == nil || port == "") {
				d.Problem(n, where, "`"+strictyaml.Clip(s)+"` is no address and port", "as in 127.0.0.1:8620")
			}
			c.Listen = s
		}),
		strictyaml.Required("tls", func(n *yaml.Node, where string) {
			d.Mapping(n, where, []strictyaml.Field{
				strictyaml.Required("certificate", d.path(&c.Certificate)),
				strictyaml.Required("key", d.path(&c.Key)),
				strictyaml.Required("client_cas", d.path(&c.ClientCAs)),
			})
		}),
		strictyaml.Required("clients", func(n *yaml.Node, where string) {
			d.List(n, where, maxConfigList, func(n *yaml.Node, where string) { d.client(n, where, c) })
			d.NotEmpty(n, where)
		}),
		strictyaml.Required("keys", d.path(&c.Keys)),
		strictyaml.Optional("passphrase_file", d.path(&c.PassphraseFile)),
		strictyaml.Optional("identity", func(n *yaml.Node, where string) { c.Identity = d.uri(n, where) }),
		strictyaml.Optional("tsa", func(n *yaml.Node, where string) { c.TSA = d.uri(n, where) }),
		strictyaml.Optional("log", d.path(&c.Log)),
		strictyaml.Optional("kernel_key", d.path(&c.KernelKey)),
		strictyaml.Optional("kernel_passphrase_file", d.path(&c.KernelPassphraseFile)),
		strictyaml.Required("policies", d.path(&c.Policies)),
		strictyaml.Required("state", d.path(&c.State)),
		strictyaml.Optional("notify", func(n *yaml.Node, where string) {
			d.List(n, where, 64, func(n *yaml.Node, where string) {
				if s, ok := d.Text(n, where); ok {
					c.Notify = append(c.Notify, s)
				}
			})
			d.NotEmpty(n, where)
		}),
		strictyaml.Optional("spool", d.path(&c.Spool)),
		strictyaml.Optional("spool_max_mib", func(n *yaml.Node, where string) { c.SpoolMax = d.mib(n, where) }),
		strictyaml.Optional("artefact_max_mib", func(n *yaml.Node, where string) { c.ArtefactMax = d.mib(n, where) }),
	})
}

func (d *configReader) mib(n *yaml.Node, where string) int64 {
	return int64(d.Number(n, where, 1, 1<<30)) << 20 //nolint:gosec // bounded
}

func (d *configReader) uri(n *yaml.Node, where string) string {
	s, ok := d.Text(n, where)
	if u, err := url.Parse(s); ok && (err != nil || u.Scheme == "" || u.Host == "") {
		d.Problem(n, where, "`"+strictyaml.Clip(s)+"` is no URI with a host", "as in spiffe://fleet.example/ci/edged")
	}
	return s
}

func (d *configReader) client(n *yaml.Node, where string, c *Config) {
	var r ClientRule
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("name", func(n *yaml.Node, where string) { r.Name, _ = d.Text(n, where) }),
		strictyaml.Required("identity", func(n *yaml.Node, where string) {
			r.Identity = d.uri(n, where)
			if i := slices.IndexFunc(c.Clients, func(o ClientRule) bool { return o.Identity == r.Identity }); i >= 0 {
				d.Problem(n, where, "client "+strconv.Itoa(i)+" has this identity already", "one entry a client")
			}
		}),
		strictyaml.Required("products", func(n *yaml.Node, where string) {
			r.Products = d.Texts(n, where, maxConfigList, nil)
			d.NotEmpty(n, where)
		}),
		strictyaml.Optional("breakglass", func(n *yaml.Node, where string) { r.Breakglass = d.Boolean(n, where) }),
	})
	c.Clients = append(c.Clients, r)
}

// LoadConfig reads a configuration file.
func LoadConfig(file string) (*Config, error) {
	doc, err := readFile(file, 1<<20)
	if err != nil {
		return nil, fmt.Errorf("signer configuration: %w", err)
	}
	return ParseConfig(file, filepath.Dir(file), doc)
}
