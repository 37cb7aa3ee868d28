package gate_test

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/pki"
)

func result(d *gate.Decision, name string) gate.Result {
	for _, r := range d.Results {
		if r.Gate == name {
			return r
		}
	}
	return gate.Result{}
}

func TestEvaluate_pass(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, allGates)
	d := gate.Evaluate(p, request(), w.evidence(t, p, nil), w.now)
	if d.State != gate.Pass {
		t.Fatalf("%+v", d)
	}
	if d.Revision != commit || d.Ring != "prod" || len(d.Results) != 10 || len(d.Ignored) != 0 {
		t.Errorf("%+v", d)
	}
	for _, r := range d.Results {
		if r.Kind != "" && len(r.Used) != 1 {
			t.Errorf("gate %s passed by %d pieces of evidence", r.Gate, len(r.Used))
		}
	}
}

// Each row changes one thing of what passes, and says which gate says what.
func TestEvaluate_one(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, allGates)
	for name, tc := range map[string]struct {
		replace map[string]string
		add     func() *gate.Evidence
		request func(*gate.Request)
		later   time.Duration
		gate    string
		state   gate.State
		code    gate.Code
	}{
		"one test failing": {
			replace: map[string]string{"test": `{"result":"FAILED","passedTests":["a","b","c"],"failedTests":["TestX"]}`},
			gate:    "unit", state: gate.Fail, code: gate.CodeTestsFailed,
		},
		"a failed test that the result denies": {
			replace: map[string]string{"test": `{"result":"PASSED","passedTests":["a","b","c"],"failedTests":["TestX"]}`},
			gate:    "unit", state: gate.Fail, code: gate.CodeTestsFailed,
		},
		"too few tests": {
			replace: map[string]string{"test": `{"result":"PASSED","passedTests":["a","a"]}`},
			gate:    "unit", state: gate.Fail, code: gate.CodeTooFewTests,
		},
		"no tests": {replace: map[string]string{"test": ""}, gate: "unit", state: gate.Hold, code: gate.CodeNoEvidence},
		"stale":    {later: 25 * time.Hour, gate: "unit", state: gate.Hold, code: gate.CodeStale},
		"failure beside success": {
			add: func() *gate.Evidence {
				return w.attest(t, p, "ci", about(), gate.TypeTest, `{"result":"FAILED","failedTests":["TestY"]}`)
			},
			gate: "unit", state: gate.Fail, code: gate.CodeTestsFailed,
		},
		"self-review": {
			replace: map[string]string{"review": `{"reviewers":[{"name":"Robert","uri":"mailto:BOB@example.org"}],"annotations":{"authors":[{"name":"Bob","uri":"mailto:bob@example.org"}]}}`},
			gate:    "review", state: gate.Fail, code: gate.CodeSelfReview,
		},
		"self-review by a third name": {
			replace: map[string]string{"review": `{"reviewers":[{"name":"Rob","uri":"mailto:r@x.example"},{"name":"Rob","uri":"mailto:bob@example.org"}],"annotations":{"authors":[{"name":"Bob","uri":"mailto:bob@example.org"}]}}`},
			gate:    "review", state: gate.Fail, code: gate.CodeSelfReview,
		},
		"nobody says who wrote it": {
			replace: map[string]string{"review": `{"reviewers":[{"name":"Ann"}]}`},
			gate:    "review", state: gate.Hold, code: gate.CodeNoAuthor,
		},
		"findings":          {replace: map[string]string{"scan": `{"tool":{"name":"vet"},"counts":{"error":1,"warning":0,"note":0}}`}, gate: "sast", state: gate.Fail, code: gate.CodeTooManyFindings},
		"too many warnings": {replace: map[string]string{"scan": `{"tool":{"name":"vet"},"counts":{"error":0,"warning":2,"note":0}}`}, gate: "sast", state: gate.Fail, code: gate.CodeTooManyFindings},
		"critical": {
			replace: map[string]string{"vulns": strings.Replace(goodVulns, `"score":"low"`, `"score":"9.8"`, 1)},
			gate:    "vulns", state: gate.Fail, code: gate.CodeVulnerable,
		},
		"unrated": {
			replace: map[string]string{"vulns": strings.Replace(goodVulns, `"score":"low"`, `"score":"?"`, 1)},
			gate:    "vulns", state: gate.Fail, code: gate.CodeVulnerable,
		},
		"old database": {
			replace: map[string]string{"vulns": strings.Replace(goodVulns, "2031-05-01T00:00:00Z", "2031-04-01T00:00:00Z", 1)},
			gate:    "vulns", state: gate.Hold, code: gate.CodeDatabaseStale,
		},
		"other builder": {replace: map[string]string{"provenance": strings.Replace(goodBuilt, "/runner", "/laptop", 1)}, gate: "built", state: gate.Fail, code: gate.CodeWrongBuilder},
		"other source":  {replace: map[string]string{"provenance": strings.Replace(goodBuilt, "git.example/edged", "git.example/fork", 1)}, gate: "built", state: gate.Fail, code: gate.CodeWrongSource},
		"other revision": {
			replace: map[string]string{"provenance": strings.Replace(goodBuilt, commit, "00000000000000000000000000000000000000ff", 1)},
			gate:    "revision", state: gate.Fail, code: gate.CodeRevisionConflict,
		},
		"provenance and its own word": {
			add: func() *gate.Evidence {
				return w.attest(t, p, "ci", gate.Subject{SHA256: artefact(), Revision: another}, gate.TypeProvenance, goodBuilt)
			},
			gate: "revision", state: gate.Fail, code: gate.CodeRevisionConflict,
		},
		"builder claims another": {request: func(r *gate.Request) { r.Revision = another }, gate: "revision", state: gate.Fail, code: gate.CodeRevisionConflict},
		"csv did not pass":       {replace: map[string]string{"verification": strings.Replace(goodCSV, "CSV_PASS", "CSV_RAN", 1)}, gate: "csv", state: gate.Hold, code: gate.CodeNotVerified},
		"csv says block":         {replace: map[string]string{"verification": strings.Replace(goodCSV, `"properties"`, `"outcome":"block","properties"`, 1)}, gate: "csv", state: gate.Fail, code: gate.CodeVerdictAgainst},
		"csv by its own age":     {replace: map[string]string{"verification": strings.Replace(goodCSV, "2031-05-01T11", "2031-04-01T11", 1)}, gate: "csv", state: gate.Hold, code: gate.CodeStale},
		"surface not accepted":   {replace: map[string]string{"surface": strings.Replace(goodSurface, `{"item":"listens tcp/8443"`, `{"item":"x"`, 1)}, gate: "surface", state: gate.Hold, code: gate.CodeSurfaceUnreviewed},
		"custom differs":         {replace: map[string]string{"custom": `{"summary":{"result":"fail"}}`}, gate: "licences", state: gate.Fail, code: gate.CodeFieldDiffers},
		"custom lacks":           {replace: map[string]string{"custom": `{"summary":{}}`}, gate: "licences", state: gate.Hold, code: gate.CodeFieldMissing},
		"other product":          {request: func(r *gate.Request) { r.Product = "other" }, gate: "product", state: gate.Fail, code: gate.CodeWrongProduct},
		"other artefact":         {request: func(r *gate.Request) { r.Artefact[0]++ }, gate: "unit", state: gate.Hold, code: gate.CodeNoEvidence},
		"low epoch":              {request: func(r *gate.Request) { r.Epoch = 2 }, gate: "epoch", state: gate.Fail, code: gate.CodeEpochBackwards},
		"epoch goes back":        {request: func(r *gate.Request) { r.Signed = 13 }, gate: "epoch", state: gate.Fail, code: gate.CodeEpochBackwards},
		"unknown ring":           {request: func(r *gate.Request) { r.Ring = "moon" }, gate: "ring", state: gate.Fail, code: gate.CodeWrongRing},
		"signed in the future":   {later: -time.Hour, gate: "unit", state: gate.Hold, code: gate.CodeNoEvidence},
	} {
		t.Run(name, func(t *testing.T) {
			ev := w.evidence(t, p, tc.replace)
			if tc.add != nil {
				ev = append(ev, tc.add())
			}
			r := request()
			if tc.request != nil {
				tc.request(&r)
			}
			d := gate.Evaluate(p, r, ev, w.now.Add(tc.later))
			got := result(d, tc.gate)
			if got.State != tc.state || got.Code != tc.code {
				t.Errorf("gate %s: %s %s (%s), want %s %s", tc.gate, got.State, got.Code, got.Text, tc.state, tc.code)
			}
			if d.State == gate.Pass {
				t.Error("the release passes")
			}
			if got.State != gate.Pass && (got.Text == "" || got.Fix == "" || len(got.Used) > 0) {
				t.Errorf("says %+v", got)
			}
		})
	}
}

