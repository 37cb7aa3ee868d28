package rollouts_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"ringwall/internal/control"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

func TestRollout_refused(t *testing.T) {
	w := newWorld(t, 1, newKeys(t))
	fits := schemaOf(t, "Ringwall.Fleet/rollouts")
	for name, tc := range map[string]struct {
		doc  string
		want string // in the error; "" for none
	}{
		"small":             {w.spec(""), ""},
		"no way back":       {fmt.Sprintf(`{"manifest":%q}`, w.good), "no rollback"},
		"says so":           {fmt.Sprintf(`{"manifest":%q,"no_rollback":true}`, w.good), ""},
		"both":              {w.spec(`,"no_rollback":true`), "contradicts"},
		"back to itself":    {fmt.Sprintf(`{"manifest":%q,"rollback":%q}`, w.good, w.good), "no other manifest"},
		"no manifest":       {`{"no_rollback":true}`, "manifest is missing"},
		"unknown key":       {w.spec(`,"rigns":[]`), "rigns"},
		"goes on":           {w.spec("") + `{}`, "JSON"},
		"rings":             {w.spec(`,"rings":[{"name":"a","percent":10}]`), "ends at 10 percent"},
		"duration":          {w.spec(`,"rings":[{"name":"a","percent":100,"bake":{"time":"soon"}}]`), "duration"},
		"seconds":           {w.spec(`,"rings":[{"name":"a","percent":100,"bake":{"time":90}}]`), ""},
		"negative":          {w.spec(`,"max_unavailable":-1`), "negative"},
		"waiver of nothing": {w.spec(`,"waive":[{"reason":"x"}]`), "waiver"},
		"endless emergency": {w.spec(`,"emergency":{"reason":"x"}`), "emergency"},
		"probe without a word on silence": {
			w.spec(`,"probes":[{"name":"p","url":"http://a/"}]`), "no_data must say hold or fail",
		},
		"silence is success": {
			w.spec(`,"probes":[{"name":"p","url":"http://a/","no_data":"pass"}]`), "no_data must say hold or fail",
		},
		"query without bounds": {w.spec(`,"probes":[{"name":"p","url":"http://a/","query":"up","no_data":"hold"}]`), "without max or min"},
		"probe of a file":      {w.spec(`,"probes":[{"name":"p","url":"file:///etc/passwd","no_data":"hold"}]`), "url"},
		"probe with a secret":  {w.spec(`,"probes":[{"name":"p","url":"http://a:b@c/","no_data":"hold"}]`), "url"},
		"a status of its own":  {w.spec(`,"status":{"phase":"running","revision":0,"ring":0,"since":"2031-05-01T12:00:00Z"}`), ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := w.tryPut(ana(), group+"/providers/Ringwall.Fleet/rollouts/x", tc.doc)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (!errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v, want %q", err, tc.want)
			case tc.want == "":
				if err := fits(tc.doc); err != nil {
					t.Errorf("the schema refuses it: %v", err)
				}
				if s := w.status(group + "/providers/Ringwall.Fleet/rollouts/x"); s.Phase != rollout.Draft {
					t.Errorf("is %s", s.Phase)
				}
			}
		})
	}
}

// schemaOf validates by the schema of a kind.
func schemaOf(t *testing.T, kind string) func(doc string) error {
	t.Helper()
	for _, k := range rollouts.Kinds(time.Now) {
		if k.Type != kind {
			continue
		}
		schema, err := jsonschema.UnmarshalJSON(bytes.NewReader(k.Schema))
		if err != nil {
			t.Fatal(err)
		}
		c := jsonschema.NewCompiler()
		if err := c.AddResource("kind.json", schema); err != nil {
			t.Fatal(err)
		}
		compiled, err := c.Compile("kind.json")
		if err != nil {
			t.Fatal(err)
		}
		return func(doc string) error {
			v, err := jsonschema.UnmarshalJSON(strings.NewReader(doc))
			if err != nil {
				return err
			}
			return compiled.Validate(v)
		}
	}
	t.Fatalf("no kind %s", kind)
	return nil
}

