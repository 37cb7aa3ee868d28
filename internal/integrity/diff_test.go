package integrity_test

import (
	"encoding/json"
	"strings"
	"testing"

	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

func TestDiff(t *testing.T) {
	doc := full(t)
	parse := func(d string) *integrity.Policy {
		t.Helper()
		p, err := integrity.ParsePolicy([]byte(d))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	base := parse(doc)
	hex2 := strings.ReplaceAll(hex1, "01", "02")
	for _, c := range []struct {
		old, now string
		want     []string
	}{
		{"# a comment", "# another", nil},
		{"epoch: 12\nbase", "epoch: 13\nbase", nil},
		{"epoch: 12\nbase", "epoch: 11\nbase", []string{"changed epoch: goes back from 12 to 11: hosts will refuse it"}},
		{"script: audit, memory: audit", "script: enforce, memory: off", []string{"looser modes memory: audit becomes off", "stricter modes script: audit becomes enforce"}},
		{"min_epoch: 12", "min_epoch: 11", []string{"looser allow edged: asks for epoch 11, was 12"}},
		{`identity: "spiffe://fleet.example/build/main", `, "", []string{"looser allow edged: is not limited to identity spiffe://fleet.example/build/main any more"}},
		{
			"[HEX], kinds: [exec, module]", "[HEX, " + hex2 + "], kinds: [exec]",
			[]string{"looser allow hotfix: adds sha256 " + hex2, "stricter allow hotfix: drops kinds module"},
		},
		{"[HEX], kinds: [exec, module]", "[HEX]", []string{"changed allow hotfix: is for what the content is, was for exec, module"}},
		{"  - {rule: img, dmverity: [HEX]}\n", "", []string{"stricter allow img: gone: 1 dm-verity volumes"}},
		{"below_epoch: 11", "below_epoch: 12", []string{"stricter deny old: product edged must be of epoch 12 or later, was 11"}},
		{"names: [telnetd]", "names: [telnetd, ftpd]", []string{"stricter deny bad: adds packages debian:ftpd"}},
		{"2031-05-01T14:00:00+02:00", "2031-06-01T12:00:00Z", []string{"looser allow vendor: ends 2031-06-01T12:00:00Z, was to end 2031-05-01T12:00:00Z"}},
		{"2031-05-01T14:00:00+02:00", "2031-05-01T12:00:00Z", nil},
		{"may: [jit, jit-shared, bpf, debug, packages, block]", "may: [jit, jit-shared, bpf, debug, block]", []string{"stricter programs own-node: drops right to packages"}},
		{
			"reads: strict\n    inline: deny", "reads: code\n    inline: audit",
			[]string{
				"looser interpreters python: checks the named script and files with a code suffix, was every file outside the data paths",
				"looser interpreters python: code in arguments is an event, was refused",
			},
		},
		{`{inline: "c", argument`, `{inline: "ce", argument`, []string{"stricter interpreters python: adds options with code e"}},
		{"stdin: [tty, pipe, file, socket, null]", "stdin: [tty]", []string{"stricter interpreters python: drops code from standard input: file, null, pipe, socket"}},
		{"baseline: 1\n", "baseline: 0\n", []string{"looser interpreters awk: gone: what it reads is not checked any more"}},
		{"signs: [build, policy, permit, supplement]", "signs: [build]", []string{"stricter trust authority Example build CA: drops signing of permit, policy, supplement"}},
		{
			"+f3ae9601+AjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDES7Yo9ONnOcHJF738s38VW5BHgqt2PbDX1dvotT7YTayZHJuZ0kSYJfzCfmQJuyST1nv4vv8qDCundwKiYAwU=",
			"+d5f93a61+AjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABOsj1qzll7VKLLIqiQl6ehY63jMrFTh55mgkTWJHVfSkub0kPgHFxYuMmJwvV/WfohfYQnRxZuGkhlvVPd8NtvA=",
			[]string{"changed trust log fleet log: has another key"},
		},
		{
			`{boot: lockdown, want: integrity}`, `{boot: lockdown, want: confidentiality}`,
			[]string{"changed knobs lockdown: is exactly confidentiality, reported, was exactly integrity, reported"},
		},
	} {
		old, now := strings.ReplaceAll(c.old, "HEX", hex1), strings.ReplaceAll(c.now, "HEX", hex1)
		if !strings.Contains(doc, old) {
			t.Fatalf("the sample lacks %q", old)
		}
		changes := integrity.Diff(base, parse(strings.Replace(doc, old, now, 1)))
		if len(changes) < len(c.want) || len(c.want) == 0 && len(changes) > 0 {
			t.Errorf("%q: %v", c.now, changes)
			continue
		}
		for i, w := range c.want {
			if got := string(changes[i].Effect) + " " + changes[i].Where + ": " + changes[i].Text; got != w {
				t.Errorf("%q:\ngot  %s\nwant %s", c.now, got, w)
			}
		}
	}
	b, err := json.Marshal(integrity.Diff(base, parse(strings.Replace(doc, "script: audit", "script: enforce", 1))))
	if want := `[{"effect":"stricter","where":"modes script","text":"audit becomes enforce"}]`; err != nil || string(b) != want {
		t.Errorf("JSON %s, %v", b, err)
	}
}

// What Diff calls looser or stricter must be so: where it reports only one
// sort, no object may be decided the other way.
func TestDiff_agreesWithEvaluate(t *testing.T) {
	checked := 0
	worlds(t, many, func(t *testing.T, d *dice) {
		p, h := d.policy(), d.host()
		q := *p
		switch d.n(4) {
		case 0:
			q.Allow = append(append([]integrity.AllowRule(nil), p.Allow...), d.allow("new"))
		case 1:
			if len(p.Allow) > 0 {
				q.Allow = p.Allow[1:]
			}
		case 2:
			q.Deny = append(append([]integrity.DenyRule(nil), p.Deny...), d.deny("new"))
		case 3:
			if len(p.Allow) > 0 {
				q.Allow = append([]integrity.AllowRule(nil), p.Allow...)
				q.Allow[0] = d.allow(p.Allow[0].Rule)
			}
		}
		q.Prepare()
		effects := map[integrity.Effect]bool{}
		for _, c := range integrity.Diff(p, &q) {
			effects[c.Effect] = true
		}
		for _, o := range h.objects() {
			v, w := integrity.Evaluate(p, &o, noon()), integrity.Evaluate(&q, &o, noon())
			if v.Allow == w.Allow {
				continue
			}
			checked++
			if w.Allow && !effects[integrity.Looser] && !effects[integrity.Changed] || v.Allow && !effects[integrity.Stricter] && !effects[integrity.Changed] {
				t.Errorf("%+v\nbefore %+v\nafter  %+v\n%v", o, v, w, integrity.Diff(p, &q))
			}
		}
	})
	if checked < many/10 {
		t.Errorf("only %d objects were decided differently", checked)
	}
}

// The first log is a demand on everything that is signed, a second one is one
// more place where it may be.
func TestDiff_logs(t *testing.T) {
	key := func(origin string) pki.LogKey {
		k, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		return pki.LogKey{Origin: origin, Key: &k.PublicKey}
	}
	one, two := pki.LogAnchor{Name: "one", LogKey: key("one.test")}, pki.LogAnchor{Name: "two", LogKey: key("two.test")}
	with := func(logs ...pki.LogAnchor) *integrity.Policy {
		return &integrity.Policy{Trust: integrity.Trust{Logs: logs}}
	}
	for _, c := range []struct {
		name     string
		old, now *integrity.Policy
		want     string
	}{
		{"first", with(), with(one), "stricter trust log one: is required of what is signed"},
		{"second", with(one), with(one, two), "looser trust log two: is trusted"},
		{"one of two goes", with(one, two), with(one), "stricter trust log two: is not trusted any more"},
		{"the last goes", with(one), with(), "looser trust log one: is not required any more: what is signed need be in no log"},
	} {
		changes := integrity.Diff(c.old, c.now)
		if len(changes) != 1 || string(changes[0].Effect)+" "+changes[0].Where+": "+changes[0].Text != c.want {
			t.Errorf("%s: %v, want %s", c.name, changes, c.want)
		}
	}
}
