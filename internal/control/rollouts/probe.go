package rollouts

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/rollout"
)

// Probe is a question to something outside, asked while the rollout runs: a
// URL that must answer 200, or a PromQL query whose value must lie within
// bounds. The operator of the server says which URLs may be asked, since the
// server's network is not the author's.
type Probe struct {
	Name string `json:"name"`
	URL  string `json:"url"`             // of the service, or of Prometheus
	Ask  string `json:"query,omitempty"` // PromQL, instant; "" asks the URL itself
	// A value above Max or below Min is failure.
	Max *float64 `json:"max,omitempty"`
	Min *float64 `json:"min,omitempty"`
	// NoData says what no answer means: hold or fail. It must be said.
	NoData rollout.Verdict `json:"no_data"`
	// MinSamples is how many series the query must return; 0 is one.
	MinSamples int `json:"min_samples,omitempty"`
	// Failures is how many answers in a row must be failures, or missing with
	// no_data fail, before the rollout goes back; until then it holds. 0 is 3.
	Failures int `json:"failures,omitempty"`
}

// allowed says whether the server's operator lets it ask. Without anything said,
// nothing: it fails closed.
func (p *Probe) allowed(may func(*url.URL) bool) bool {
	u, err := url.Parse(p.URL)
	return err == nil && may != nil && may(u)
}

const (
	probeTime   = 5 * time.Second
	probeEvery  = 30 * time.Second
	failures    = 3       // see Probe.Failures
	maxProbe    = 1 << 20 // bytes of an answer
	maxQuery    = 4000
	maxProbeURL = 2000
)

func (p *Probe) check() error {
	u, err := url.Parse(p.URL)
	switch {
	case p.Name == "" || len(p.Name) > 200:
		return invalid("rollout: a probe has a name")
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || len(p.URL) > maxProbeURL:
		return invalid("rollout: probe %s: url %.80q", p.Name, p.URL)
	case p.NoData != rollout.Hold && p.NoData != rollout.Fail:
		return invalid("rollout: probe %s: no_data must say hold or fail: no answer is never success", p.Name)
	case p.Ask == "" && (p.Max != nil || p.Min != nil || p.MinSamples != 0):
		return invalid("rollout: probe %s: bounds without a query", p.Name)
	case p.Ask != "" && p.Max == nil && p.Min == nil:
		return invalid("rollout: probe %s: a query without max or min", p.Name)
	case len(p.Ask) > maxQuery || p.MinSamples < 0 || p.Failures < 0:
		return invalid("rollout: probe %s: the query is longer than %d bytes, or a number is negative", p.Name, maxQuery)
	}
	return nil
}

// prober asks the probes of one rollout every probeEvery and remembers what they
// answered. It is used by one goroutine.
type prober struct {
	client *http.Client
	may    func(*url.URL) bool
	last   time.Time
	bad    []int // failures in a row, by probe
	answer []rollout.Probe
}

