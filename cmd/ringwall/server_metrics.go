package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"ringwall/internal/control"
	"ringwall/internal/incident"
	"ringwall/internal/store"
)

// serverMetrics is what a server says of itself to Prometheus. Names and labels
// are stable; docs/ops/monitor-a-server.md lists them. Labels never hold what a
// client chose.
type serverMetrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	inFlight prometheus.Gauge
	watchers prometheus.Gauge
	database *prometheus.HistogramVec
	failures *prometheus.CounterVec
	leases   *prometheus.GaugeVec
	outboxes *outboxCollector

	incidents *prometheus.GaugeVec
	steps     *prometheus.HistogramVec
}

func newServerMetrics(s *store.Store) *serverMetrics {
	m := &serverMetrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ringwall_http_requests_total", Help: "Requests that were answered, by route and status.",
		}, []string{"route", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "ringwall_http_request_duration_seconds", Help: "How long requests took; streams and held requests count as a whole.",
			Buckets: []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 30, 60},
		}, []string{"route"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ringwall_http_requests_in_flight", Help: "Requests under way, streams included.",
		}),
		watchers: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ringwall_feed_watchers", Help: "Clients that follow the change feed.",
		}),
		database: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "ringwall_database_transaction_seconds", Help: "How long transactions took, waiting for their turn included.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30},
		}, []string{"kind"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ringwall_database_errors_total", Help: "Transactions that the database failed, not those that were refused.",
		}, []string{"kind"}),
		leases: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ringwall_lease_held", Help: "1 while this replica runs the loop of a lease.",
		}, []string{"lease"}),
		outboxes: &outboxCollector{store: s},
		incidents: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ringwall_incidents_open", Help: "Incidents that are not closed, as the replica that tells people sees them.",
		}, []string{"severity"}),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "ringwall_incident_step_seconds", Help: "From the opening of an incident to its first page, acknowledgement, mitigation and resolution.",
			Buckets: []float64{1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600},
		}, []string{"step"}),
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		m.requests, m.duration, m.inFlight, m.watchers, m.database, m.failures, m.leases, m.outboxes, m.incidents, m.steps)
	return m
}

// held implements control.Leader.Held.
func (m *serverMetrics) held(lease string, yes bool) {
	n := 0.0
	if yes {
		n = 1
	}
	m.leases.WithLabelValues(lease).Set(n)
}

// incident implements incidents.Observe.
func (m *serverMetrics) incident(step string, took time.Duration) {
	m.steps.WithLabelValues(step).Observe(took.Seconds())
}

// openIncidents says how much goes on.
func (m *serverMetrics) openIncidents(n map[incident.Severity]int) {
	for severity, k := range n {
		m.incidents.WithLabelValues(string(severity)).Set(float64(k))
	}
}

// outbox adds an outbox whose lag is shown.
func (m *serverMetrics) outbox(name string) { m.outboxes.add(name) }

// handler measures what a handler answers. The route is the pattern that the
// multiplexer found, never the path.
func (m *serverMetrics) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		gauges := []prometheus.Gauge{m.inFlight}
		if r.URL.Path == "/ringwall/watch" {
			gauges = append(gauges, m.watchers)
		}
		for _, g := range gauges {
			g.Inc()
		}
		began, out := time.Now(), &statusWriter{ResponseWriter: w, status: http.StatusOK}
		defer func() {
			for _, g := range gauges {
				g.Dec()
			}
			route := r.Pattern
			if route == "" {
				route = "none"
			}
			m.requests.WithLabelValues(route, strconv.Itoa(out.status)).Inc()
			m.duration.WithLabelValues(route).Observe(time.Since(began).Seconds())
		}()
		next.ServeHTTP(out, r)
	})
}

// statusWriter remembers the status.
type statusWriter struct {
	http.ResponseWriter
	status int
	wrote  bool
}

