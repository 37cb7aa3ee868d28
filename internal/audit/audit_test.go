package audit_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

func chain(t testing.TB, n int) []audit.Record {
	t.Helper()
	var end audit.Checkpoint
	out := make([]audit.Record, n)
	for i := range out {
		out[i] = audit.Record{
			At: time.Date(2031, 1, 1, 0, 0, i, 1234, time.UTC), Actor: "ana", Action: "Ringwall.Integrity/policies/write",
			Target: fmt.Sprintf("/subscriptions/x/providers/Ringwall.Integrity/policies/p%d", i), Outcome: audit.Done, Detail: `{"epoch":1}`,
		}
		if i%3 == 2 {
			out[i].Outcome, out[i].Reason = audit.Refused, "no role allows it"
		}
		if err := out[i].Seal(end); err != nil {
			t.Fatal(err)
		}
		end = out[i].Checkpoint()
	}
	return out
}

func export(t testing.TB, rs []audit.Record) []byte {
	t.Helper()
	var b bytes.Buffer
	for i := range rs {
		line, err := json.Marshal(&rs[i])
		if err != nil {
			t.Fatal(err)
		}
		b.Write(append(line, '\n'))
	}
	return b.Bytes()
}

func TestVerify(t *testing.T) {
	rs := chain(t, 9)
	rep, err := audit.Verify(bytes.NewReader(export(t, rs)), audit.Checkpoint{}, rs[4].Checkpoint(), rs[8].Checkpoint())
	if err != nil || rep.Records != 9 || rep.From != 1 || rep.To != rs[8].Checkpoint() || rep.Refused != 3 {
		t.Errorf("%+v, %v", rep, err)
	}
	// From the middle on, given where it begins.
	if rep, err := audit.Verify(bytes.NewReader(export(t, rs[5:])), rs[4].Checkpoint()); err != nil || rep.From != 6 {
		t.Errorf("%+v, %v", rep, err)
	}
	if rep, err := audit.Verify(strings.NewReader(""), audit.Checkpoint{}); err != nil || rep.Records != 0 {
		t.Errorf("an empty export: %+v, %v", rep, err)
	}
	other := chain(t, 9)
	other[2].Reason = "never mind"
	var end audit.Checkpoint
	for i := range other { // an owner of the database writes all of it anew
		if err := other[i].Seal(end); err != nil {
			t.Fatal(err)
		}
		end = other[i].Checkpoint()
	}
	for name, tc := range map[string]struct {
		edit func([]audit.Record) []audit.Record
		kept []audit.Checkpoint
		want string
	}{
		"edited":                {func(r []audit.Record) []audit.Record { r[3].Actor = "bob"; return r }, nil, "record 4 was changed"},
		"edited and sealed":     {func(r []audit.Record) []audit.Record { r[3].Actor = "bob"; _ = r[3].Seal(r[2].Checkpoint()); return r }, nil, "record 5 does not follow"},
		"detail edited":         {func(r []audit.Record) []audit.Record { r[3].Detail = `{"epoch":2}`; return r }, nil, "record 4 was changed"},
		"time moved":            {func(r []audit.Record) []audit.Record { r[3].At = r[3].At.Add(time.Hour); return r }, nil, "record 4 was changed"},
		"dropped":               {func(r []audit.Record) []audit.Record { return slices.Delete(r, 3, 5) }, nil, "records 4 to 5 are missing"},
		"first dropped":         {func(r []audit.Record) []audit.Record { return r[1:] }, nil, "records 1 to 1 are missing"},
		"swapped":               {func(r []audit.Record) []audit.Record { r[3], r[4] = r[4], r[3]; return r }, nil, "records 4 to 4 are missing"},
		"repeated":              {func(r []audit.Record) []audit.Record { return slices.Insert(r, 4, r[3]) }, nil, "out of order or repeated"},
		"renumbered":            {func(r []audit.Record) []audit.Record { r = slices.Delete(r, 3, 4); r[3].Seq = 4; return r }, nil, "record 4 does not follow"},
		"cut off":               {func(r []audit.Record) []audit.Record { return r[:6] }, []audit.Checkpoint{rs[8].Checkpoint()}, "the chain ends at 6: it was cut off"},
		"cut off, nobody knows": {func(r []audit.Record) []audit.Record { return r[:6] }, nil, ""},
		"written anew":          {func([]audit.Record) []audit.Record { return other }, []audit.Checkpoint{rs[4].Checkpoint()}, "was written anew"},
		"two histories":         {func(r []audit.Record) []audit.Record { return r }, []audit.Checkpoint{rs[4].Checkpoint(), other[4].Checkpoint()}, "written twice"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := audit.Verify(bytes.NewReader(export(t, tc.edit(slices.Clone(rs)))), audit.Checkpoint{}, tc.kept...)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (!errors.Is(err, errs.Untrusted) || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	for name, doc := range map[string]string{
		"no JSON": "x\n", "another field": `{"seq":1,"evil":1}` + "\n", "too long": strings.Repeat(" ", 3<<20),
	} {
		if _, err := audit.Verify(strings.NewReader(doc), audit.Checkpoint{}); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// tree is the checkpoint that the published log of records has.
func tree(rs []audit.Record) pki.Checkpoint {
	f := &pki.Frontier{}
	for i := range rs {
		f.Add(pki.LeafHash([]byte(rs[i].Checkpoint().String())))
	}
	return pki.Checkpoint{Origin: "audit.fleet.example", Size: f.Size, Root: f.Root()}
}

// With a signed checkpoint every row is bound, the last one too, and by the
// log's key instead of by what somebody wrote down.
func TestVerifySigned(t *testing.T) {
	rs := chain(t, 9)
	signed := []pki.Checkpoint{tree(rs), tree(rs[:4]), tree(nil)}
	rep, err := audit.VerifySigned(bytes.NewReader(export(t, rs)), signed, rs[2].Checkpoint())
	if err != nil || rep.Signed != 9 || rep.Records != 9 {
		t.Errorf("%+v, %v", rep, err)
	}
	if rep, err := audit.VerifySigned(bytes.NewReader(export(t, rs)), signed[1:]); err != nil || rep.Signed != 4 || rep.Records != 9 {
		t.Errorf("newer records than the checkpoint: %+v, %v", rep, err)
	}
	anew := func(r []audit.Record) []audit.Record { // seals what was edited, and all after it
		var end audit.Checkpoint
		for i := range r {
			if err := r[i].Seal(end); err != nil {
				t.Fatal(err)
			}
			end = r[i].Checkpoint()
		}
		return r
	}
	for name, tc := range map[string]struct {
		edit func([]audit.Record) []audit.Record
		want string
	}{
		"edited":                      {func(r []audit.Record) []audit.Record { r[3].Actor = "bob"; return r }, "record 4 was changed"},
		"edited and all sealed anew":  {func(r []audit.Record) []audit.Record { r[5].Actor = "bob"; return anew(r) }, "the first 9 records are not those that were published"},
		"early one sealed anew":       {func(r []audit.Record) []audit.Record { r[1].Actor = "bob"; return anew(r) }, "the first 4 records are not those that were published"},
		"dropped":                     {func(r []audit.Record) []audit.Record { return slices.Delete(r, 3, 4) }, "records 4 to 4 are missing"},
		"dropped and all sealed anew": {func(r []audit.Record) []audit.Record { return anew(slices.Delete(r, 3, 4)) }, "the first 4 records are not those that were published"},
		"swapped and all sealed anew": {func(r []audit.Record) []audit.Record { r[6], r[7] = r[7], r[6]; return anew(r) }, "the first 9 records are not those that were published"},
		"last one cut off":            {func(r []audit.Record) []audit.Record { return r[:8] }, "9 records were published, the chain ends at 8: it was cut off"},
		"all cut off":                 {func(r []audit.Record) []audit.Record { return nil }, "9 records were published, the chain ends at 0: it was cut off"},
		"first cut off":               {func(r []audit.Record) []audit.Record { return r[1:] }, "records 1 to 1 are missing"},
		"one put in, all sealed anew": {func(r []audit.Record) []audit.Record { return anew(slices.Insert(r, 4, r[4])) }, "the first 9 records are not those that were published"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := audit.VerifySigned(bytes.NewReader(export(t, tc.edit(slices.Clone(rs)))), signed)
			if !errors.Is(err, errs.Untrusted) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	if _, err := audit.VerifySigned(strings.NewReader(""), []pki.Checkpoint{{Root: [32]byte{1}}}); !errors.Is(err, errs.Untrusted) {
		t.Errorf("an empty log with a root of something: %v", err)
	}
}

func TestParseCheckpoint(t *testing.T) {
	c := chain(t, 3)[2].Checkpoint()
	if got, err := audit.ParseCheckpoint(c.String()); err != nil || got != c {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "3", "3:", ":" + c.Hash.String(), "0" + c.String(), strings.ToUpper(c.String()), "-1:" + c.Hash.String(), c.String() + "0", "x:" + c.Hash.String(), "3:" + strings.Repeat("g", 64)} {
		if _, err := audit.ParseCheckpoint(bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestSeal_refuses(t *testing.T) {
	good := audit.Record{Actor: "a", Action: "b", Outcome: audit.Done}
	for name, edit := range map[string]func(*audit.Record){
		"no actor":    func(r *audit.Record) { r.Actor = "" },
		"no action":   func(r *audit.Record) { r.Action = "" },
		"no outcome":  func(r *audit.Record) { r.Outcome = "" },
		"not UTF-8":   func(r *audit.Record) { r.Reason = "\xff" },
		"long target": func(r *audit.Record) { r.Target = strings.Repeat("a", 5000) },
		"no JSON":     func(r *audit.Record) { r.Detail = "x" },
	} {
		r := good
		edit(&r)
		if err := r.Seal(audit.Checkpoint{}); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What a record says survives its way through an export, whatever it is.
func FuzzVerify(f *testing.F) {
	f.Add([]byte(`{"seq":1}`), "ana", "why")
	f.Fuzz(func(t *testing.T, raw []byte, actor, reason string) {
		_, _ = audit.Verify(bytes.NewReader(raw), audit.Checkpoint{})
		if c, err := audit.ParseCheckpoint(actor); err == nil && c.String() != actor {
			t.Errorf("%q reads as %s", actor, c)
		}
		r := audit.Record{Actor: actor, Action: "x", Outcome: audit.Refused, Reason: reason}
		if r.Seal(audit.Checkpoint{}) != nil {
			return
		}
		if _, err := audit.VerifySigned(bytes.NewReader(export(t, []audit.Record{r})), []pki.Checkpoint{tree([]audit.Record{r})}); err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	data := export(b, chain(b, 10_000))
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := audit.Verify(bytes.NewReader(data), audit.Checkpoint{}); err != nil {
			b.Fatal(err)
		}
	}
}
