package main

import (
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/httpapi"
	"ringwall/internal/pki"
	"ringwall/internal/syslog"
	"ringwall/internal/transparency"
)

// auditOptions say where a server's audit log goes beside its database.
type auditOptions struct {
	dir          string // of the published log
	syslog       []string
	syslogCA     string
	syslogFormat string
}

func (o *auditOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.dir, "audit-log", "", "publish the audit log's hashes in `DIR`, with signed checkpoints (default: DATA/audit-log)")
	f.StringArrayVar(&o.syslog, "syslog", nil, "send audit records, checkpoints and incidents to `URL`: udp://, tcp:// or tls://HOST:PORT, unix:///dev/log; repeat")
	f.StringVar(&o.syslogCA, "syslog-ca", "", "who certifies the receivers of tls:// (`FILE`; default: the system's authorities)")
	f.StringVar(&o.syslogFormat, "syslog-format", "json", "records as `FORMAT`: json (as audit export has them) or ocsf")
}

// auditKey opens the key that signs the checkpoints of a server's audit log. It
// is made at the first start, with the log's name, which stays.
func auditKey(dir string, names []string) (pki.LogKey, crypto.Signer, error) {
	signer, err := (&pki.AuthorityOptions{}).SaveKey(dir, "audit-log")
	if err != nil {
		return pki.LogKey{}, nil, err
	}
	file := filepath.Join(dir, "audit-log.pub")
	line, err := readLine(file)
	if errors.Is(err, fs.ErrNotExist) {
		line, err = newAuditOrigin(signer, names)
		if err == nil {
			err = host.WriteFile(file, []byte(line+"\n"), 0o644)
		}
	}
	if err != nil {
		return pki.LogKey{}, nil, err
	}
	k, err := pki.ParseLogKey(line)
	if err != nil {
		return pki.LogKey{}, nil, fmt.Errorf("%s: %w", file, err)
	}
	if !k.Key.Equal(signer.Public()) {
		return pki.LogKey{}, nil, fmt.Errorf("%s is not of audit-log.key: %w", file, errs.Invalid)
	}
	return *k, signer, nil
}

// newAuditOrigin is the public key with the log's name: after the server's first
// name, or its machine's.
func newAuditOrigin(signer crypto.Signer, names []string) (string, error) {
	name, _ := os.Hostname()
	for _, n := range names {
		if net.ParseIP(n) == nil {
			name = n
			break
		}
	}
	for _, origin := range []string{"audit." + strings.ToLower(name), "audit.ringwall.internal"} {
		line, err := pki.FormatLogKey(origin, signer.Public())
		if err == nil {
			return line, nil
		}
	}
	return "", fmt.Errorf("the audit log's key: %w", errs.Invalid)
}

// addAudit publishes the audit log and sends it on.
func (p *serverParts) addAudit(o *auditOptions, data string, names []string) error {
	key, signer, err := auditKey(data, names)
	if err != nil {
		return err
	}
	dir := o.dir
	if dir == "" {
		dir = filepath.Join(data, "audit-log")
	}
	senders, err := o.senders()
	if err != nil {
		return err
	}
	var newest newestCheckpoint
	if note, err := os.ReadFile(filepath.Join(dir, "checkpoint")); err == nil {
		newest.note = note
	}
	id := key.ID()
	name := "audit-log " + hex.EncodeToString(id[:8])
	published := &control.Publisher{
		Outbox: p.store, Name: name, Log: p.log,
		Open: func(ctx context.Context, seen pki.Frontier) (control.Sequence, error) {
			return transparency.OpenSequence(ctx, dir, key, signer, seen)
		},
		Published: newest.set,
	}
	p.metrics.outbox(name)
	p.loop(func(ctx context.Context) { _ = published.Run(ctx) })
	for _, s := range senders {
		wake := newest.wake()
		p.loop(func(ctx context.Context) { s.checkpoints(ctx, &newest, wake, p.log) })
		p.metrics.outbox(s.name)
		p.collectors = append(p.collectors, &incidentCollector{s.name, s.to})
		p.lead(s.name, func(ctx context.Context, _ control.Fence) error {
			return (&control.Forwarder{Outbox: p.store, Name: s.name, Send: s.records, Log: p.log}).Run(ctx)
		})
	}
	p.routes = append(p.routes, httpapi.Route{
		Method: http.MethodGet, Path: "/ringwall/audit/checkpoint",
		Summary: "The newest signed checkpoint of the published audit log", Answer: signedAudit{},
		Serve: func(w http.ResponseWriter, r *http.Request, by control.Actor) error {
			if _, err := p.door.Audit(r.Context(), by, 0, 1); err != nil { // who may read the log
				return err
			}
			_, note := newest.get()
			if note == nil {
				return fmt.Errorf("nothing was published yet: %w", errs.NotFound)
			}
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			return json.NewEncoder(w).Encode(signedAudit{Key: key.String(), Checkpoint: string(note)})
		},
	})
	return nil
}