// newProber returns a prober that follows no redirects: they would lead past
// what may be asked.
func newProber(may func(*url.URL) bool) *prober {
	return &prober{may: may, client: &http.Client{
		Timeout:       probeTime,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// answers are those to the probes, at most probeEvery old.
func (p *prober) answers(ctx context.Context, probes []Probe, now time.Time) []rollout.Probe {
	if len(p.answer) == len(probes) && now.Sub(p.last) < probeEvery {
		return p.answer
	}
	if len(p.bad) != len(probes) {
		p.bad = make([]int, len(probes))
	}
	out := make([]rollout.Probe, len(probes))
	var wg sync.WaitGroup
	for i := range probes {
		wg.Go(func() { out[i] = p.ask(ctx, &probes[i]) })
	}
	wg.Wait()
	for i := range out {
		p.settle(i, &out[i], &probes[i])
	}
	p.answer, p.last = out, now
	return out
}

// settle turns a failure into a hold until there were enough of them.
func (p *prober) settle(i int, out *rollout.Probe, q *Probe) {
	if out.Answer == rollout.Pass || out.Answer == "" && q.NoData != rollout.Fail {
		p.bad[i] = 0
		return
	}
	p.bad[i]++
	if want := cmp.Or(q.Failures, failures); p.bad[i] < want {
		out.Text = fmt.Sprintf("%s, %d of %d times in a row", cmp.Or(out.Text, "no data"), p.bad[i], want)
		out.Answer = rollout.Hold
	}
}

// ask returns the answer; what cannot be had is no answer, with the reason.
func (p *prober) ask(ctx context.Context, q *Probe) rollout.Probe {
	out := rollout.Probe{Name: q.Name, NoData: q.NoData}
	answer, text, err := p.get(ctx, q)
	if err != nil {
		// the rules see no answer; people see why
		out.Name += " (" + err.Error() + ")"
		return out
	}
	out.Answer, out.Text = answer, text
	return out
}

func (p *prober) get(ctx context.Context, q *Probe) (rollout.Verdict, string, error) {
	if !q.allowed(p.may) {
		return "", "", fmt.Errorf("the server may not ask that: %w", errs.Denied)
	}
	target := q.URL
	if q.Ask != "" {
		u, err := url.Parse(q.URL)
		if err != nil {
			return "", "", err
		}
		u = u.JoinPath("api/v1/query")
		u.RawQuery = url.Values{"query": {q.Ask}}.Encode()
		target = u.String()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return "", "", err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return "", "", err
	}
	defer func() { _ = resp.Body.Close() }()
	if q.Ask == "" {
		if resp.StatusCode != http.StatusOK {
			return rollout.Fail, "answers " + resp.Status, nil
		}
		return rollout.Pass, "answers 200", nil
	}
	if resp.StatusCode != http.StatusOK {
		return "", "", fmt.Errorf("prometheus answers %s: %w", resp.Status, errs.Invalid)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxProbe+1))
	if err != nil {
		return "", "", err
	}
	return judgeSamples(q, b)
}

// judgeSamples reads the answer of Prometheus' instant query (HTTP API v1). The
// worst of its series counts; too few of them are no answer.
func judgeSamples(q *Probe, answer []byte) (rollout.Verdict, string, error) {
	values, err := parseSamples(answer)
	if err != nil {
		return "", "", err
	}
	if len(values) < max(1, q.MinSamples) {
		return "", "", fmt.Errorf("%d series, want at least %d: %w", len(values), max(1, q.MinSamples), errs.NotFound)
	}
	for _, v := range values {
		switch {
		case math.IsNaN(v):
			return "", "", fmt.Errorf("a value is not a number: %w", errs.NotFound)
		case q.Max != nil && v > *q.Max:
			return rollout.Fail, fmt.Sprintf("%g is above %g", v, *q.Max), nil
		case q.Min != nil && v < *q.Min:
			return rollout.Fail, fmt.Sprintf("%g is below %g", v, *q.Min), nil
		}
	}
	return rollout.Pass, fmt.Sprintf("%d series within bounds", len(values)), nil
}

func parseSamples(answer []byte) ([]float64, error) {
	if len(answer) > maxProbe {
		return nil, invalid("an answer of more than %d bytes", maxProbe)
	}
	var a struct {
		Status string `json:"status"`
		Data   struct {
			Type   string          `json:"resultType"`
			Result json.RawMessage `json:"result"`
		} `json:"data"`
	}
	if err := json.Unmarshal(answer, &a); err != nil || a.Status != "success" {
		return nil, invalid("no answer of Prometheus")
	}
	type point [2]any
	var points []point
	switch a.Data.Type {
	case "scalar":
		var one point
		if err := json.Unmarshal(a.Data.Result, &one); err != nil {
			return nil, invalid("no scalar")
		}
		points = append(points, one)
	case "vector":
		var series []struct {
			Value point `json:"value"`
		}
		if err := json.Unmarshal(a.Data.Result, &series); err != nil {
			return nil, invalid("no vector")
		}
		for _, s := range series {
			points = append(points, s.Value)
		}
	default:
		return nil, invalid("a result of type %.20q, want scalar or vector", a.Data.Type)
	}
	out := make([]float64, len(points))
	for i, p := range points {
		text, ok := p[1].(string)
		v, err := strconv.ParseFloat(text, 64)
		if !ok || err != nil {
			return nil, invalid("a sample without a value")
		}
		out[i] = v
	}
	return out, nil
}