func TestEvaluate_whoCounts(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, `  - {name: unit, kind: test, attesters: [ci]}`)
	good := w.attest(t, p, "ci", about(), gate.TypeTest, goodTest)
	named := about()
	named.Gate = "integration"
	for name, v := range map[string]*gate.Evidence{
		"no attester":          w.attest(t, p, "eve", about(), gate.TypeTest, goodTest),
		"attester of others":   w.attest(t, p, "forge", about(), gate.TypeTest, goodTest),
		"named for another":    w.attest(t, p, "ci", named, gate.TypeTest, goodTest),
		"about the source":     w.attest(t, p, "ci", gate.Subject{Commit: commit}, gate.TypeTest, goodTest),
		"no revision":          w.attest(t, p, "ci", gate.Subject{SHA256: artefact()}, gate.TypeTest, goodTest),
		"an attester's denial": w.attest(t, p, "eve", about(), gate.TypeTest, `{"result":"FAILED"}`),
	} {
		if d := gate.Evaluate(p, request(), []*gate.Evidence{v}, w.now); d.State != gate.Hold || name != "no revision" && len(d.Ignored) != 1 {
			t.Errorf("%s: %+v", name, d)
		}
		if d := gate.Evaluate(p, request(), []*gate.Evidence{v, good}, w.now); d.State != gate.Pass {
			t.Errorf("%s, beside what counts: %+v", name, d)
		}
	}
	if d := gate.Evaluate(p, request(), nil, w.now); d.State != gate.Hold {
		t.Errorf("no data: %s", d.State)
	}
	if d := gate.Evaluate(&gate.Policy{Product: "edged", Rings: []string{"prod"}}, request(), nil, w.now); d.State != gate.Hold {
		t.Errorf("no gates: %s", d.State)
	}
}