// Every key that a document can have is in its schema.
func TestSchema_complete(t *testing.T) {
	one := 1.0
	digest := integrity.Digest{1}
	full := rollouts.Spec{
		Manifest: digest, Rollback: &digest, NoRollback: true, Reason: "x", Selector: map[string]string{"a": "b"},
		Rings:          []rollouts.Ring{{Name: "a", Percent: 100, Hosts: []string{"h"}, Bake: rollouts.Bake{Time: 1e9, HostHours: 1, Coverage: 1}}},
		MaxUnavailable: 1, Limits: &rollouts.Limits{Converged: 1, FlipHosts: 1, SmallRing: 1, FalseAlarm: 0.1, ApplyTime: 1e9},
		Probes:    []rollouts.Probe{{Name: "p", URL: "http://a", Ask: "up", Max: &one, Min: &one, NoData: rollout.Hold, MinSamples: 1, Failures: 1}},
		Waive:     []rollouts.Waiver{{SHA256: digest, Reason: "x"}},
		Emergency: &rollouts.Emergency{Reason: "x", Until: noon()},
	}
	halt := rollouts.Halt{Reason: "x", From: noon(), Until: noon(), Weekly: []rollouts.Window{{Days: []string{"mon"}, From: "00:00", To: "24:00"}}, TimeZone: "UTC"}
	for kind, v := range map[string]any{"Ringwall.Fleet/rollouts": rollouts.Rollout{Spec: full, Status: &rollouts.Status{}}, "Ringwall.Fleet/halts": halt} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		fits := schemaOf(t, kind)
		if err := fits(string(b)); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		if fits(strings.Replace(string(b), `"reason"`, `"raeson"`, 1)) == nil {
			t.Errorf("%s: a key that there is not fits", kind)
		}
	}
}

// People write what is theirs, when it is theirs to write.
func TestRollout_transitions(t *testing.T) {
	w := newWorld(t, 30, newKeys(t))
	denied := func(what string, want, err error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	w.put(change, w.spec(tenth))
	for _, action := range []string{"approve", "pause", "resume", "promote", "rollback"} {
		denied(action+" a draft", errs.Conflict, w.act(bob(), change, action, `{"reason":"x"}`))
	}
	denied("a body that is none", errs.Invalid, w.act(ana(), change, "start", `{"reson":"x"}`))
	w.must(ana(), change, "start", `{}`)
	denied("start twice", errs.Conflict, w.act(ana(), change, "start", `{}`))
	denied("approve before it is checked", errs.Conflict, w.act(bob(), change, "approve", `{}`))
	w.tick(0)
	denied("approve one's own", errs.Denied, w.act(ana(), change, "approve", `{}`))
	denied("without a role", errs.Denied, w.act(control.Actor{ID: "eve", Name: "eve"}, change, "approve", `{}`))
	w.must(bob(), change, "approve", `{}`)
	denied("approve twice", errs.Conflict, w.act(bob(), change, "approve", `{}`))

	// Another change of what was approved takes the approval back.
	w.put(change, w.spec(tenth+`,"reason":"really"`))
	if s := w.status(change); s.Phase != rollout.Draft || s.Approval != nil || s.Check != nil {
		t.Errorf("changed after it was approved: %+v", s)
	}
	w.must(ana(), change, "start", `{}`)
	w.tick(0)
	w.must(bob(), change, "approve", `{}`)
	w.until(change, rollout.Running, time.Minute, 5)
	denied("change what runs", errs.Conflict, w.tryPut(ana(), change, w.spec("")))
	denied("delete what runs", errs.Conflict, w.door.Delete(t.Context(), ana(), id(change), resource.When{}, false))
	// What was read may be written back, whatever it says of the status.
	d, err := w.door.Get(t.Context(), ana(), id(change))
	if err != nil {
		t.Fatal(err)
	}
	w.put(change, string(d.Properties))
	denied("promote without a reason", errs.Invalid, w.act(bob(), change, "promote", `{}`))
	denied("resume what is not paused", errs.Conflict, w.act(bob(), change, "resume", `{}`))

	// One at a time where hosts can be the same, above and below too.
	for where, want := range map[string]error{
		group + "/providers/Ringwall.Fleet/rollouts/other":                  errs.Conflict,
		sub + "/providers/Ringwall.Fleet/rollouts/above":                    errs.Conflict,
		sub + "/resourceGroups/db/providers/Ringwall.Fleet/rollouts/beside": nil,
	} {
		if strings.Contains(where, "/db/") {
			w.put(sub+"/resourceGroups/db", `{}`)
		}
		w.put(where, w.spec(""))
		if err := w.act(ana(), where, "start", `{}`); !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Errorf("%s: %v, want %v", where, err, want)
		}
	}
	if err := w.door.Delete(t.Context(), ana(), id(group+"/providers/Ringwall.Fleet/rollouts/other"), resource.When{}, false); err != nil {
		t.Errorf("delete a draft: %v", err)
	}
}

