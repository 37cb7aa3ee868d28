package control_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/store"
	"ringwall/internal/transparency"
)

// press is a database whose audit log is published in a directory.
type press struct {
	t     testing.TB
	dir   string // of both
	key   pki.LogKey
	priv  *ecdsa.PrivateKey
	store *store.Store
}

const pressOrigin = "audit.fleet.example"

func newPress(t testing.TB) *press {
	t.Helper()
	dir := t.TempDir()
	if _, _, err := pki.SaveLog(dir, pressOrigin, pki.AuthorityOptions{Name: "x", Now: time.Now}); err != nil {
		t.Fatal(err)
	}
	return openPress(t, dir)
}

func openPress(t testing.TB, dir string) *press {
	t.Helper()
	k, err := pki.ReadKey(filepath.Join(dir, "log.key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	p := &press{t: t, dir: dir, key: pki.LogKey{Origin: pressOrigin, Key: &k.PublicKey}, priv: k}
	if p.store, err = store.Open(t.Context(), "sqlite:"+dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.store.Close() })
	return p
}

func (p *press) tiles() string { return filepath.Join(p.dir, "log") }

func (p *press) publisher() (*control.Publisher, *bytes.Buffer) {
	var said bytes.Buffer
	return &control.Publisher{
		Outbox: p.store, Name: "log",
		Open: func(ctx context.Context, seen pki.Frontier) (control.Sequence, error) {
			return transparency.OpenSequence(ctx, p.tiles(), p.key, p.priv, seen)
		},
		Log:       slog.New(slog.NewTextHandler(&said, nil)),
		Published: func(audit.Checkpoint, []byte) {},
	}, &said
}

// run publishes until the outbox has come to a record; what was logged is returned.
func (p *press) run(until uint64, limit time.Duration) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), limit)
	defer cancel()
	pub, said := p.publisher()
	var wg sync.WaitGroup
	wg.Go(func() { _ = pub.Run(ctx) })
	for ctx.Err() == nil {
		if n, _, err := p.store.Outbox(ctx, "log"); err == nil && n >= until {
			cancel()
		}
		time.Sleep(10 * time.Millisecond)
	}
	wg.Wait()
	return said.String()
}