// A key in hardware is named by itself, whatever its certificates say.
func TestEvaluate_key(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, `  - {name: unit, kind: test, attesters: [ci]}`)
	v := w.attest(t, p, "ci", about(), gate.TypeTest, goodTest)
	doc := strings.Replace(w.document(`  - {name: unit, kind: test, attesters: [ci]}`), "identity: spiffe://fleet.example/attest/ci", "key: "+v.Key.String(), 1)
	q, err := gate.ParsePolicy("p", []byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	if d := gate.Evaluate(q, request(), []*gate.Evidence{v}, w.now); d.State != gate.Pass {
		t.Errorf("%+v", d)
	}
	if d := gate.Evaluate(q, request(), []*gate.Evidence{w.attest(t, p, "eve", about(), gate.TypeTest, goodTest)}, w.now); d.State != gate.Hold {
		t.Errorf("another key: %s", d.State)
	}
}

func TestEvaluate_vex(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, allGates)
	bad := map[string]string{"vulns": strings.Replace(goodVulns, `"low"`, `"critical"`, 1)}
	vex := func(who, status, id, products string) *gate.Evidence {
		return w.attest(t, p, who, about(), gate.TypeVEX,
			`{"@context":"https://openvex.dev/ns/v0.2.0","statements":[{"vulnerability":{"name":"`+id+`"},`+products+`"status":"`+status+`","justification":"vulnerable_code_not_present"}]}`)
	}
	for name, tc := range map[string]struct {
		ev   []*gate.Evidence
		want gate.State
	}{
		"not affected":          {[]*gate.Evidence{vex("psirt", "not_affected", "CVE-1", "")}, gate.Pass},
		"this product":          {[]*gate.Evidence{vex("psirt", "fixed", "CVE-1", `"products":[{"@id":"x","hashes":{"sha-256":"`+artefact().String()+`"}}],`)}, gate.Pass},
		"another product":       {[]*gate.Evidence{vex("psirt", "fixed", "CVE-1", `"products":[{"hashes":{"sha-256":"`+strings.Repeat("ab", 32)+`"}}],`)}, gate.Fail},
		"another vulnerability": {[]*gate.Evidence{vex("psirt", "not_affected", "CVE-2", "")}, gate.Fail},
		"affected":              {[]*gate.Evidence{vex("psirt", "affected", "CVE-1", "")}, gate.Fail},
		"both":                  {[]*gate.Evidence{vex("psirt", "affected", "CVE-1", ""), vex("psirt", "not_affected", "CVE-1", "")}, gate.Fail},
		"by somebody else":      {[]*gate.Evidence{vex("ci", "not_affected", "CVE-1", "")}, gate.Fail},
	} {
		if d := gate.Evaluate(p, request(), append(w.evidence(t, p, bad), tc.ev...), w.now); d.State != tc.want {
			t.Errorf("%s: %s: %+v", name, d.State, result(d, "vulns"))
		}
	}
}

