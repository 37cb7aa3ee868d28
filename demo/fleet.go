package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"ringwall/internal/control/hosts"
	"ringwall/internal/control/incidents"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
	"ringwall/test/fleet/sim"
	"ringwall/test/vm"
)

const (
	subscription = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group        = subscription + "/resourceGroups/web"
	// epochs of the policies that the fleet gets; prepare.sh made those below.
	epochGood, epochBad, epochEnd = 10, 20, 30
	simulated                     = 40
)

// realHosts are the guests that enforce.
func realHosts() []string { return []string{"web-1", "web-2"} }

// company is the second half of the quickstart: a server on this machine, real
// hosts in guests, simulated ones beside them.
type company struct {
	d       *demo
	s       *sim.Server
	world   *sim.World
	began   time.Time
	payload string
	pages   chan string
	guests  sync.WaitGroup
	failed  chan error
	last    string // directory of the bundle that hosts have
}

func (c *company) say(format string, a ...any) {
	fmt.Fprintf(c.d.out, "\n[%3ds] %s\n", int(time.Since(c.began).Seconds()), fmt.Sprintf(format, a...))
}

// fleet shows a good rollout, a bad one, and an attack, on a small fleet.
func (d *demo) fleet(ctx context.Context, g *guest) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &company{d: d, began: time.Now(), payload: g.payload, pages: make(chan string, 100), failed: make(chan error, 4)}
	defer c.guests.Wait()
	defer cancel()
	if err := c.open(ctx); err != nil {
		return err
	}
	defer c.s.Stop()
	c.boot(ctx, g)
	for _, step := range []func(context.Context) error{c.gather, c.good, c.attack, c.bad, c.end} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// open starts the server and makes what it needs to know.
func (c *company) open(ctx context.Context) error {
	hook, err := sim.Listen(ctx, func(_, text string) { c.pages <- text })
	if err != nil {
		return err
	}
	notify := c.d.path("notify.yaml")
	if err := os.WriteFile(notify, fmt.Appendf(nil, "version: 1\nwebhooks: [{url: %q, updates: pages}]\n", hook), 0o600); err != nil {
		return err
	}
	c.say("A server: one program, one directory, its own CA; people are paged through a webhook")
	dir := c.d.path("server")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if c.s, err = sim.StartServer(ctx, c.d.ringwall, dir, "--notify", notify, "--name", "10.0.2.2"); err != nil {
		return err
	}
	c.world = sim.NewWorld(c.s)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(c.s.URL, "https://"))
	if err != nil {
		return err
	}
	token, err := c.s.Owner(ctx, "bea")
	if err != nil {
		return err
	}
	to := filepath.Join(c.payload, "prepared", "fleet")
	err = errors.Join(
		c.s.Put(ctx, subscription, struct{}{}), c.s.Put(ctx, group, struct{}{}),
		os.MkdirAll(to, 0o755), //nolint:gosec // a disk of a guest
		os.WriteFile(filepath.Join(to, "url"), []byte("https://10.0.2.2:"+port), 0o600),
		os.WriteFile(filepath.Join(to, "attack"), fmt.Append(nil, epochGood), 0o600),
		os.WriteFile(filepath.Join(to, "ca.crt"), c.s.CA, 0o600),
		os.WriteFile(c.d.path("bea.token"), []byte(token), 0o600))
	if err != nil {
		return err
	}
	if err := c.as(ctx, "bea", io.Discard, "login", "--server", c.s.URL, "--ca", filepath.Join(dir, "data/tls/ca.crt"), "--token-file", c.d.path("bea.token")); err != nil {
		return err
	}
	for _, name := range realHosts() {
		token, err := c.s.Ringwall(ctx, "", "fleet", "join-token", "make", group, "--name", name, "--life", "1h")
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, name+".token"), []byte(token), 0o600); err != nil {
			return err
		}
	}
	return c.simulate(ctx)
}

// simulate joins hosts that only say that they enforce.
func (c *company) simulate(ctx context.Context) error {
	scope, err := resource.ParseID(group)
	if err != nil {
		return err
	}
	enrol := c.world.Enrolment()
	for n := range simulated {
		token, err := c.s.JoinToken(ctx, scope)
		if err != nil {
			return err
		}
		a, err := c.world.Join(ctx, enrol, n, token)
		if err != nil {
			return err
		}
		go a.Run(ctx)
	}
	return nil
}