// newestCheckpoint is the newest of the published log, and who waits for it.
type newestCheckpoint struct {
	mu    sync.Mutex
	last  audit.Checkpoint // zero for one that was published before this start
	note  []byte
	wakes []chan struct{}
}

func (n *newestCheckpoint) get() (audit.Checkpoint, []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last, n.note
}

// wake returns what is signalled after each set.
func (n *newestCheckpoint) wake() <-chan struct{} {
	c := make(chan struct{}, 1)
	n.wakes = append(n.wakes, c)
	return c
}

// set implements control.Publisher.Published. Nobody who waits can hold it up.
func (n *newestCheckpoint) set(last audit.Checkpoint, note []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last, n.note = last, note
	for _, c := range n.wakes {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// signedAudit is what a server says of its published audit log.
type signedAudit struct {
	Key        string `json:"key"`        // as in audit-log.pub
	Checkpoint string `json:"checkpoint"` // C2SP tlog-checkpoint
}

// auditSender sends to one receiver.
type auditSender struct {
	name string
	to   *syslog.Sender
	ocsf bool
}

func (o *auditOptions) senders() ([]*auditSender, error) {
	if o.syslogFormat != "json" && o.syslogFormat != "ocsf" {
		return nil, usage(fmt.Errorf("--syslog-format %q: want json or ocsf", o.syslogFormat))
	}
	var ca []byte
	if o.syslogCA != "" {
		var err error
		if ca, err = readBounded(o.syslogCA, 1<<20); err != nil {
			return nil, err
		}
	}
	var out []*auditSender
	for _, url := range o.syslog {
		to, err := syslog.Open(url, ca)
		if err != nil {
			return nil, err
		}
		out = append(out, &auditSender{name: "syslog " + url, to: to, ocsf: o.syslogFormat == "ocsf"})
	}
	return out, nil
}

const checkpointRetry = 5 * time.Second

// checkpoints sends each new checkpoint until ctx ends. While the receiver is
// away only the newest waits: it stands for those before.
func (s *auditSender) checkpoints(ctx context.Context, newest *newestCheckpoint, wake <-chan struct{}, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		}
		for {
			last, note := newest.get()
			err := s.to.Send(ctx, syslog.Checkpoint(last, note, time.Now()))
			if err == nil {
				break
			}
			log.WarnContext(ctx, "checkpoint_not_sent", slog.String("to", s.name), slog.Any("error", err))
			select {
			case <-ctx.Done():
				return
			case <-time.After(checkpointRetry):
			}
		}
	}
}

func (s *auditSender) records(ctx context.Context, records []audit.Record) error {
	out := make([]syslog.Message, 0, len(records))
	for i := range records {
		m, err := syslog.Record(&records[i], s.ocsf)
		if err != nil {
			return err
		}
		out = append(out, m)
	}
	return s.to.Send(ctx, out...)
}
