package rollouts

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
)

// Halt is what the document of a halt holds: no rollout that touches its scope
// goes on while it is there. Going back is never halted.
//
// With From or Weekly it is a freeze, known beforehand: it holds within its
// times, and an emergency passes it.
type Halt struct {
	Reason string    `json:"reason"`
	From   time.Time `json:"from,omitzero"`
	Until  time.Time `json:"until,omitzero"` // its end; zero: when it is deleted
	// Weekly are windows of each week in a time zone.
	Weekly   []Window `json:"weekly,omitempty"`
	TimeZone string   `json:"time_zone,omitempty"` // of the IANA database, such as Europe/Berlin; "" is UTC
}

// Window is a time of some days of the week, by the clock on the wall.
type Window struct {
	Days []string `json:"days"` // mon, tue, wed, thu, fri, sat, sun
	From string   `json:"from"` // 16:00
	To   string   `json:"to"`   // 24:00; before From: until the next day
}

const maxWindows = 50

func parseHalt(d *resource.Document) (*Halt, error) {
	var h Halt
	if err := strict(d.Properties, &h); err != nil {
		return nil, fmt.Errorf("halt: %w", err)
	}
	return &h, nil
}

func checkHalt(_ context.Context, _ control.Tx, _, d *resource.Document) error {
	h, err := parseHalt(d)
	switch {
	case err != nil:
		return err
	case h.Reason == "" || len(h.Reason) > maxText:
		return invalid("halt: reason is missing or longer than %d bytes", maxText)
	case !h.Until.IsZero() && !h.Until.After(h.From):
		return invalid("halt: ends before it begins")
	case len(h.Weekly) > maxWindows:
		return invalid("halt: %d windows (at most %d)", len(h.Weekly), maxWindows)
	case len(h.Weekly) == 0 && h.TimeZone != "":
		return invalid("halt: a time zone without weekly windows")
	}
	if _, err := h.zone(); err != nil {
		return err
	}
	for i := range h.Weekly {
		if _, _, _, err := h.Weekly[i].parse(); err != nil {
			return err
		}
	}
	return nil
}

func (h *Halt) zone() (*time.Location, error) {
	if strings.EqualFold(h.TimeZone, "local") {
		return nil, invalid("halt: time zone %q is another on every machine", h.TimeZone)
	}
	l, err := time.LoadLocation(h.TimeZone)
	if err != nil {
		return nil, invalid("halt: time zone %.80q: %v", h.TimeZone, err)
	}
	return l, nil
}

// freeze says whether it is one, or stops everything as long as it is there.
func (h *Halt) freeze() bool { return !h.From.IsZero() || len(h.Weekly) > 0 }

// Holds says whether nothing may go on at a time. What cannot be evaluated
// here, such as a time zone that this machine does not have, holds: it fails
// closed.
func (h *Halt) Holds(now time.Time) bool {
	switch {
	case now.Before(h.From), !h.Until.IsZero() && !now.Before(h.Until):
		return false
	case len(h.Weekly) == 0:
		return true
	}
	zone, err := h.zone()
	if err != nil {
		return true
	}
	local := now.In(zone)
	return slices.ContainsFunc(h.Weekly, func(w Window) bool { return w.holds(local) })
}

func (w *Window) holds(local time.Time) bool {
	days, from, to, err := w.parse()
	if err != nil {
		return true
	}
	minute := 60*local.Hour() + local.Minute()
	today := local.Weekday()
	if to > from {
		return days[today] && minute >= from && minute < to
	}
	return days[today] && minute >= from || days[(today+6)%7] && minute < to
}

// parse returns the days, by time.Weekday, and minutes of the day.
func (w *Window) parse() (days [7]bool, from, to int, err error) {
	names := []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}
	if len(w.Days) == 0 {
		return days, 0, 0, invalid("halt: a window without days")
	}
	for _, d := range w.Days {
		i := slices.Index(names, d)
		if i < 0 {
			return days, 0, 0, invalid("halt: day %.20q (want one of %s)", d, strings.Join(names, ", "))
		}
		days[i] = true
	}
	from, err1 := minuteOf(w.From)
	to, err2 := minuteOf(w.To)
	if err := errors.Join(err1, err2); err != nil {
		return days, 0, 0, err
	}
	if from == to || from == 24*60 {
		return days, 0, 0, invalid("halt: a window from %s to %s", w.From, w.To)
	}
	return days, from, to, nil
}

func minuteOf(s string) (int, error) {
	h, m, ok := strings.Cut(s, ":")
	hours, err1 := strconv.ParseUint(h, 10, 8)
	minutes, err2 := strconv.ParseUint(m, 10, 8)
	if !ok || len(h) != 2 || len(m) != 2 || err1 != nil || err2 != nil || minutes > 59 || 60*hours+minutes > 24*60 {
		return 0, invalid("halt: time %.20q (want 00:00 to 24:00)", s)
	}
	return int(60*hours + minutes), nil
}

// stops are the halts that hold for a scope now.
type stops struct{ halt, freeze string }

// stopsAt reads the halts in a transaction. A document that cannot be read
// stops everything: it fails closed.
func stopsAt(ctx context.Context, tx control.Tx, scope resource.ID, now time.Time) (stops, error) {
	var out stops
	err := each(ctx, tx, fleet.TypeHalt, func(d *resource.Document) error {
		if !overlaps(d.ID.Parent(), scope) {
			return nil
		}
		h, err := parseHalt(d)
		switch {
		case err != nil:
			out.halt = fmt.Sprintf("halt %s cannot be read: %v", d.ID.Name(), err)
		case !h.Holds(now):
		case h.freeze():
			out.freeze = fmt.Sprintf("%s (%s, by %s)", h.Reason, d.ID.Name(), d.System.ModifiedBy)
		default:
			out.halt = fmt.Sprintf("%s (%s, by %s)", h.Reason, d.ID.Name(), d.System.ModifiedBy)
		}
		return nil
	})
	return out, err
}

// each visits every document of a type.
func each(ctx context.Context, tx control.Tx, kind string, visit func(*resource.Document) error) error {
	q := resource.Query{Type: strings.ToLower(kind), Limit: resource.MaxPage}
	for {
		page, err := tx.List(ctx, q)
		if err != nil {
			return err
		}
		for i := range page {
			if err := visit(&page[i]); err != nil {
				return err
			}
		}
		if len(page) < q.Limit {
			return nil
		}
		q.After = page[len(page)-1].ID.Key()
	}
}

// records finds the methods that keep what is remembered of hosts.
func records(tx control.Tx) (Records, error) {
	r, ok := tx.(Records)
	if !ok {
		return nil, fmt.Errorf("this store keeps no rollouts: %w", errs.Unsupported)
	}
	return r, nil
}
