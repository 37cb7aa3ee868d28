package integrity_test

import (
	"strings"
	"testing"
	"time"

	"ringwall/internal/integrity"
)

func TestEvaluate(t *testing.T) {
	exec, library, script := integrity.SetOf(integrity.KindExec), integrity.SetOf(integrity.KindLibrary), integrity.SetOf(integrity.KindScript)
	release := integrity.Origin{
		Release: digest(20), Authority: "ca1", Identity: "spiffe://fleet.example/build/main", Certificates: [3]integrity.Digest{digest(21), digest(23), digest(24)},
		SignedAt: noon().Add(-time.Hour), Product: "edged", Epoch: 12,
	}
	old := release
	old.Epoch, old.Release = 10, digest(22)
	glass := func(end time.Time) integrity.Origin {
		g := release
		g.NotAfter = end
		return g
	}
	node := integrity.Origin{Archive: "debian", Package: "nodejs", Version: "18"}
	of := func(o integrity.Origin, kinds integrity.KindSet, names ...string) integrity.Membership {
		return integrity.Membership{Origin: &o, Kinds: kinds, Names: names}
	}
	signer := integrity.AllowRule{Rule: "edged", Signer: &integrity.Signer{Authority: "ca1", Identity: release.Identity, Product: "edged", MinEpoch: 11}}
	debian := integrity.AllowRule{Rule: "debian", Package: &integrity.PackageSet{Archive: "debian", Names: []string{"*"}}}
	hash := integrity.AllowRule{Rule: "hotfix", SHA256: []integrity.Digest{digest(1)}}
	exception := integrity.AllowRule{Rule: "vendor", SHA256: []integrity.Digest{digest(1)}, Until: noon(), Reason: "ticket 7"}
	revoked := integrity.DenyRule{Rule: "leaked", Reason: "key stolen", Certificates: []integrity.Revocation{{Certificate: digest(21), From: noon().Add(-2 * time.Hour)}}}
	revokedCA := integrity.DenyRule{Rule: "ca", Certificates: []integrity.Revocation{{Certificate: digest(23), From: noon().Add(-2 * time.Hour)}}}
	revokedLater := integrity.DenyRule{Rule: "ca", Certificates: []integrity.Revocation{{Certificate: digest(23), From: noon()}}}
	revokedTSA := integrity.DenyRule{Rule: "tsa", Certificates: []integrity.Revocation{{Certificate: digest(24)}}}
	jit := integrity.ProgramRule{Rule: "node", May: integrity.RoleJIT, Match: integrity.Match{Files: []string{"usr/bin/node"}, Package: "nodejs"}}
	python := integrity.InterpreterRule{
		Match: []integrity.Match{{Files: []string{"usr/bin/node*"}}}, Interpreter: integrity.Interpreter{Name: "node"},
	}

	for _, c := range []struct {
		name   string
		policy integrity.Policy
		object integrity.Object
		want   integrity.Verdict
		reason string // part of it
	}{
		{name: "nothing known", object: integrity.Object{SHA256: digest(1)}, reason: "no rule authorises it, and no verified release"},
		{
			name: "listed but not wanted", object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(node, exec)}},
			reason: "no rule authorises it; package nodejs of archive debian lists it",
		},
		{
			name: "by signer", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want: integrity.Verdict{Allow: true, Rule: "edged", Indicator: integrity.Indicator{
				Type:  "signer",
				Value: "ca1, spiffe://fleet.example/build/main, product edged, epoch 11 or later",
			}}, reason: "authorised by rule edged",
		},
		{
			name: "by signer, past its gates", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(glass(noon().Add(time.Second)), exec)}},
			want: integrity.Verdict{Allow: true, Rule: "edged", Indicator: integrity.Indicator{
				Type:  "signer",
				Value: "ca1, spiffe://fleet.example/build/main, product edged, epoch 11 or later",
			}}, reason: "authorised by rule edged",
		},
		{
			name: "past its gates, ended", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(glass(noon()), exec)}},
			reason: "break-glass release edged  ended 2026-11-25T12:00:00Z",
		},
		{
			name: "below the minimum epoch", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(old, exec)}}, reason: "it is of edged epoch 10, and rules ask for a later one",
		},
		{
			name: "wrong kind", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, library)}},
			want: integrity.Verdict{Rule: "edged", Indicator: integrity.Indicator{
				Type:  "signer",
				Value: "ca1, spiffe://fleet.example/build/main, product edged, epoch 11 or later",
			}}, reason: "authorised as library, not as exec",
		},
		{
			name: "a program's code is mapped", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}},
			object: integrity.Object{Kind: integrity.KindLibrary, SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want: integrity.Verdict{Allow: true, Rule: "edged", Indicator: integrity.Indicator{
				Type:  "signer",
				Value: "ca1, spiffe://fleet.example/build/main, product edged, epoch 11 or later",
			}},
		},
		{
			name: "strongest indicator is named", policy: integrity.Policy{Allow: []integrity.AllowRule{signer, hash}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want:   integrity.Verdict{Allow: true, Rule: "hotfix", Indicator: integrity.Indicator{Type: "sha256", Value: digest(1).String()}},
		},
		{
			name: "revoked from a time on", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}, Deny: []integrity.DenyRule{revoked}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want:   integrity.Verdict{Rule: "leaked", Indicator: integrity.Indicator{Type: "certificate", Value: digest(21).String()}},
			reason: "revoked: a certificate behind its signature is not trusted for signatures from 2026-11-25T10:00:00Z on: key stolen",
		},
		{
			name: "its authority is revoked from a time on", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}, Deny: []integrity.DenyRule{revokedCA}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want:   integrity.Verdict{Rule: "ca", Indicator: integrity.Indicator{Type: "certificate", Value: digest(23).String()}},
		},
		{
			name: "signed before its authority was revoked", policy: integrity.Policy{Allow: []integrity.AllowRule{hash}, Deny: []integrity.DenyRule{revokedLater}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want:   integrity.Verdict{Allow: true, Rule: "hotfix", Indicator: integrity.Indicator{Type: "sha256", Value: digest(1).String()}},
		},
		{
			name: "its timestamp authority is revoked", policy: integrity.Policy{Allow: []integrity.AllowRule{signer}, Deny: []integrity.DenyRule{revokedTSA}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want:   integrity.Verdict{Rule: "tsa", Indicator: integrity.Indicator{Type: "certificate", Value: digest(24).String()}},
		},
		{
			name:   "a bare digest does not lift a revocation",
			policy: integrity.Policy{Allow: []integrity.AllowRule{signer, hash}, Deny: []integrity.DenyRule{revoked}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec)}},
			want:   integrity.Verdict{Rule: "leaked", Indicator: integrity.Indicator{Type: "certificate", Value: digest(21).String()}},
		},
		{
			name:   "another origin vouches for revoked content",
			policy: integrity.Policy{Allow: []integrity.AllowRule{signer, debian}, Deny: []integrity.DenyRule{revoked}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec), of(node, exec)}},
			want:   integrity.Verdict{Allow: true, Rule: "debian", Indicator: integrity.Indicator{Type: "package", Value: "nodejs"}},
		},
		{
			name: "unchanged since a denied epoch",
			policy: integrity.Policy{
				Allow: []integrity.AllowRule{{Rule: "any", Signer: &integrity.Signer{Authority: "ca1"}}},
				Deny:  []integrity.DenyRule{{Rule: "old", Products: []integrity.Outdated{{Product: "edged", BelowEpoch: 11}}}},
			},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(old, exec), of(release, exec)}},
			want:   integrity.Verdict{Allow: true, Rule: "any", Indicator: integrity.Indicator{Type: "signer", Value: "ca1"}},
		},
		{
			name: "denied epoch",
			policy: integrity.Policy{
				Allow: []integrity.AllowRule{{Rule: "any", Signer: &integrity.Signer{Authority: "ca1"}}},
				Deny:  []integrity.DenyRule{{Rule: "old", Products: []integrity.Outdated{{Product: "edged", BelowEpoch: 11}}}},
			},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(old, exec)}},
			want:   integrity.Verdict{Rule: "old", Indicator: integrity.Indicator{Type: "product", Value: "edged"}},
			reason: "outdated: releases of edged below epoch 11 are denied",
		},
		{
			name: "a denied package is absolute",
			policy: integrity.Policy{
				Allow: []integrity.AllowRule{hash, signer},
				Deny:  []integrity.DenyRule{{Rule: "no-node", Package: &integrity.PackageSet{Archive: "debian", Names: []string{"node*"}}, Reason: "unsupported"}},
			},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, exec), of(node, exec)}},
			want:   integrity.Verdict{Rule: "no-node", Indicator: integrity.Indicator{Type: "package", Value: "nodejs"}}, reason: "denied by rule no-node: unsupported",
		},
		{
			name: "an exception that ended", policy: integrity.Policy{Allow: []integrity.AllowRule{exception}},
			object: integrity.Object{SHA256: digest(1)},
			want:   integrity.Verdict{Rule: "vendor", Indicator: integrity.Indicator{Type: "sha256", Value: digest(1).String()}},
			reason: "exception vendor ended 2026-11-25T12:00:00Z",
		},
		{
			name: "bare digest of a module", policy: integrity.Policy{Allow: []integrity.AllowRule{hash}},
			object: integrity.Object{Kind: integrity.KindModule, SHA256: digest(1)},
			want:   integrity.Verdict{Rule: "hotfix", Indicator: integrity.Indicator{Type: "sha256", Value: digest(1).String()}},
			reason: "authorised as exec, library, script, not as module",
		},
		{
			name:   "origin lists it as something else",
			policy: integrity.Policy{Allow: []integrity.AllowRule{{Rule: "r", Kinds: exec, Releases: []integrity.Digest{digest(20)}}}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(release, script)}},
			reason: "its origin is authorised, but lists it as script, not as exec",
		},
		{
			name: "a volume", policy: integrity.Policy{Allow: []integrity.AllowRule{{Rule: "img", DMVerity: []integrity.Digest{digest(9)}}}},
			object: integrity.Object{SHA256: digest(1), DMVerity: digest(9)},
			want:   integrity.Verdict{Allow: true, Rule: "img", Indicator: integrity.Indicator{Type: "dmverity", Value: digest(9).String()}},
		},
		{
			name:   "roles and interpreter",
			policy: integrity.Policy{Allow: []integrity.AllowRule{debian}, Programs: []integrity.ProgramRule{jit}, Interpreters: []integrity.InterpreterRule{python}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(node, exec, "usr/share/doc/x", "usr/bin/node")}},
			want: integrity.Verdict{
				Allow: true, Rule: "debian", Indicator: integrity.Indicator{Type: "package", Value: "nodejs"},
				Roles: integrity.RoleJIT, Interpreter: "node",
			},
		},
		{
			name:   "no roles from names that nobody authorised, but duties",
			policy: integrity.Policy{Allow: []integrity.AllowRule{hash}, Programs: []integrity.ProgramRule{jit}, Interpreters: []integrity.InterpreterRule{python}},
			object: integrity.Object{SHA256: digest(1), Memberships: []integrity.Membership{of(node, exec, "usr/bin/node")}},
			want: integrity.Verdict{
				Allow: true, Rule: "hotfix", Indicator: integrity.Indicator{Type: "sha256", Value: digest(1).String()},
				Interpreter: "node",
			},
		},
		{
			name: "may not load BPF", policy: integrity.Policy{Allow: []integrity.AllowRule{debian}, Programs: []integrity.ProgramRule{jit}},
			object: integrity.Object{Kind: integrity.KindBPF, SHA256: digest(1), Memberships: []integrity.Membership{of(node, exec, "usr/bin/node")}},
			reason: "may run, but no program rule lets it load BPF programs",
		},
		{
			name: "unknown kind", policy: integrity.Policy{Allow: []integrity.AllowRule{hash}}, object: integrity.Object{Kind: 9, SHA256: digest(1)},
			want: integrity.Verdict{Mode: integrity.ModeEnforce}, reason: "not a kind",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := c.object
			if o.Kind == 0 {
				o.Kind = integrity.KindExec
			}
			for _, prepared := range []bool{false, true} {
				if prepared {
					c.policy.Prepare()
				}
				got := integrity.Evaluate(&c.policy, &o, noon())
				if !strings.Contains(got.Reason, c.reason) || got.Reason == "" {
					t.Errorf("reason %q, want %q", got.Reason, c.reason)
				}
				got.Reason = ""
				if got != c.want {
					t.Errorf("got  %+v\nwant %+v", got, c.want)
				}
			}
		})
	}
}

