package notify

import (
	"fmt"
	"io"
	"net"
	"net/mail"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
	"ringwall/internal/strictyaml"
)

// Bounds of a configuration.
const (
	maxConfig  = 64 << 10
	maxTargets = 32
	maxSecret  = 4096
)

// Load reads a configuration of targets. Files that it names are relative to
// it; a file with a secret must not be readable by others.
func Load(file string) ([]Target, error) {
	doc, err := readFile(file, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("notify: %w", err)
	}
	return Parse(file, doc)
}

// Parse is Load for a document that was read already.
func Parse(file string, doc []byte) ([]Target, error) {
	c := config{
		Reader: strictyaml.NewReader(file, strictyaml.Limits{What: "list of targets", Bytes: maxConfig, Parts: 10_000, Depth: 6}),
		dir:    filepath.Dir(file),
	}
	if root := c.Root(doc); root != nil {
		c.read(root)
	}
	if err := c.Err(); err != nil {
		return nil, err
	}
	return c.targets, nil
}

type config struct {
	strictyaml.Reader
	dir     string
	targets []Target
}

func (c *config) read(n *yaml.Node) {
	each := func(read func(n *yaml.Node, at string)) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) { c.NotEmpty(n, at); c.List(n, at, maxTargets, read) }
	}
	c.Mapping(n, "", []strictyaml.Field{
		strictyaml.Required("version", func(n *yaml.Node, at string) { c.Number(n, at, 1, 1) }),
		strictyaml.Optional("webhooks", each(c.webhook)),
		strictyaml.Optional("mail", each(c.mail)),
		strictyaml.Optional("commands", each(c.command)),
		strictyaml.Optional("alertmanagers", each(c.alertmanager)),
		strictyaml.Optional("pagerduty", each(c.pagerduty)),
	})
	if len(c.targets) == 0 {
		c.Problem(n, "", "names no target", "add webhooks, mail, commands, alertmanagers or pagerduty")
	}
}

func (c *config) text(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, at string) { *to, _ = c.Text(n, at) }
}

// secret reads the first line of a file.
func (c *config) secret(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, at string) {
		name, ok := c.Text(n, at)
		if !ok {
			return
		}
		if !filepath.IsAbs(name) {
			name = filepath.Join(c.dir, name)
		}
		s, err := readSecret(name)
		if err != nil {
			c.Problem(n, at, err.Error(), "")
		}
		*to = s
	}
}

func (c *config) webhook(n *yaml.Node, where string) {
	w := &webhook{}
	wants := wanted{updates: true}
	var secretURL string
	c.Mapping(n, where, []strictyaml.Field{
		strictyaml.Optional("url", c.text(&w.url)),
		strictyaml.Optional("url_file", c.secret(&secretURL)),
		strictyaml.Optional("token_file", c.secret(&w.token)),
		strictyaml.Optional("level", c.level(&wants)),
		strictyaml.Optional("updates", c.updates(&wants)),
	})
	if (w.url == "") == (secretURL == "") {
		c.Problem(n, where, "needs url or url_file, one of them", "use url_file where the address itself is a secret")
		return
	}
	w.url += secretURL
	host, ok := c.address(n, where, w.url)
	if !ok {
		return
	}
	w.name = "webhook " + host // the path may be a secret
	c.add(w, wants)
}

// address checks a URL that secrets are sent to, and returns its scheme and host.
func (c *config) address(n *yaml.Node, where, s string) (host string, ok bool) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil || u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname())) {
		c.Problem(n, where, "its address is not https://host/path without a password", "http is for 127.0.0.1 and [::1] only; put a token into token_file")
		return "", false
	}
	return u.Scheme + "://" + u.Host, true
}

func (c *config) level(w *wanted) func(*yaml.Node, string) {
	return func(n *yaml.Node, at string) { w.level = int(c.Number(n, at, 0, 20)) } //nolint:gosec // bounded
}

func (c *config) updates(w *wanted) func(*yaml.Node, string) {
	return func(n *yaml.Node, at string) { w.updates = c.Word(n, at, []string{"all", "pages"}) == "all" }
}