func (w *statusWriter) WriteHeader(status int) {
	if !w.wrote {
		w.status, w.wrote = status, status >= http.StatusOK
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	w.wrote = true
	return w.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// timed is a store whose transactions are measured.
type timed struct {
	control.Store
	m *serverMetrics
}

// store measures the transactions of a store.
func (m *serverMetrics) store(s control.Store) control.Store { return timed{s, m} }

// Write implements control.Store.
func (t timed) Write(ctx context.Context, fn func(control.Tx) error) error {
	return t.m.transaction("write", func() error { return t.Store.Write(ctx, fn) })
}

// Read implements control.Store.
func (t timed) Read(ctx context.Context, fn func(control.Tx) error) error {
	return t.m.transaction("read", func() error { return t.Store.Read(ctx, fn) })
}

func (m *serverMetrics) transaction(kind string, run func() error) error {
	began := time.Now()
	err := run()
	m.database.WithLabelValues(kind).Observe(time.Since(began).Seconds())
	if store.Broken(err) {
		m.failures.WithLabelValues(kind).Inc()
	}
	return err
}

// outboxCollector asks the database how far the audit log is, and how far others
// were told of it.
type outboxCollector struct {
	store *store.Store

	mu    sync.Mutex
	names []string
}

func (c *outboxCollector) add(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.names = append(c.names, name)
}

func descAudit() *prometheus.Desc {
	return prometheus.NewDesc("ringwall_audit_records", "Records of the audit log.", nil, nil)
}

func descPosition() *prometheus.Desc {
	return prometheus.NewDesc("ringwall_outbox_position", "The audit record that was told last, by receiver.", []string{"outbox"}, nil)
}

func descWaiting() *prometheus.Desc {
	return prometheus.NewDesc("ringwall_outbox_waiting_seconds", "How long the oldest audit record waits that a receiver was not told of; 0: none waits.", []string{"outbox"}, nil)
}

func descUp() *prometheus.Desc {
	return prometheus.NewDesc("ringwall_database_up", "1 if the database answered when this was asked.", nil, nil)
}

// Describe implements prometheus.Collector.
func (c *outboxCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descAudit(), descPosition(), descWaiting(), descUp()} {
		out <- d
	}
}

const scrapeTimeout = 5 * time.Second

// Collect implements prometheus.Collector. What the database does not answer is
// missing, and ringwall_database_up is 0.
func (c *outboxCollector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	up := 1.0
	if err := c.collect(ctx, out); err != nil {
		up = 0
	}
	out <- prometheus.MustNewConstMetric(descUp(), prometheus.GaugeValue, up)
}

func (c *outboxCollector) collect(ctx context.Context, out chan<- prometheus.Metric) error {
	c.mu.Lock()
	names := append([]string{}, c.names...)
	c.mu.Unlock()
	end, err := c.store.AuditEnd(ctx)
	if err != nil {
		return err
	}
	out <- prometheus.MustNewConstMetric(descAudit(), prometheus.GaugeValue, float64(end.Seq))
	for _, name := range names {
		position, _, err := c.store.Outbox(ctx, name)
		if err != nil {
			return err
		}
		next, err := c.store.AuditAfter(ctx, position, 1)
		if err != nil {
			return err
		}
		waiting := 0.0
		if len(next) > 0 {
			waiting = max(0, time.Since(next[0].At).Seconds())
		}
		out <- prometheus.MustNewConstMetric(descPosition(), prometheus.GaugeValue, float64(position), name)
		out <- prometheus.MustNewConstMetric(descWaiting(), prometheus.GaugeValue, waiting, name)
	}
	return nil
}

// addMetrics answers GET /metrics on an address of this machine. There is no
// authentication: whoever can reach the address reads numbers. Without an
// address there is nothing.
func (p *serverParts) addMetrics(ctx context.Context, address string, notef func(string, ...any)) error {
	if address == "" {
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return usage(fmt.Errorf("--metrics %q: want ADDRESS:PORT", address))
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return usage(fmt.Errorf("--metrics %q: only an address of this machine, such as 127.0.0.1:9477", address))
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(p.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 2 * scrapeTimeout}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute}
	notef("metrics on http://%s/metrics", l.Addr())
	p.loop(func(ctx context.Context) {
		defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
		_ = srv.Serve(l)
	})
	return nil
}