// What was put right elsewhere is checked again; what was not begun can be
// withdrawn, before and after it was checked.
func TestRollout_beforeItBegins(t *testing.T) {
	w := newWorld(t, 30, newKeys(t))
	for _, x := range w.fleet.all {
		x.Report.Epoch = 2
	}
	w.propose(tenth)
	if s := w.status(change); len(s.Check.Problems) != 1 {
		t.Fatalf("%+v", s.Check.Problems)
	}
	for _, x := range w.fleet.all {
		x.Report.Epoch = 1
	}
	w.must(ana(), change, "start", `{}`)
	if s := w.status(change); s.Check != nil {
		t.Error("the old check stands")
	}
	w.must(ana(), change, "rollback", `{}`)
	w.until(change, rollout.RolledBack, time.Second, 3)
	w.tick(time.Second)
	if s := w.status(change); !s.Over || !s.Begun.IsZero() {
		t.Errorf("%+v", s)
	}
	second := group + "/providers/Ringwall.Fleet/rollouts/second"
	w.put(second, fmt.Sprintf(`{"manifest":%q,"no_rollback":true}`, w.good))
	w.must(ana(), second, "start", `{}`)
	w.tick(time.Second)
	w.must(ana(), second, "rollback", `{}`)
	w.tick(time.Second)
	if s := w.status(second); s.Phase != rollout.Stopped || !s.Over || w.fleet.assigned != 0 {
		t.Errorf("%s, over %v, %d assignments", s.Phase, s.Over, w.fleet.assigned)
	}
}

// An emergency needs two, who both are not its author, and collapses the rings.
func TestRollout_emergency(t *testing.T) {
	w := newWorld(t, 30, newKeys(t))
	w.put(change, w.spec(tenth+`,"emergency":{"reason":"CVE-2031-1","until":"2031-05-01T11:00:00Z"}`))
	if err := w.act(ana(), change, "start", `{}`); !errors.Is(err, errs.Invalid) {
		t.Errorf("an emergency that is over: %v", err)
	}
	w.propose(tenth + `,"emergency":{"reason":"CVE-2031-1","until":"2031-05-01T16:00:00Z"}`)
	w.must(bob(), change, "approve", `{}`)
	for range 5 {
		w.tick(time.Second)
	}
	if s := w.status(change); s.Phase != rollout.Proposed {
		t.Fatalf("one approval of an emergency: %s", s.Phase)
	}
	p, err := w.engine.Progress(t.Context(), ana(), id(change))
	if err != nil || !strings.Contains(p.Why[0].Text, "second approval") {
		t.Errorf("%+v, %v", p, err)
	}
	w.must(control.Engine("cid", "Ringwall.Fleet/*"), change, "approve", `{}`)
	w.until(change, rollout.Done, time.Second, 12)
	if n := w.fleet.count(isOn(w.good)); n != 30 {
		t.Errorf("%d hosts have it", n)
	}
}

