package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/httpapi"
	"ringwall/internal/incident"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// addRollouts adds the engine that moves rollouts, after addHosts. probes are
// what probe URLs must begin with.
func (p *serverParts) addRollouts(probes []string, now func() time.Time) {
	p.rollouts = rollouts.New(rollouts.Options{
		Door: p.door, Store: managed{p.store}, Fleet: p.hosts, Content: p.hosts, Inventory: p.hosts, Log: p.log, Now: now,
		MayAsk:    func(u *url.URL) bool { return mayAsk(probes, u) },
		Incidents: p.incidents.Open, Page: p.pageRollout,
	})
	p.lead(rollouts.Lease, p.rollouts.Run)
	p.routes = append(p.routes, httpapi.Route{
		Method: http.MethodGet, Path: progressPath, Summary: "How a rollout stands at this moment", Answer: rollouts.Progress{},
		Query: []httpapi.Query{{Name: "id", About: "id of the rollout's document"}},
		Serve: func(w http.ResponseWriter, r *http.Request, by control.Actor) error {
			id, err := resource.ParseID(r.URL.Query().Get("id"))
			if err != nil {
				return err
			}
			out, err := p.rollouts.Progress(r.Context(), by, id)
			if err != nil {
				return err
			}
			b, err := json.Marshal(out)
			if err != nil {
				return err
			}
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			_, _ = w.Write(append(b, '\n')) // the client may be gone
			return nil
		},
	})
}

// pageRollout opens an incident for a rollout that waits or stopped for
// something that an engineer must know.
func (p *serverParts) pageRollout(ctx context.Context, id resource.ID, why rollout.Reason) {
	now := time.Now()
	err := p.incidents.Blocks(ctx, []incident.Event{{
		ID: fmt.Sprintf("%s/%s/%d", id, why.Code, now.Unix()), Scope: id.Parent().String(), Host: id.Name(), Name: "rollout " + id.Name(),
		Kind: incident.KindNotice, Reason: "rollout-" + why.Code, Rule: fmt.Sprintf("rollout %s: %s", id.Name(), why.Text), Mode: "enforce", Count: 1, At: now,
	}})
	if err != nil && ctx.Err() == nil {
		p.log.ErrorContext(ctx, "rollout_not_paged", slog.String("rollout", id.String()), slog.Any("error", err))
	}
}

const progressPath = "/ringwall/fleet/rollout"

// mayAsk compares scheme and host whole, and the path segment by segment: what
// begins alike is not allowed for that.
func mayAsk(prefixes []string, u *url.URL) bool {
	for _, s := range prefixes {
		p, err := url.Parse(s)
		if err != nil || p.Scheme != u.Scheme || !strings.EqualFold(p.Host, u.Host) {
			continue
		}
		at, below := u.JoinPath().Path, strings.TrimSuffix(p.Path, "/")
		if at == below || strings.HasPrefix(at, below+"/") || below == "" {
			return true
		}
	}
	return false
}

// blocks hands on what hosts were refused: to the rollouts first, which stop at
// once, then to the incidents. Both may get the same again.
func (p *serverParts) blocks(ctx context.Context, all []incident.Event) error {
	if p.rollouts != nil {
		if err := p.rollouts.Blocks(ctx, all); err != nil {
			return err
		}
	}
	if p.incidents == nil {
		return nil
	}
	for i := range all {
		all[i].Name = p.hosts.Name(all[i].Host)
	}
	return p.incidents.Blocks(ctx, all)
}