// boot starts the real hosts.
func (c *company) boot(ctx context.Context, g *guest) {
	c.say("%d simulated hosts have joined; %d real ones boot and will enforce", simulated, len(realHosts()))
	for _, name := range realHosts() {
		c.guests.Go(func() {
			r, err := vm.RunDebian(ctx, vm.DebianGuest{
				Image: g.image, Kernel: g.kernel, Payload: g.payload, Output: c.d.out, Machine: vm.Machine{CPUs: 1, MemMiB: 1536, Network: true},
				Script: "#!/bin/sh\nexec sh /payload/parts/fleet.sh /payload/parts /payload/prepared " + name + "\n",
			})
			if err == nil && r.Exit != 0 {
				err = fmt.Errorf("exit %d", r.Exit)
			}
			if err != nil {
				err = fmt.Errorf("host %s: %w", name, err)
			}
			c.failed <- err
		})
	}
}

// until waits until something is so; a host that ends early ends it.
func (c *company) until(ctx context.Context, limit time.Duration, what string, so func() bool) error {
	end := time.After(limit)
	for !so() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-c.failed:
			return errors.Join(err, fmt.Errorf("a host ended while waiting for: %s", what))
		case <-end:
			return fmt.Errorf("not within %s: %s", limit, what)
		case <-time.After(300 * time.Millisecond):
		}
	}
	return nil
}

// host is how the server sees a host now.
func (c *company) host(ctx context.Context, name string) (v hosts.View, ok bool) {
	out, err := c.s.Ringwall(ctx, "", "fleet", "hosts", "show", name, "--output", "json")
	return v, err == nil && json.Unmarshal([]byte(out), &v) == nil
}

func (c *company) gather(ctx context.Context) error {
	for _, name := range realHosts() {
		err := c.until(ctx, 5*time.Minute, name+" joins", func() bool { v, ok := c.host(ctx, name); return ok && v.Online })
		if err != nil {
			return err
		}
	}
	return nil
}

// as runs a command as one of the two people and shows what it prints.
func (c *company) as(ctx context.Context, who string, out io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, c.d.ringwall, args...)
	session := c.d.path(who + ".session")
	if who == "admin" {
		session = filepath.Join(c.s.Dir, "admin.session")
	}
	cmd.Env = append(os.Environ(), "RINGWALL_SESSION="+session)
	var errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &errOut
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("ringwall %s: %w: %s", strings.Join(args, " "), err, errOut.String())
	}
	return nil
}

// show prints a command and what it prints.
func (c *company) show(ctx context.Context, args ...string) error {
	fmt.Fprintf(c.d.out, "$ ringwall %s\n", strings.ReplaceAll(strings.Join(args, " "), group, "…/web"))
	return c.as(ctx, "admin", c.d.out, args...)
}

// bundle signs a policy and the way back from it, and pushes both.
func (c *company) bundle(ctx context.Context, name string, epoch int, change func(policy string) string) (manifest, rollback string, err error) {
	prepared := filepath.Join(c.payload, "prepared")
	policy, err := os.ReadFile(filepath.Join(prepared, "demo.yaml"))
	if err != nil {
		return "", "", err
	}
	file, dir := c.d.path(name+".yaml"), c.d.path(name)
	text := change(strings.Replace(string(policy), "epoch: 2\n", fmt.Sprintf("epoch: %d\n", epoch), 1))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return "", "", err
	}
	args := []string{"fleet", "bundle", "make", file, "--keys", filepath.Join(prepared, "keys"), "--release", filepath.Join(prepared, "releases"), "--scope", group, "--out", dir, "--output", "json"}
	if c.last != "" {
		args = append(args, "--previous", c.last)
	}
	var out bytes.Buffer
	if err := c.as(ctx, "admin", &out, args...); err != nil {
		return "", "", err
	}
	var made struct {
		Manifest string
		Rollback *struct{ Manifest string }
	}
	if err := json.Unmarshal(out.Bytes(), &made); err != nil {
		return "", "", err
	}
	if made.Rollback != nil {
		rollback = made.Rollback.Manifest
	}
	c.last = dir
	return made.Manifest, rollback, c.as(ctx, "admin", io.Discard, "fleet", "bundle", "push", dir)
}

// rollout starts one in two rings, the first with a real host, and has it
// approved; watch shows how it goes.
func (c *company) rollout(ctx context.Context, name, manifest, rollback string) (id string, err error) {
	first, ok := c.host(ctx, realHosts()[0])
	if !ok {
		return "", fmt.Errorf("the server does not know %s", realHosts()[0])
	}
	spec := c.d.path(name + ".json")
	err = os.WriteFile(spec, fmt.Appendf(nil, `{"rings": [{"name": "canary", "percent": 5, "hosts": [%q], "bake": {"time": "8s"}}, {"name": "all", "percent": 100}]}`, first.ID), 0o600)
	if err != nil {
		return "", err
	}
	args := []string{"rollout", "start", name, "--scope", group, "--manifest", manifest, "--spec", spec}
	if rollback == "" {
		args = append(args, "--no-rollback")
	} else {
		args = append(args, "--rollback", rollback)
	}
	fmt.Fprintf(c.d.out, "$ ringwall rollout start %s …\n", name)
	if err := c.as(ctx, "admin", c.d.out, args...); err != nil {
		return "", err
	}
	id = group + "/providers/" + fleet.TypeRollout + "/" + name
	fmt.Fprintf(c.d.out, "$ ringwall rollout approve %s   (as Bea: who starts one cannot approve it)\n", name)
	return id, c.as(ctx, "bea", c.d.out, "rollout", "approve", id)
}