// A manifest or a way back that hosts could not use is found before anybody can
// approve it.
func TestCheck(t *testing.T) {
	k := newKeys(t)
	other := newKeys(t)
	stranger := k.content.put(t, other, 4, integrity.Digest{}, "")
	old := k.content.put(t, k, 1, integrity.Digest{}, "allow: []\n")
	undoesOther := k.content.put(t, k, 5, integrity.Digest{9}, "")
	lower := k.content.put(t, k, 1, k.good, "")
	gone := k.content.put(t, k, 6, integrity.Digest{}, "")
	for d := range k.content.chunks {
		if m, _, err := k.content.Manifest(t.Context(), gone); err == nil && m.Policy == d {
			delete(k.content.chunks, d)
		}
	}
	spec := func(manifest, rollback integrity.Digest, more string) string {
		return fmt.Sprintf(`{"manifest":%q,"rollback":%q%s}`, manifest, rollback, more)
	}
	for name, tc := range map[string]struct {
		spec  string
		codes string
	}{
		"good":                             {spec(k.good, k.back, ""), ""},
		"not uploaded":                     {spec(integrity.Digest{1}, k.back, ""), "missing"},
		"half uploaded":                    {spec(gone, k.back, ""), "missing"},
		"of an authority that no host has": {fmt.Sprintf(`{"manifest":%q,"no_rollback":true}`, stranger), "untrusted"},
		"of an epoch that hosts have":      {fmt.Sprintf(`{"manifest":%q,"no_rollback":true}`, old), "epoch"},
		"no way back":                      {spec(k.good, integrity.Digest{7}, ""), "missing"},
		"back from something else":         {spec(k.good, undoesOther, ""), "rollback"},
		"back to a lower epoch":            {spec(k.good, lower, ""), "rollback"},
		"nobody has the labels":            {spec(k.good, k.back, `,"selector":{"role":"db"}`), "hosts"},
		"an empty ring":                    {spec(k.good, k.back, `,"rings":[{"name":"a","percent":0.0001},{"name":"b","percent":0.0002},{"name":"c","percent":100}]`), "rings"},
		"a probe of what nobody allowed":   {spec(k.good, k.back, `,"probes":[{"name":"p","url":"http://169.254.169.254/","no_data":"hold"}]`), "probe"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 20, k)
			w.put(change, tc.spec)
			w.must(ana(), change, "start", `{}`)
			w.tick(0)
			var codes []string
			s := w.status(change)
			for _, p := range s.Check.Problems {
				codes = append(codes, p.Code)
			}
			if got := strings.Join(codes, " "); got != tc.codes {
				t.Errorf("problems %q, want %q: %+v", got, tc.codes, s.Check.Problems)
			}
			if err := w.act(bob(), change, "approve", `{}`); (err == nil) != (tc.codes == "") {
				t.Errorf("approved: %v", err)
			}
		})
	}
}

// FuzzRollout: a document is read to the end or refused, and what is read is
// written as it was.
func FuzzRollout(f *testing.F) {
	f.Add([]byte(`{"manifest":"` + strings.Repeat("ab", 32) + `","no_rollback":true,"rings":[{"name":"a","percent":100,"bake":{"time":"1h30m"}}]}`))
	f.Add([]byte(`{"status":{"phase":"running"},"probes":[{"max":1e308}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := rollouts.Parsed(&resource.Document{Properties: b})
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatalf("%v is not an invalid", err)
			}
			return
		}
		once, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		again, err := rollouts.Parsed(&resource.Document{Properties: once})
		if err != nil {
			t.Fatalf("%s: %v", once, err)
		}
		if twice, err := json.Marshal(again); err != nil || string(twice) != string(once) {
			t.Fatalf("%s is written as %s (%v)", once, twice, err)
		}
	})
}