// busy is a policy and an object as a server has them.
func busy() (*integrity.Policy, *integrity.Object) {
	p := &integrity.Policy{}
	for i := range 40 {
		name := string(rune('a'+i%26)) + string(rune('a'+i/26))
		p.Allow = append(p.Allow, integrity.AllowRule{Rule: name, Signer: &integrity.Signer{Authority: "ca1", Product: name}})
		p.Programs = append(p.Programs, integrity.ProgramRule{Rule: name, May: integrity.RoleJIT, Match: integrity.Match{Files: []string{"usr/bin/" + name + "*"}}})
	}
	p.Allow = append(p.Allow, integrity.AllowRule{Rule: "debian", Package: &integrity.PackageSet{Archive: "debian", Names: []string{"*"}}})
	p.Deny = append(p.Deny, integrity.DenyRule{Rule: "d", SHA256: []integrity.Digest{digest(90)}, Releases: []integrity.Digest{digest(91)}})
	p.Interpreters = []integrity.InterpreterRule{{
		Match: []integrity.Match{{Files: []string{"usr/bin/python3*"}}}, Interpreter: integrity.Interpreter{Name: "python"},
	}}
	p.Prepare()
	o := &integrity.Object{Kind: integrity.KindExec, SHA256: digest(1), Memberships: []integrity.Membership{
		{Origin: &integrity.Origin{Archive: "debian", Package: "python3.11-minimal"}, Kinds: integrity.SetOf(integrity.KindExec), Names: []string{"usr/bin/python3.11"}},
		{Origin: &integrity.Origin{Release: digest(5), Authority: "ca1", Product: "zz"}, Kinds: integrity.SetOf(integrity.KindExec), Names: []string{"usr/bin/aa"}},
	}}
	return p, o
}

func TestEvaluate_allocatesNothing(t *testing.T) {
	p, o := busy()
	if n := testing.AllocsPerRun(100, func() {
		if v := integrity.Evaluate(p, o, noon()); !v.Allow || v.Interpreter != "python" {
			t.Fatalf("%+v", v)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkEvaluate(b *testing.B) {
	p, o := busy()
	now := noon()
	b.ReportAllocs()
	for b.Loop() {
		integrity.Evaluate(p, o, now)
	}
}