// The properties that the decision must have for any evidence: the order plays
// no part, what is given twice counts once, less evidence never makes a hold
// into a pass, and nothing makes a failed piece of evidence harmless but VEX.
func TestEvaluate_properties(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, allGates)
	pool := w.evidence(t, p, nil)
	pool = append(pool,
		w.attest(t, p, "ci", about(), gate.TypeTest, `{"result":"FAILED","failedTests":["x"]}`),
		w.attest(t, p, "ci", about(), gate.TypeTest, `{"result":"WARNED","passedTests":["a.TestOne"],"warnedTests":["q"]}`),
		w.attest(t, p, "ci", about(), gate.TypeScan, `{"tool":{"name":"vet"},"counts":{"error":3,"warning":0,"note":0}}`),
		w.attest(t, p, "forge", gate.Subject{Commit: commit}, gate.TypeReview, `{"reviewers":[{"name":"Bob"}],"annotations":{"authors":[{"name":"Ann"}]}}`),
		w.attest(t, p, "forge", gate.Subject{Commit: another}, gate.TypeReview, goodReview),
		w.attest(t, p, "eve", about(), gate.TypeTest, goodTest),
		w.attest(t, p, "psirt", about(), gate.TypeVEX, `{"statements":[{"vulnerability":{"name":"CVE-1"},"status":"fixed"}]}`),
		w.attest(t, p, "ci", gate.Subject{SHA256: artefact(), Revision: another}, gate.TypeTest, goodTest))
	rnd := rand.New(rand.NewPCG(1, 2))
	rank := map[gate.State]int{gate.Pass: 0, gate.Hold: 1, gate.Fail: 2}
	seen := map[gate.State]int{}
	for range 400 {
		var some []*gate.Evidence
		bias := rnd.IntN(10)
		for i, v := range pool {
			if keep := rnd.IntN(10) < 9; i < 8 && keep || i >= 8 && rnd.IntN(10) < bias/2 {
				some = append(some, v)
			}
		}
		d := gate.Evaluate(p, request(), some, w.now)
		seen[d.State]++
		shuffled := append(slices.Clone(some), some[:rnd.IntN(len(some)+1)]...)
		rnd.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		again := gate.Evaluate(p, request(), shuffled, w.now)
		if diff := cmp.Diff(d, again); diff != "" {
			t.Fatalf("another order decides otherwise:\n%s", diff)
		}
		// a failed piece of evidence more
		worse := gate.Evaluate(p, request(), append(slices.Clone(some), pool[8], pool[10]), w.now)
		if worse.State != gate.Fail {
			t.Fatalf("failed evidence is outvoted: %+v", worse)
		}
		if d.State != gate.Pass {
			continue
		}
		drop := rnd.IntN(len(some))
		less := gate.Evaluate(p, request(), slices.Delete(slices.Clone(some), drop, drop+1), w.now)
		if rank[less.State] < rank[d.State] {
			t.Fatal("less evidence makes it better")
		}
	}
	if seen[gate.Pass] < 20 || seen[gate.Hold] < 20 || seen[gate.Fail] < 20 {
		t.Errorf("the sample does not reach every state: %v", seen)
	}
	for i := range 8 {
		less := slices.Delete(slices.Clone(pool[:8]), i, i+1)
		if d := gate.Evaluate(p, request(), less, w.now); d.State != gate.Hold {
			t.Errorf("without %s: %s", pool[i].Label, d.State)
		}
	}
}

