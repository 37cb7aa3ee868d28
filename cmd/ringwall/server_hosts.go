package main

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ringwall/internal/control"
	"ringwall/internal/control/hosts"
	"ringwall/internal/httpapi"
	"ringwall/internal/pki"
	"ringwall/internal/store"
)

// addHosts adds what hosts call and what people ask about them. What it returns
// closes what hosts reported.
func (p *serverParts) addHosts(ctx context.Context, url, spool string, clients *pki.TLSAuthority, now func() time.Time) (closeEvents func() error, err error) {
	events, err := store.OpenEvents(ctx, url)
	if err != nil {
		return nil, err
	}
	o := hosts.Options{
		Door: p.door, Store: managed{p.store}, Events: events, Records: events, Clients: clients, Log: p.log, Now: now,
		Shared: p.store.Engine() == "postgres", Spool: spool, Attester: p.attester,
	}
	o.Blocks = p.blocks
	if p.hosts, err = hosts.New(ctx, o); err != nil {
		return nil, errors.Join(err, events.Close())
	}
	p.door.HandlePeers(control.PeerHost, p.hosts.Peer)
	p.loop(func(ctx context.Context) { _ = p.hosts.Run(ctx) })
	p.routes = append(p.routes, hostRoutes(p.hosts)...)
	p.metrics.hosts(p.hosts)
	return events.Close, nil
}

// hosts adds what was refused to hosts, and how many wait.
func (m *serverMetrics) hosts(s *hosts.Service) {
	refused := func(why string, get func(hosts.Counters) uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "ringwall_hosts_refused_total", Help: "What hosts, or those who say they are, were refused, by reason.", ConstLabels: prometheus.Labels{"why": why},
		}, func() float64 { return float64(get(s.Counters())) })
	}
	m.registry.MustRegister(
		refused("join-token", func(c hosts.Counters) uint64 { return c.BadTokens }),
		refused("certificate", func(c hosts.Counters) uint64 { return c.Unknown }),
		refused("bound", func(c hosts.Counters) uint64 { return c.Limited }),
		refused("malformed", func(c hosts.Counters) uint64 { return c.Malformed }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "ringwall_hosts_records_total", Help: "Records of hosts that were stored."},
			func() float64 { return float64(s.Counters().Records) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "ringwall_hosts_gaps_total", Help: "Times that records of a host were missing."},
			func() float64 { return float64(s.Counters().Gaps) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "ringwall_hosts_waiting", Help: "Hosts that wait for something now."},
			func() float64 { return float64(s.Counters().Waiting) }),
	)
}

func hostRoutes(s *hosts.Service) []httpapi.Route {
	agentPath, agent := s.AgentHandler()
	enrolPath, enrol := s.EnrolHandler()
	// Connect bounds the messages, each by what it is
	const largest = 20 << 20
	return []httpapi.Route{
		{Method: http.MethodPost, Path: agentPath, Who: s.Authenticate, MaxBody: largest, Serve: served(agent)},
		{Method: http.MethodPost, Path: enrolPath, Who: anybody, MaxBody: 1 << 20, Serve: served(enrol)},
		{
			Method: http.MethodGet, Path: "/ringwall/fleet/hosts", Serve: s.ServeHosts, Summary: "Hosts as they are now", Answer: hosts.Listing{},
			Query: []httpapi.Query{{Name: "below", About: "place in the tree"}, {Name: "host", About: "only the host of this name or id"}},
		},
		{
			Method: http.MethodGet, Path: "/ringwall/fleet/inventory", Serve: s.ServeInventory, Summary: "What runs on hosts",
			Query: []httpapi.Query{{Name: "below", About: "place in the tree"}, {Name: "since", About: "RFC 3339 time"}, {Name: "limit", About: "how many, at most"}},
		},
		{
			Method: http.MethodGet, Path: "/ringwall/fleet/events", Serve: s.ServeEvents, Summary: "What a host reported, the newest first",
			Query: []httpapi.Query{
				{Name: "host", About: "id of the host's document"},
				{Name: "what", About: "block, notice, signal or lost"},
				{Name: "sha256", About: "only about this content"},
				{Name: "since", About: "RFC 3339 time"},
				{Name: "limit", About: "how many, at most"},
			},
		},
		{Method: http.MethodPost, Path: "/ringwall/fleet/chunks", Serve: s.ServeMissing, Summary: "Which chunks must be pushed", Body: hosts.Question{}, Answer: hosts.Question{}},
		{Method: http.MethodGet, Path: "/ringwall/fleet/chunks/{sha256}", Serve: s.ServeContent, Slow: 10 * time.Minute},
		{Method: http.MethodPut, Path: "/ringwall/fleet/chunks/{sha256}", Serve: s.ServeChunk, MaxBody: hosts.MaxChunk + 1, Slow: 10 * time.Minute},
	}
}

// anybody is who joins: what makes it a host is the join token in the message,
// which the handler demands.
func anybody(*http.Request) (*control.Actor, error) {
	return &control.Actor{ID: "", Name: "joining host"}, nil
}

func served(h http.Handler) httpapi.Handler {
	return func(w http.ResponseWriter, r *http.Request, _ control.Actor) error {
		h.ServeHTTP(w, r)
		return nil
	}
}