func (p *press) write(n int) {
	p.t.Helper()
	for i := range n {
		err := p.store.Write(p.t.Context(), func(tx *store.Tx) error {
			return tx.AppendAudit(p.t.Context(), &audit.Record{Actor: "ana", Action: "x/write", Target: fmt.Sprint(os.Getpid(), i), Outcome: audit.Done})
		})
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

func (p *press) export() []byte {
	p.t.Helper()
	rs, err := p.store.AuditAfter(p.t.Context(), 0, 100_000)
	if err != nil {
		p.t.Fatal(err)
	}
	var b bytes.Buffer
	for i := range rs {
		line, err := json.Marshal(&rs[i])
		if err != nil {
			p.t.Fatal(err)
		}
		b.Write(append(line, '\n'))
	}
	return b.Bytes()
}

// agrees verifies the tiles and the chain against one another; it returns how
// many records are published.
func (p *press) agrees() uint64 {
	p.t.Helper()
	r := transparency.NewReader(transparency.Dir(p.tiles()), p.key)
	c, _, err := r.Checkpoint(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	if err := r.Verify(p.t.Context(), c); err != nil {
		p.t.Fatal(err)
	}
	rep, err := audit.VerifySigned(bytes.NewReader(p.export()), []pki.Checkpoint{*c})
	if err != nil {
		p.t.Fatal(err)
	}
	return rep.Signed
}

func TestPublisher(t *testing.T) {
	t.Parallel()
	p := newPress(t)
	p.write(1100) // more than a page
	if said := p.run(1100, 20*time.Second); said != "" || p.agrees() != 1100 {
		t.Fatalf("%d published: %s", p.agrees(), said)
	}
	p.write(5)
	if said := p.run(1105, 20*time.Second); said != "" || p.agrees() != 1105 {
		t.Fatalf("%d published after a restart: %s", p.agrees(), said)
	}
	// A database that forgot how far it was, such as one restored from a copy.
	p.sql("DELETE FROM outbox")
	p.write(2)
	if said := p.run(1107, 20*time.Second); said != "" || p.agrees() != 1107 {
		t.Errorf("%d published after the outbox was lost: %s", p.agrees(), said)
	}
}

func (p *press) sql(text string) {
	p.t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(p.dir, "control.db")+"?_pragma=busy_timeout(5000)")
	if err != nil {
		p.t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(text); err != nil {
		p.t.Fatal(err)
	}
}

// Whatever does not agree is told and not published over.
func TestPublisher_disagrees(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		harm func(p *press)
		want string
	}{
		"record edited before it was published":  {func(p *press) { p.write(1); p.sql("UPDATE audit SET actor = 'bob' WHERE seq = 11") }, "record 11 was changed"},
		"record dropped before it was published": {func(p *press) { p.write(2); p.sql("DELETE FROM audit WHERE seq = 11") }, "records 11 to 11 are missing"},
		"end of the chain cut off":               {func(p *press) { p.sql("DELETE FROM audit WHERE seq = 10") }, "record 10 was published and is gone"},
		"end cut off, and the outbox with it":    {func(p *press) { p.sql("DELETE FROM outbox"); p.sql("DELETE FROM audit WHERE seq = 10") }, "1 more were published: the database lost them"},
		"written anew": {func(p *press) {
			p.sql("DELETE FROM outbox")
			p.sql("DELETE FROM audit WHERE seq > 8")
			p.write(3)
		}, "are not the 11 that were handed in"},
		"log gone": {func(p *press) {
			if err := os.RemoveAll(p.tiles()); err != nil {
				p.t.Fatal(err)
			}
			p.write(1)
		}, "10 entries were in it: there is no log"},
		"log of another key": {func(p *press) {
			k, err := pki.NewKey()
			if err != nil {
				p.t.Fatal(err)
			}
			p.priv, p.key.Key = k, &k.PublicKey
			p.write(1)
		}, "not trusted"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPress(t)
			p.write(10)
			p.run(10, 20*time.Second)
			tc.harm(p)
			said := p.run(1<<62, 2*time.Second)
			if !strings.Contains(said, "level=ERROR msg=audit_log_does_not_agree") || !strings.Contains(said, tc.want) {
				t.Errorf("%s, want %q", said, tc.want)
			}
		})
	}
}

// Of two processes one writes the log; the other waits and says nothing.
func TestPublisher_two(t *testing.T) {
	t.Parallel()
	p := newPress(t)
	held, err := transparency.OpenSequence(t.Context(), p.tiles(), p.key, p.priv, pki.Frontier{})
	if err != nil {
		t.Fatal(err)
	}
	p.write(1)
	if said := p.run(1, time.Second); said != "" {
		t.Errorf("%s", said)
	}
	if _, err := transparency.OpenSequence(t.Context(), p.tiles(), p.key, p.priv, pki.Frontier{}); !errors.Is(err, errs.Conflict) {
		t.Errorf("opened twice: %v", err)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	if p.run(1, 20*time.Second); p.agrees() != 1 {
		t.Error("not published")
	}
}

const pressDir = "RINGWALL_TEST_PRESS"

// TestPublisherProcess is no test: it is what TestPublisher_killed runs.
func TestPublisherProcess(t *testing.T) {
	dir := os.Getenv(pressDir)
	if dir == "" {
		return
	}
	p := openPress(t, dir)
	pub, _ := p.publisher()
	go func() { _ = pub.Run(t.Context()) }()
	for {
		p.write(1)
		fmt.Println("acknowledged")
		time.Sleep(3 * time.Millisecond)
	}
}

// A server that is killed at any moment loses no record and publishes none
// twice: the log and the chain agree, and go on.
func TestPublisher_killed(t *testing.T) {
	t.Parallel()
	p := newPress(t)
	acknowledged, published := 0, []uint64{}
	for range 6 {
		c := exec.Command(os.Args[0], "-test.run=^TestPublisherProcess$", "-test.count=1")
		c.Env = append(os.Environ(), pressDir+"="+p.dir)
		var said bytes.Buffer
		c.Stdout = &said
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(100+rand.IntN(500)) * time.Millisecond)
		_ = c.Process.Kill()
		_ = c.Wait()
		acknowledged += strings.Count(said.String(), "acknowledged\n")
		if _, err := os.Stat(filepath.Join(p.tiles(), "checkpoint")); err == nil {
			published = append(published, p.agrees())
		}
	}
	end, err := p.store.AuditEnd(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if end.Seq < uint64(acknowledged) {
		t.Errorf("%d records were acknowledged, %d are there", acknowledged, end.Seq)
	}
	if said := p.run(end.Seq, 20*time.Second); said != "" || p.agrees() != end.Seq || !slices.IsSorted(published) {
		t.Errorf("%d of %d published (%v): %s", p.agrees(), end.Seq, published, said)
	}
	t.Logf("%d records, %d acknowledged, published at the kills: %v", end.Seq, acknowledged, published)
}

// A receiver that is away gets everything later, in order.
func TestForwarder(t *testing.T) {
	t.Parallel()
	p := newPress(t)
	p.write(600)
	var got []uint64
	f := &control.Forwarder{
		Outbox: p.store, Name: "x", Log: slog.New(slog.DiscardHandler),
		Send: func(_ context.Context, rs []audit.Record) error {
			for i := range rs {
				got = append(got, rs[i].Seq)
			}
			if len(got) == 512 {
				return errors.New("away")
			}
			return nil
		},
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := f.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if len(got) != 512 { // sent, and not known to have come
		t.Fatalf("%d", len(got))
	}
	got = nil
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := f.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if len(got) != 344 || got[0] != 257 || got[343] != 600 || !slices.IsSorted(got) {
		t.Errorf("%d, from %d", len(got), got[0])
	}
}