func TestEvaluateBreakglass(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, allGates)
	approve := func(who, ring, notAfter string) *gate.Evidence {
		return w.attest(t, p, who, gate.Subject{SHA256: artefact()}, gate.TypeApproval,
			`{"product":"edged","ring":"`+ring+`","reason":"INC-1 by `+who+`","not_after":"`+notAfter+`"}`)
	}
	ann, bob := approve("ann", "canary", "2031-05-01T20:00:00Z"), approve("bob", "canary", "2031-05-01T14:00:00Z")
	second, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: "spiffe://fleet.example/attest/ann", Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	w.signers["ann2"] = second
	for name, tc := range map[string]struct {
		ev      []*gate.Evidence
		request func(*gate.Request)
		later   time.Duration
		state   gate.State
	}{
		"two people":              {ev: []*gate.Evidence{ann, bob}, state: gate.Pass},
		"in the other order":      {ev: []*gate.Evidence{bob, ann}, state: gate.Pass},
		"one":                     {ev: []*gate.Evidence{ann}, state: gate.Hold},
		"one with two keys":       {ev: []*gate.Evidence{ann, approve("ann2", "canary", "2031-05-01T19:00:00Z")}, state: gate.Hold},
		"one and a stranger":      {ev: []*gate.Evidence{ann, approve("eve", "canary", "2031-05-01T14:00:00Z")}, state: gate.Hold},
		"gates instead":           {ev: w.evidence(t, p, nil), state: gate.Hold},
		"for another ring":        {ev: []*gate.Evidence{ann, approve("bob", "prod", "2031-05-01T14:00:00Z")}, state: gate.Hold},
		"beyond the ring":         {ev: []*gate.Evidence{ann, bob}, request: func(r *gate.Request) { r.Ring = "prod" }, state: gate.Fail},
		"too late":                {ev: []*gate.Evidence{ann, bob}, later: 3 * time.Hour, state: gate.Hold},
		"of another artefact":     {ev: []*gate.Evidence{ann, bob}, request: func(r *gate.Request) { r.Artefact[0]++ }, state: gate.Hold},
		"an epoch that goes back": {ev: []*gate.Evidence{ann, bob}, request: func(r *gate.Request) { r.Signed = 99 }, state: gate.Fail},
	} {
		r := request()
		if tc.request != nil {
			tc.request(&r)
		}
		d := gate.EvaluateBreakglass(p, r, tc.ev, w.now.Add(tc.later))
		if d.State != tc.state || !d.Breakglass {
			t.Errorf("%s: %s: %+v", name, d.State, d.Results)
		}
		if d.State == gate.Pass && (d.Ring != "canary" || !d.NotAfter.Equal(time.Date(2031, 5, 1, 14, 0, 0, 0, time.UTC)) || d.Reason != "INC-1 by ann; INC-1 by bob") {
			t.Errorf("%s: %+v", name, d)
		}
	}
	long := []*gate.Evidence{approve("ann", "canary", "2031-06-01T00:00:00Z"), approve("bob", "canary", "2031-06-01T00:00:00Z")}
	if d := gate.EvaluateBreakglass(p, request(), long, w.now); !d.NotAfter.Equal(w.now.Add(8 * time.Hour)) {
		t.Errorf("ends %v", d.NotAfter)
	}
	p.Breakglass = nil
	if d := gate.EvaluateBreakglass(p, request(), []*gate.Evidence{ann, bob}, w.now); d.State != gate.Fail {
		t.Errorf("without break-glass: %s", d.State)
	}
	// and an approval never stands in for a gate
	if d := gate.Evaluate(w.policy(t, allGates), request(), []*gate.Evidence{ann, bob}, w.now); d.State != gate.Hold {
		t.Errorf("approvals as gates: %s", d.State)
	}
}

