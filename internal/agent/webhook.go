package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"time"

	"ringwall/internal/errs"
)

// webhook posts alerts, one JSON record each, in order, from one goroutine. An
// alert that does not get through is tried again for a while; alerts are on the
// disk in any case.
type webhook struct {
	url    string
	client *http.Client
	queue  chan []byte
	log    *slog.Logger
}

const (
	hookQueue = 1024
	hookTries = 6
)

// checkWebhook refuses anything but https, except to this machine itself.
func checkWebhook(raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil {
		return fmt.Errorf("webhook %q: want https://host/path without a password: %w", raw, errs.Invalid)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "https" || u.Scheme == "http" && ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("webhook %q: want https (http only to 127.0.0.1 or [::1]): %w", raw, errs.Invalid)
}

func newWebhook(u string, log *slog.Logger) *webhook {
	return &webhook{
		url: u, queue: make(chan []byte, hookQueue), log: log,
		client: &http.Client{Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}
}

func (h *webhook) start(ctx context.Context) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case b := <-h.queue:
				h.deliver(ctx, b)
			case <-ctx.Done():
				return
			}
		}
	}()
	return done
}

// post queues an alert; when the queue is full the alert is on the disk only.
func (h *webhook) post(r *Record) {
	if h.url == "" {
		return
	}
	b, err := json.Marshal(r)
	if err != nil {
		return
	}
	select {
	case h.queue <- b:
	default:
	}
}

func (h *webhook) deliver(ctx context.Context, b []byte) {
	wait := time.Second
	for i := range hookTries {
		err := h.once(ctx, b)
		if err == nil {
			return
		}
		if i == hookTries-1 {
			h.log.WarnContext(ctx, "alert was not delivered; it is in the event log", slog.Any("error", err))
			return
		}
		select {
		case <-time.After(wait):
			wait *= 2
		case <-ctx.Done():
			return
		}
	}
}

func (h *webhook) once(ctx context.Context, b []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, bytes.NewReader(b))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := h.client.Do(req)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("webhook answers %s", resp.Status)
	}
	return nil
}
