package integrity_test

import (
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/integrity"
)

// worlds runs a property over many random worlds.
func worlds(t *testing.T, n int, property func(*testing.T, *dice)) {
	t.Helper()
	for seed := range uint64(n) {
		r := rand.New(rand.NewPCG(seed, 1))
		b := make([]byte, 400)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		property(t, &dice{b: b})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// many worlds show every rule at work; the fuzzers look further.
const many = 800

func TestCompile_agreesWithEvaluate(t *testing.T) {
	var allowed, roles, interpreters int
	worlds(t, many, func(t *testing.T, d *dice) {
		a, r, i := differential(t, d)
		allowed, roles, interpreters = allowed+a, roles+r, interpreters+i
	})
	if allowed < many || roles < many/10 || interpreters < many/10 {
		t.Errorf("worlds too dull: %d allowed, %d with roles, %d interpreters", allowed, roles, interpreters)
	}
}

func FuzzCompile_agreesWithEvaluate(f *testing.F) {
	f.Add([]byte("some bytes that make a small world of policies, releases and files"))
	f.Fuzz(func(t *testing.T, b []byte) { differential(t, &dice{b: b}) })
}

func differential(t *testing.T, d *dice) (allowed, roles, interpreters int) {
	t.Helper()
	p, h := d.policy(), d.host()
	c, err := integrity.Compile(p, h.sources(), integrity.CompileOptions{Now: noon()})
	if err != nil {
		t.Errorf("Compile: %v", err)
		return
	}
	if c.Table.Modes != p.Modes || c.Table.Epoch != p.Epoch {
		t.Errorf("table has modes %v, epoch %d", c.Table.Modes, c.Table.Epoch)
	}
	seen := 0
	for i := range digestCount + 1 {
		for _, s := range []integrity.Space{integrity.SpaceSHA256, integrity.SpaceFSVerity, integrity.SpaceDMVerity} {
			k := integrity.Key{Space: s, Digest: digest(i)}
			e, present := c.Table.Entries[k]
			if present {
				seen++
			}
			for _, kind := range integrity.Kinds() {
				o := h.object(kind, k)
				if got := c.Object(kind, k); !reflect.DeepEqual(o, got) {
					t.Errorf("Object(%v, %v): %s", kind, k, cmp.Diff(o, got))
				}
				v := integrity.Evaluate(p, &o, noon())
				if e.Kinds.Has(kind) != v.Allow {
					t.Errorf("space %d digest %v kind %v: table says %v, Evaluate %+v", s, k.Digest, kind, e.Kinds, v)
				}
				if v.Allow {
					allowed++
				}
				if kind != integrity.KindExec {
					continue
				}
				name := ""
				if e.Interpreter > 0 {
					name = c.Table.Interpreters[e.Interpreter-1].Name
					interpreters++
				}
				if !v.Allow { // what may only be mapped can be an interpreter's library
					lib := h.object(integrity.KindLibrary, k)
					v.Interpreter = integrity.Evaluate(p, &lib, noon()).Interpreter
				}
				if e.Roles != v.Roles || name != v.Interpreter {
					t.Errorf("space %d digest %v: table gives roles %b, interpreter %q; Evaluate %+v", s, k.Digest, e.Roles, name, v)
				}
				if e.Roles != 0 {
					roles++
				}
				late, err := c.Entry(&o, noon())
				if err != nil || late != e {
					t.Errorf("Entry of %v: %+v, %v; the table has %+v", k, late, err, e)
				}
			}
		}
	}
	if seen != len(c.Table.Entries) {
		t.Errorf("table has %d entries, %d of them known", len(c.Table.Entries), seen)
	}
	return allowed, roles, interpreters
}

func TestEvaluate_ruleOrderMeansNothing(t *testing.T) {
	worlds(t, many, func(t *testing.T, d *dice) { orderIndependent(t, d) })
}

func orderIndependent(t *testing.T, d *dice) {
	t.Helper()
	p, h := d.policy(), d.host()
	q := *p
	q.Allow, q.Deny, q.Programs, q.Interpreters = shuffle(d, p.Allow), shuffle(d, p.Deny), shuffle(d, p.Programs), shuffle(d, p.Interpreters)
	q.Prepare()
	for _, o := range h.objects() {
		v, w := integrity.Evaluate(p, &o, noon()), integrity.Evaluate(&q, &o, noon())
		if v != w {
			t.Errorf("%+v:\n%+v\n%+v", o, v, w)
		}
		o.Memberships = shuffle(d, o.Memberships)
		if w := integrity.Evaluate(p, &o, noon()); v.Allow != w.Allow || v.Rule != w.Rule || v.Roles != w.Roles || v.Interpreter != w.Interpreter {
			t.Errorf("memberships shuffled, %+v:\n%+v\n%+v", o, v, w)
		}
	}
}

// tightens fails if the second policy allows anything that the first does not.
func tightens(t *testing.T, p, q *integrity.Policy, h *host) (tighter int) {
	t.Helper()
	for _, o := range h.objects() {
		v, w := integrity.Evaluate(p, &o, noon()), integrity.Evaluate(q, &o, noon())
		if w.Allow && (!v.Allow || w.Roles&^v.Roles != 0 || w.Interpreter != v.Interpreter) {
			t.Errorf("%+v:\nbefore %+v\nafter  %+v", o, v, w)
		}
		if v.Allow && !w.Allow {
			tighter++
		}
	}
	return tighter
}

func TestEvaluate_denyNeverAllows(t *testing.T) {
	hits := 0
	worlds(t, many, func(t *testing.T, d *dice) {
		p, h := d.policy(), d.host()
		q := *p
		q.Deny = append(append([]integrity.DenyRule(nil), p.Deny...), d.deny("0new"))
		q.Prepare()
		hits += tightens(t, p, &q, h)
	})
	if hits < many/10 {
		t.Errorf("only %d objects were denied", hits)
	}
}

func TestEvaluate_lessAllowNeverAllows(t *testing.T) {
	hits := 0
	worlds(t, many, func(t *testing.T, d *dice) {
		p, h := d.policy(), d.host()
		if len(p.Allow) == 0 {
			return
		}
		q := *p
		i := d.n(len(p.Allow))
		q.Allow = append(append([]integrity.AllowRule(nil), p.Allow[:i]...), p.Allow[i+1:]...)
		q.Prepare()
		hits += tightens(t, p, &q, h)
	})
	if hits < many/10 {
		t.Errorf("only %d objects were denied", hits)
	}
}

func TestJoin_supplementsOnlyAllow(t *testing.T) {
	hits := 0
	worlds(t, many, func(t *testing.T, d *dice) { hits += supplemented(t, d) })
	if hits < many/10 {
		t.Errorf("only %d objects were allowed by a supplement", hits)
	}
}

func supplemented(t *testing.T, d *dice) (hits int) {
	t.Helper()
	p, s, h := d.policy(), d.supplement(), d.host()
	q, err := integrity.Join(p, s)
	if err != nil {
		t.Errorf("Join: %v", err)
		return 0
	}
	if q.Modes != p.Modes || q.Process != p.Process {
		t.Errorf("modes changed: %v, %v", q.Modes, q.Process)
	}
	deny := map[string]bool{}
	for i := range p.Deny {
		deny[p.Deny[i].Rule] = true
	}
	for _, o := range h.objects() {
		v, w := integrity.Evaluate(p, &o, noon()), integrity.Evaluate(q, &o, noon())
		switch {
		case v.Mode != w.Mode:
			t.Errorf("%+v: mode %v, with the supplement %v", o, v.Mode, w.Mode)
		case v.Allow:
			if !w.Allow || w.Roles != v.Roles || w.Interpreter != v.Interpreter {
				t.Errorf("%+v:\nbase %+v\nwith supplement %+v", o, v, w)
			}
		case w.Allow && deny[v.Rule]:
			t.Errorf("%+v: a deny rule of the base, %s, is lifted: %+v", o, v.Rule, w)
		case w.Allow:
			hits++
		}
	}
	return hits
}

func FuzzEvaluate(f *testing.F) {
	f.Add([]byte("some bytes that make a small world of policies, releases and files"))
	f.Fuzz(func(t *testing.T, b []byte) {
		orderIndependent(t, &dice{b: b})
		supplemented(t, &dice{b: b})
		d := &dice{b: b}
		p, h := d.policy(), d.host()
		q := *p
		q.Deny = append(append([]integrity.DenyRule(nil), p.Deny...), d.deny("0new"))
		q.Prepare()
		tightens(t, p, &q, h)
	})
}