func TestOpen_refuses(t *testing.T) {
	w := newWorld(t)
	p := w.policy(t, allGates)
	st, err := gate.EncodeStatement(about(), gate.TypeTest, json.RawMessage(goodTest))
	if err != nil {
		t.Fatal(err)
	}
	good, err := gate.Sign(w.signers["ci"], st)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gate.Open(good, p.Trust); err != nil {
		t.Fatal(err)
	}
	build, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: "spiffe://fleet.example/attest/ci", Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gate.Sign(build, st); !errors.Is(err, errs.Invalid) {
		t.Errorf("signed with a build certificate: %v", err)
	}
	other, err := build.Sign("application/vnd.in-toto+json", st)
	if err != nil {
		t.Fatal(err)
	}
	text, err := w.signers["ci"].Sign("text/plain", st)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"a build certificate": other, "another payload type": text, "tampered": []byte(strings.Replace(string(good), `"payload":"ey`, `"payload":"ez`, 1)),
	} {
		if _, err := gate.Open(b, p.Trust); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseStatement_refuses(t *testing.T) {
	good := `{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"` + artefact().String() + `"}}],"predicateType":"` + gate.TypeTest + `","predicate":` + goodTest + `}`
	if _, err := gate.ParseStatement([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string][2]string{
		"a key twice":            {`"predicateType"`, `"_type":"https://in-toto.io/Statement/v1","predicateType"`},
		"a key twice inside":     {`{"result":"PASSED"`, `{"result":"FAILED","result":"PASSED"`},
		"another type":           {`Statement/v1`, `Statement/v0.1`},
		"unknown key":            {`"_type"`, `"x":1,"_type"`},
		"two subjects":           {`"subject":[`, `"subject":[{"digest":{"sha256":"` + artefact().String() + `"}},`},
		"no digest":              {`"sha256"`, `"sha512"`},
		"two sorts of digest":    {`"digest":{`, `"digest":{"gitCommit":"` + commit + `",`},
		"upper-case digest":      {artefact().String(), strings.ToUpper(artefact().String())},
		"no result":              {`"PASSED"`, `"PERHAPS"`},
		"tests that are no list": {`["a.TestOne","a.TestTwo"]`, `{"a":1}`},
		"no predicate":           {`"predicate":{`, `"predicate":[{`},
		"something after":        {`]}}`, `]}} x`},
		"hidden text":            {`"digest":{`, `"name":"a\u202eb","digest":{`},
	} {
		doc := strings.Replace(good, edit[0], edit[1], 1)
		if doc == good {
			t.Errorf("%s: the edit does nothing", name)
		}
		if s, err := gate.ParseStatement([]byte(doc)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	// in-toto's rule: what is not known in a predicate is ignored
	if _, err := gate.ParseStatement([]byte(strings.Replace(good, `{"result"`, `{"x":{},"result"`, 1))); err != nil {
		t.Error(err)
	}
}