// add adds a target with what it wants of alerts.
func (c *config) add(t Target, w wanted) {
	w.Target = t
	c.targets = append(c.targets, &w)
}

func (c *config) alertmanager(n *yaml.Node, where string) {
	a := &alertmanager{}
	c.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("url", c.text(&a.url)),
		strictyaml.Optional("token_file", c.secret(&a.token)),
	})
	if host, ok := c.address(n, where, a.url); ok {
		a.name = "alertmanager " + host
		c.targets = append(c.targets, a)
	}
}

func (c *config) pagerduty(n *yaml.Node, where string) {
	p := &pagerduty{poster: poster{url: pagerdutyURL}}
	wants := wanted{}
	c.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("key_file", c.secret(&p.key)),
		strictyaml.Optional("url", c.text(&p.url)),
		strictyaml.Optional("level", c.level(&wants)),
	})
	if host, ok := c.address(n, where, p.url); ok {
		p.name = "pagerduty " + host
		c.add(p, wants)
	}
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

func (c *config) mail(n *yaml.Node, where string) {
	m := &mailer{}
	wants := wanted{}
	c.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("server", c.text(&m.server)),
		strictyaml.Required("from", c.text(&m.from)),
		strictyaml.Optional("to", func(n *yaml.Node, at string) { m.to = c.Texts(n, at, 100, checkAddress) }),
		strictyaml.Optional("tls", func(n *yaml.Node, at string) {
			m.tls = c.Word(n, at, []string{tlsStart, tlsImplicit, tlsNone})
		}),
		strictyaml.Optional("username", c.text(&m.username)),
		strictyaml.Optional("password_file", c.secret(&m.password)),
		strictyaml.Optional("level", c.level(&wants)),
		strictyaml.Optional("updates", c.updates(&wants)),
	})
	if m.tls == "" {
		m.tls = tlsStart
	}
	host, _, err := net.SplitHostPort(m.server)
	switch bad, fix := checkAddress(m.from); {
	case err != nil || host == "":
		c.Problem(n, where, "server must be host:port", "such as mail.example:587")
	case bad != "":
		c.Problem(n, where, "from: "+bad, fix)
	case m.tls == tlsNone && !loopback(host):
		c.Problem(n, where, "tls: none is for a server on this machine only", "use starttls, or implicit for port 465")
	case (m.username == "") != (m.password == ""):
		c.Problem(n, where, "username and password_file belong together", "")
	case m.password != "" && m.tls == tlsNone:
		c.Problem(n, where, "a password needs TLS", "")
	default:
		m.host, m.name = host, "mail "+m.server
		c.add(m, wants)
	}
}

// checkAddress says what is wrong with a mail address.
func checkAddress(s string) (problem, fix string) {
	a, err := mail.ParseAddress(s)
	if err != nil || a.Address != s {
		return "`" + strictyaml.Clip(s) + "` is no mail address", "write it as name@host"
	}
	return "", ""
}

func (c *config) command(n *yaml.Node, where string) {
	var words []string
	c.List(n, where, 64, func(n *yaml.Node, at string) {
		s, _ := c.Text(n, at)
		words = append(words, s)
	})
	switch {
	case len(words) == 0:
		c.Problem(n, where, "is empty", "write it as [/path/to/program, argument]")
	case !filepath.IsAbs(words[0]):
		c.Problem(n, where, "`"+strictyaml.Clip(words[0])+"` is no absolute path", "PATH is not searched")
	default:
		c.targets = append(c.targets, &command{argv: words})
	}
}

func readFile(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes: %w", name, limit, errs.Invalid)
	}
	return b, nil
}

// readSecret returns the first line of a file that only its owner may read.
func readSecret(name string) (string, error) {
	st, err := os.Stat(name)
	if err != nil {
		return "", err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s has mode %04o, so others can read the secret: chmod 600 it: %w", name, st.Mode().Perm(), errs.Denied)
	}
	b, err := readFile(name, maxSecret)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	if line = strings.TrimRight(line, "\r"); line == "" {
		return "", fmt.Errorf("%s is empty: %w", name, errs.Invalid)
	}
	return line, nil
}
