package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/api"
	"ringwall/internal/control/hosts"
	"ringwall/internal/control/incidents"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
	"ringwall/test/fleet/sim"
)

// measurement is one run.
type measurement struct {
	o      *options
	began  time.Time
	s      *sim.Server
	w      *sim.World
	op     *operator
	other  *api.Client // somebody who may approve what the administrator starts
	agents []*sim.Agent
	pages  *pages
}

func (m *measurement) say(format string, a ...any) {
	fmt.Fprintf(m.o.out, "[%4ds] %s\n", int(time.Since(m.began).Seconds()), fmt.Sprintf(format, a...))
}

// result is a line of the report: a figure beside its goal.
func (m *measurement) result(what, figure, goal string) {
	fmt.Fprintf(m.o.out, "        %-58s %-22s %s\n", what, figure, goal)
}

func (m *measurement) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := m.setUp(ctx); err != nil {
		return err
	}
	defer m.s.Stop()
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"join", m.join}, {"idle", m.idle}, {"publish", m.publish}, {"ingest", m.ingest}, {"page", m.page}, {"storm", m.storm}, {"halt", m.stopTheLine},
	} {
		if slices.Contains(strings.Split(m.o.skip, ","), step.name) {
			continue
		}
		if err := step.run(ctx); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", step.name, err), m.tailLog())
		}
	}
	m.say("done: %d waits, %d calls failed and were made again", m.w.Waits.Load(), m.w.Failed.Load())
	for text, n := range m.w.Errors() {
		m.result(text, fmt.Sprint(n), "")
	}
	return nil
}

