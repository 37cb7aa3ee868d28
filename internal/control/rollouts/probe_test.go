package rollouts_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/rollout"
)

// outside is a Prometheus and a service.
type outside struct {
	*httptest.Server
	value atomic.Value // string: what the query answers
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	o := &outside{}
	o.value.Store("0.001")
	m := http.NewServeMux()
	m.HandleFunc("/api/v1/query", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("query") != `rate(errors{job="web"}[5m])` {
			t.Errorf("query %q", r.URL.RawQuery)
		}
		switch v := o.value.Load().(string); v {
		case "":
			fmt.Fprint(w, `{"status":"success","data":{"resultType":"vector","result":[]}}`)
		case "down":
			http.Error(w, "no", http.StatusServiceUnavailable)
		default:
			fmt.Fprintf(w, `{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,%q]}]}}`, v)
		}
	})
	m.HandleFunc("/health", func(w http.ResponseWriter, r *http.Request) {
		switch o.value.Load().(string) {
		case "ill":
			http.Error(w, "ill", http.StatusInternalServerError)
		case "elsewhere":
			http.Redirect(w, r, "/secret", http.StatusFound)
		}
	})
	m.HandleFunc("/secret", func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") })
	o.Server = httptest.NewServer(m)
	t.Cleanup(o.Close)
	return o
}

func TestProbe(t *testing.T) {
	k := newKeys(t)
	for name, tc := range map[string]struct {
		probe, value string
		want         rollout.Phase
		ring         int
		why          string
	}{
		"within bounds":         {"query", "0.001", rollout.Running, 1, ""},
		"above":                 {"query", "0.5", rollout.RollingBack, 0, "0.5 is above 0.01"},
		"not a number":          {"query", "NaN", rollout.Running, 0, "no data"},
		"nothing":               {"query", "", rollout.Running, 0, "no data"},
		"down":                  {"query", "down", rollout.Running, 0, "no data"},
		"nothing means failure": {"strict", "", rollout.RollingBack, 0, "no data"},
		"healthy":               {"url", "", rollout.Running, 1, ""},
		"ill":                   {"url", "ill", rollout.RollingBack, 0, "answers 500"},
		"sent elsewhere":        {"url", "elsewhere", rollout.RollingBack, 0, "answers 302"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 30, k)
			o := newOutside(t)
			o.value.Store(tc.value)
			w.mayAsk = func(u *url.URL) bool { return strings.HasPrefix(u.String(), o.URL) }
			w.restart()
			probe := map[string]string{
				"query":  `{"name":"errors","url":%q,"query":"rate(errors{job=\"web\"}[5m])","max":0.01,"no_data":"hold"}`,
				"strict": `{"name":"errors","url":%q,"query":"rate(errors{job=\"web\"}[5m])","max":0.01,"no_data":"fail"}`,
				"url":    `{"name":"health","url":%q,"no_data":"hold"}`,
			}[tc.probe]
			target := o.URL
			if tc.probe == "url" {
				target += "/health"
			}
			w.begin(`,"probes":[` + fmt.Sprintf(probe, target) + `],"rings":[{"name":"canary","percent":10},{"name":"all","percent":100,"bake":{"time":"100h"}}]`)
			w.until(change, rollout.Running, time.Minute, 5)
			for range 3 { // fewer failures than are wanted are a hold
				if s := w.status(change); s.Phase != rollout.Running {
					break
				}
				w.tick(time.Second)
			}
			if s := w.status(change); s.Phase != rollout.Running {
				t.Errorf("one answer is enough: %+v", s.Why)
			}
			for range 8 {
				w.tick(time.Minute)
				if w.status(change).Phase == rollout.RollingBack {
					break
				}
			}
			s := w.status(change)
			if s.Phase != tc.want || s.Ring != tc.ring || tc.want == rollout.RollingBack && !strings.Contains(s.Why[0].Text, tc.why) {
				t.Errorf("%s in ring %d: %+v", s.Phase, s.Ring, s.Why)
			}
		})
	}
}

func FuzzParseSamples(f *testing.F) {
	f.Add([]byte(`{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"0.5"]}]}}`))
	f.Add([]byte(`{"status":"success","data":{"resultType":"scalar","result":[1,"NaN"]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := rollouts.ParseSamples(b); err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatalf("%v is not an invalid", err)
		}
	})
}
