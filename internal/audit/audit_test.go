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
		r := audit.Record{Actor: actor, Action: "x", Outcome: audit.Refused, Reason: reason}
		if r.Seal(audit.Checkpoint{}) != nil {
			return
		}
		if _, err := audit.Verify(bytes.NewReader(export(t, []audit.Record{r})), audit.Checkpoint{}); err != nil {
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