func (c *company) good(ctx context.Context) error {
	c.say("A good change: signed away from the server, it goes through the rings by itself")
	if _, _, err := c.bundle(ctx, "base", 2, func(s string) string { return s }); err != nil {
		return err
	}
	manifest, rollback, err := c.bundle(ctx, "good", epochGood, func(s string) string { return s + "# a good change\n" })
	if err != nil {
		return err
	}
	id, err := c.rollout(ctx, "good", manifest, rollback)
	if err != nil {
		return err
	}
	return c.show(ctx, "rollout", "watch", id)
}

// attack waits for the page about what the guest does, and works on the incident.
func (c *company) attack(ctx context.Context) error {
	c.say("An attack on web-1: blocked there, paged here")
	var text string
	err := c.until(ctx, 2*time.Minute, "the page", func() bool {
		select {
		case text = <-c.pages:
			return strings.Contains(text, "evil")
		default:
			return false
		}
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(c.d.out, "  the page:\n    %s\n", strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    "))
	var list struct {
		Incidents []struct {
			Properties incidents.Stored `json:"properties"`
		} `json:"incidents"`
	}
	out, err := c.s.Ringwall(ctx, "", "incident", "list", "--output", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	if err != nil {
		return err
	}
	name := ""
	for i := range list.Incidents {
		if p := &list.Incidents[i].Properties; strings.Contains(p.Title, "evil") {
			name = p.ID
		}
	}
	for _, args := range [][]string{
		{"ack", name},
		{"triage", name, "--cause", "attack", "--impact", "none"},
		{"mitigate", name, "it was blocked"},
		{"resolve", name},
		{"close", name},
	} {
		if err := c.show(ctx, append([]string{"incident"}, args...)...); err != nil {
			return err
		}
	}
	return nil
}

// bad denies a script that hosts run: the first ring shows it, and goes back.
func (c *company) bad(ctx context.Context) error {
	c.say("A bad change: it denies a script that hosts need. The first ring shows it; nobody does anything")
	script, err := os.ReadFile(filepath.Join(c.payload, "prepared/build/hello.py"))
	if err != nil {
		return err
	}
	deny := fmt.Sprintf("deny:\n  - {rule: a-mistake, sha256: [%x]}\n", sha256.Sum256(script))
	manifest, rollback, err := c.bundle(ctx, "bad", epochBad, func(s string) string { return s + deny })
	if err != nil {
		return err
	}
	id, err := c.rollout(ctx, "bad", manifest, rollback)
	if err != nil {
		return err
	}
	if err := c.show(ctx, "rollout", "watch", id); err == nil {
		return errors.New("the bad change went through")
	}
	if other, ok := c.host(ctx, realHosts()[1]); !ok || other.Report.Epoch != epochGood {
		return fmt.Errorf("%s has epoch %d, it must never have had the bad change", other.Name, other.Report.Epoch)
	}
	fmt.Fprintf(c.d.out, "  %s, in the second ring, never had it\n", realHosts()[1])
	return c.show(ctx, "incident", "list")
}

// end puts everything into audit mode, whereupon the guests end.
func (c *company) end(ctx context.Context) error {
	c.say("The end: a policy in audit mode for everybody, through the rings as everything")
	c.last = ""
	manifest, _, err := c.bundle(ctx, "end", epochEnd, func(s string) string { return strings.Replace(s, "mode: enforce\n", "mode: audit\n", 1) })
	if err != nil {
		return err
	}
	if _, err := c.rollout(ctx, "end", manifest, ""); err != nil {
		return err
	}
	for range realHosts() {
		select {
		case err := <-c.failed:
			if err != nil {
				return err
			}
		case <-time.After(3 * time.Minute):
			return errors.New("a host does not end")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	fmt.Fprintf(c.d.out, "\n%d real and %d simulated hosts: a good change went through, a bad one was taken back by itself, an attack was blocked and paged, in %d seconds\n",
		len(realHosts()), simulated, int(time.Since(c.began).Seconds()))
	return nil
}