// tailLog shows the end of the server's log with an error.
func (m *measurement) tailLog() error {
	b, err := os.ReadFile(filepath.Join(m.s.Dir, "server.log"))
	if err != nil {
		return nil //nolint:nilerr // there is an error already
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return fmt.Errorf("the server's log ends:\n%s", strings.Join(lines[max(0, len(lines)-10):], "\n"))
}

func (m *measurement) setUp(ctx context.Context) error {
	var err error
	if m.pages, err = listen(ctx); err != nil {
		return err
	}
	notify := filepath.Join(m.o.dir, "notify.yaml")
	if err := os.WriteFile(notify, fmt.Appendf(nil, "version: 1\nwebhooks: [{url: %q, updates: pages}]\n", m.pages.url), 0o600); err != nil {
		return err
	}
	args := []string{"--notify", notify}
	engine := "SQLite"
	if m.o.database != "" {
		args, engine = append(args, "--database", m.o.database), "PostgreSQL"
	}
	if m.s, err = sim.StartServer(ctx, m.o.program, m.o.dir, args...); err != nil {
		return err
	}
	m.say("a server on %s at %s; %d hosts are to come", engine, m.s.URL, m.o.hosts)
	m.w = sim.NewWorld(m.s)
	if err := errors.Join(m.s.Put(ctx, subscription, struct{}{}), m.s.Put(ctx, group, struct{}{})); err != nil {
		return err
	}
	token, err := m.s.Owner(ctx, "approver")
	if err != nil {
		return err
	}
	if m.other, err = api.NewClient(m.s.URL, m.s.CA, token); err != nil {
		return err
	}
	m.op, err = newOperator(ctx, m.s, 20)
	return err
}

// each runs fn for the numbers below n, so many at once, and stops at an error.
func each(ctx context.Context, n, atOnce int, fn func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || ctx.Err() != nil {
					return
				}
				if err := fn(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

func (m *measurement) join(ctx context.Context) error {
	at := time.Now()
	scope, err := resource.ParseID(group)
	if err != nil {
		return err
	}
	tokens := make([]string, m.o.hosts)
	err = each(ctx, m.o.hosts, 16, func(ctx context.Context, i int) (err error) {
		tokens[i], err = m.s.JoinToken(ctx, scope)
		return err
	})
	if err != nil {
		return fmt.Errorf("join tokens: %w", err)
	}
	m.say("%d join tokens in %s", m.o.hosts, time.Since(at).Round(time.Second))
	at = time.Now()
	m.agents = make([]*sim.Agent, m.o.hosts)
	enrol := m.w.Enrolment()
	err = each(ctx, m.o.hosts, 16, func(ctx context.Context, i int) error {
		for {
			a, err := m.w.Join(ctx, enrol, i, tokens[i])
			if connect.CodeOf(err) == connect.CodeResourceExhausted {
				time.Sleep(200 * time.Millisecond) // so many a second, as the server wants it
				continue
			}
			m.agents[i] = a
			return err
		}
	})
	if err != nil {
		return err
	}
	m.say("%d hosts enrolled in %s", m.o.hosts, time.Since(at).Round(time.Second))
	before, err := m.s.Use()
	if err != nil {
		return err
	}
	at = time.Now()
	for i, a := range m.agents {
		go a.Run(ctx)
		if i%50 == 49 {
			time.Sleep(100 * time.Millisecond)
		}
	}
	if err := m.until(ctx, 5*time.Minute, func() bool { return m.w.Waits.Load() >= int64(m.o.hosts) && m.online(ctx) >= m.o.hosts }); err != nil {
		return fmt.Errorf("%d of %d hosts are online: %w", m.online(ctx), m.o.hosts, err)
	}
	after, err := m.s.Use()
	if err != nil {
		return err
	}
	m.say("all of them wait, after %s", time.Since(at).Round(time.Second))
	m.result("server CPU of a new connection and the first report", perHost(after.CPU-before.CPU, m.o.hosts), "")
	m.result("memory of a waiting host (server's growth)", fmt.Sprintf("%.1f KiB", float64(after.RSS-before.RSS)/1024/float64(m.o.hosts)), "goal: 18k a GiB, 58 KiB")
	return nil
}

func perHost(d time.Duration, n int) string {
	return fmt.Sprintf("%.0f µs", float64(d.Microseconds())/float64(n))
}

// online asks the server how many hosts wait.
func (m *measurement) online(ctx context.Context) int {
	b, _, err := m.s.Client.Do(ctx, api.Request{Method: http.MethodGet, Path: "/ringwall/fleet/hosts?host=none"})
	if err != nil {
		return -1
	}
	var out hosts.Listing
	if json.Unmarshal(b, &out) != nil {
		return -1
	}
	return int(out.Counters.Waiting)
}

// until waits until something is so, or fails after a time.
func (m *measurement) until(ctx context.Context, limit time.Duration, so func() bool) error {
	end := time.Now().Add(limit)
	for !so() {
		if time.Now().After(end) {
			return fmt.Errorf("not within %s", limit)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

func (m *measurement) idle(ctx context.Context) error {
	before, err := m.s.Use()
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(m.o.idle):
	}
	after, err := m.s.Use()
	if err != nil {
		return err
	}
	m.say("hosts have only waited for %s", m.o.idle)
	m.result("server CPU, of one core", fmt.Sprintf("%.1f %%", 100*float64(after.CPU-before.CPU)/float64(m.o.idle)), "")
	return nil
}

// publish gives all hosts a change at once: one ring, no bake.
func (m *measurement) publish(ctx context.Context) error {
	for _, what := range []string{"first", "small change"} {
		next, back, err := m.op.change(ctx, what)
		if err != nil {
			return err
		}
		before, err := m.s.Use()
		if err != nil {
			return err
		}
		at := time.Now()
		if err := m.rollout(ctx, strings.ReplaceAll(what, " ", "-"), next, back, 0); err != nil {
			return err
		}
		if err := m.until(ctx, 5*time.Minute, func() bool { return len(m.w.Times(next.digest)) >= m.o.hosts }); err != nil {
			return fmt.Errorf("%d of %d hosts have it: %w", len(m.w.Times(next.digest)), m.o.hosts, err)
		}
		after, err := m.s.Use()
		if err != nil {
			return err
		}
		times := m.w.Times(next.digest)
		slices.SortFunc(times, time.Time.Compare)
		m.say("%s: a policy of %d bytes is in force on all hosts", what, len(next.chunks[0]))
		m.result("approval → 50 % and 99 % of hosts", fmt.Sprintf("%.1f s, %.1f s", times[len(times)/2].Sub(at).Seconds(), times[len(times)*99/100].Sub(at).Seconds()), "goal: p99 < 10 s for up to 4 KiB")
		m.result("server CPU", fmt.Sprintf("%.1f s", (after.CPU-before.CPU).Seconds()), "goal: < 3 s at 10,000")
		if err := m.done(ctx, strings.ReplaceAll(what, " ", "-")); err != nil {
			return err
		}
	}
	return nil
}

// rollout starts one and approves it as somebody else; unavailable bounds the
// hosts that change at once.
func (m *measurement) rollout(ctx context.Context, name string, next, back *signed, unavailable int) error {
	id := group + "/providers/" + fleet.TypeRollout + "/" + name
	err := m.s.Put(ctx, id, map[string]any{
		"manifest": next.digest, "rollback": back.digest, "reason": "simulated", "max_unavailable": unavailable,
		"rings": []map[string]any{{"name": "all", "percent": 100}},
	})
	if err != nil {
		return err
	}
	return m.approve(ctx, id)
}

// done waits until a rollout is.
func (m *measurement) done(ctx context.Context, name string) error {
	var r rollouts.Rollout
	return m.until(ctx, 2*time.Minute, func() bool {
		err := m.s.Document(ctx, group+"/providers/"+fleet.TypeRollout+"/"+name, &r)
		return err == nil && r.Status != nil && r.Status.Phase == rollout.Done
	})
}

func (m *measurement) ingest(ctx context.Context) error {
	const batch = 100
	senders := min(200, len(m.agents))
	work, cancel := context.WithTimeout(ctx, m.o.load)
	defer cancel()
	var sent atomic.Int64
	var wg sync.WaitGroup
	for _, a := range m.agents[:senders] {
		wg.Go(func() {
			for round := 0; work.Err() == nil; round++ {
				if a.Ingest(work, agentpb.Lane_LANE_INVENTORY, a.Executions(batch, round)...) == nil {
					sent.Add(batch)
				}
			}
		})
	}
	var writes []time.Duration
	for n := 0; work.Err() == nil; n++ {
		at := time.Now()
		if err := m.s.Put(ctx, group+"/providers/"+incidents.TypeSilence+"/probe", incidents.Silence{
			Path: "/nowhere", Reason: fmt.Sprint(n), Until: time.Now().Add(time.Hour).UTC().Truncate(time.Second),
		}); err != nil {
			return err
		}
		writes = append(writes, time.Since(at))
		time.Sleep(20 * time.Millisecond)
	}
	wg.Wait()
	slices.Sort(writes)
	m.say("%d hosts have sent executions as fast as they were taken, for %s", senders, m.o.load)
	m.result("events stored durably", fmt.Sprintf("%.0f /s", float64(sent.Load())/m.o.load.Seconds()), "goal: 10,000 /s")
	m.result("control writes meanwhile, p50 and p99", fmt.Sprintf("%s, %s", ms(writes[len(writes)/2]), ms(writes[len(writes)*99/100])), "goal: p99 < 50 ms")
	return nil
}

func ms(d time.Duration) string { return fmt.Sprintf("%.0f ms", float64(d.Microseconds())/1000) }

// page measures from the block on a host to the webhook of whoever is on call.
func (m *measurement) page(ctx context.Context) error {
	var took []time.Duration
	for n := range 20 {
		path := fmt.Sprintf("/tmp/single-%d", n)
		at := time.Now()
		if err := m.agents[n%len(m.agents)].Block(ctx, 1, false, path, path); err != nil {
			return err
		}
		page, err := m.pages.wait(ctx, path)
		if err != nil {
			return err
		}
		took = append(took, page.Sub(at))
	}
	slices.Sort(took)
	m.say("%d blocks on single hosts, one after the other", len(took))
	m.result("block → page accepted, p50 and p95", fmt.Sprintf("%s, %s", ms(took[len(took)/2]), ms(took[len(took)*95/100])), "goal: p95 < 4 s")
	return nil
}

// storm: the same block on very many hosts at the same time.
func (m *measurement) storm(ctx context.Context) error {
	n := min(5000, len(m.agents))
	at := time.Now()
	if err := each(ctx, n, n, func(ctx context.Context, i int) error { return m.agents[i].Block(ctx, 1, false, "/tmp/storm", "storm") }); err != nil {
		return err
	}
	durable := time.Since(at)
	page, err := m.pages.wait(ctx, "/tmp/storm")
	if err != nil {
		return err
	}
	time.Sleep(2 * time.Second) // for pages that should not come
	m.say("the same block on %d hosts at once", n)
	m.result("first block → page accepted", ms(page.Sub(at)), "goal: < 10 s")
	m.result("all reports durable after", ms(durable), "")
	m.result("pages", fmt.Sprint(m.pages.count("/tmp/storm")), "goal: 1")
	return nil
}

// pages is the webhook of whoever is on call.
type pages struct {
	url string

	mu    sync.Mutex
	texts []string
	times []time.Time
}

func listen(ctx context.Context) (*pages, error) {
	p := &pages{}
	var err error
	p.url, err = sim.Listen(ctx, func(title, _ string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.texts, p.times = append(p.texts, title), append(p.times, time.Now())
	})
	return p, err
}

func (p *pages) wait(ctx context.Context, part string) (time.Time, error) {
	for range 6000 {
		p.mu.Lock()
		for i, t := range p.texts {
			if strings.Contains(t, part+" ") {
				at := p.times[i]
				p.mu.Unlock()
				return at, nil
			}
		}
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			return time.Time{}, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return time.Time{}, fmt.Errorf("no page about %s within a minute", part)
}

func (p *pages) count(part string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, t := range p.texts {
		if strings.Contains(t, part+" ") {
			n++
		}
	}
	return n
}
