package rollouts_test

import (
	"errors"
	"testing"
	"time"

	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/rollout"
)

func TestHalt_holds(t *testing.T) {
	weekend := rollouts.Halt{TimeZone: "Europe/Berlin", Weekly: []rollouts.Window{
		{Days: []string{"fri"}, From: "16:00", To: "24:00"},
		{Days: []string{"sat", "sun"}, From: "00:00", To: "24:00"},
		{Days: []string{"tue"}, From: "22:00", To: "04:00"},
	}}
	at := func(s string) time.Time {
		x, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for _, tc := range []struct {
		halt rollouts.Halt
		at   string
		want bool
	}{
		{rollouts.Halt{}, "2031-05-01T12:00:00Z", true},
		{rollouts.Halt{Until: at("2031-05-01T12:00:00Z")}, "2031-05-01T11:59:59Z", true},
		{rollouts.Halt{Until: at("2031-05-01T12:00:00Z")}, "2031-05-01T12:00:00Z", false},
		{rollouts.Halt{From: at("2031-05-01T12:00:00Z")}, "2031-05-01T11:59:59Z", false},
		{rollouts.Halt{From: at("2031-05-01T12:00:00Z")}, "2031-05-01T12:00:00Z", true},
		// Friday the 2nd, two hours ahead of UTC
		{weekend, "2031-05-02T13:59:59Z", false},
		{weekend, "2031-05-02T14:00:00Z", true},
		{weekend, "2031-05-02T21:59:59Z", true},
		{weekend, "2031-05-04T21:59:00Z", true},
		{weekend, "2031-05-04T22:00:00Z", false},
		// in winter it is one hour
		{weekend, "2031-12-05T14:59:00Z", false},
		{weekend, "2031-12-05T15:00:00Z", true},
		// over midnight, and only from Tuesday to Wednesday
		{weekend, "2031-05-06T20:00:00Z", true},
		{weekend, "2031-05-07T01:59:00Z", true},
		{weekend, "2031-05-07T02:00:00Z", false},
		{weekend, "2031-05-06T01:00:00Z", false},
		{weekend, "2031-05-07T20:00:00Z", false},
		// what cannot be evaluated holds
		{rollouts.Halt{TimeZone: "Mars/Base", Weekly: weekend.Weekly}, "2031-05-07T20:00:00Z", true},
		{rollouts.Halt{Weekly: []rollouts.Window{{Days: []string{"moonday"}}}}, "2031-05-07T20:00:00Z", true},
	} {
		if got := tc.halt.Holds(at(tc.at)); got != tc.want {
			t.Errorf("%+v at %s: %v", tc.halt, tc.at, got)
		}
	}
}

func TestHalt_refused(t *testing.T) {
	w := newWorld(t, 1, newKeys(t))
	for doc, ok := range map[string]bool{
		`{"reason":"x"}`: true,
		`{"reason":"x","until":"2031-05-01T12:00:00Z"}`:                                                      true,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"16:00","to":"24:00"}],"time_zone":"Europe/Berlin"}`: true,
		`{}`: false,
		`{"reason":"x","from":"2031-05-01T12:00:00Z","until":"2031-05-01T12:00:00Z"}`:                                false,
		`{"reason":"x","time_zone":"Europe/Berlin"}`:                                                                 false,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"16:00","to":"24:00"}],"time_zone":"Europe/Nowhere"}`:        false,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"16:00","to":"24:00"}],"time_zone":"Local"}`:                 false,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"16:00","to":"24:00"}],"time_zone":"../../../etc/hostname"}`: false,
		`{"reason":"x","weekly":[{"days":[],"from":"16:00","to":"24:00"}]}`:                                          false,
		`{"reason":"x","weekly":[{"days":["Friday"],"from":"16:00","to":"24:00"}]}`:                                  false,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"16","to":"24:00"}]}`:                                        false,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"16:00","to":"24:01"}]}`:                                     false,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"16:00","to":"16:00"}]}`:                                     false,
		`{"reason":"x","weekly":[{"days":["fri"],"from":"+6:00","to":"16:00"}]}`:                                     false,
	} {
		err := w.tryPut(ana(), halts+"x", doc)
		if (err == nil) != ok || err != nil && !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", doc, err)
		}
	}
}

// A freeze keeps a rollout from going on, and not from going back.
func TestEngine_freeze(t *testing.T) {
	w := newWorld(t, 30, newKeys(t))
	w.begin(tenth)
	w.until(change, rollout.Running, time.Minute, 5)
	w.tick(time.Minute)
	w.tick(time.Minute)
	// it is Thursday noon
	w.put(halts+"evening", `{"reason":"nobody is there","weekly":[{"days":["thu"],"from":"12:00","to":"20:00"}]}`)
	had := w.fleet.count(isOn(w.good))
	for range 6 * 7 {
		w.tick(10 * time.Minute)
	}
	if s, n := w.status(change), w.fleet.count(isOn(w.good)); s.Ring != 0 || n != had || had == 0 {
		t.Errorf("ring %d, %d hosts, %d before", s.Ring, n, had)
	}
	for range 8 {
		w.tick(10 * time.Minute)
	}
	if s := w.status(change); s.Ring != 1 {
		t.Errorf("ring %d after the freeze", s.Ring)
	}
	w.put(halts+"evening", `{"reason":"nobody is there","weekly":[{"days":["thu","fri"],"from":"00:00","to":"24:00"}]}`)
	w.must(bob(), change, "rollback", `{}`)
	w.until(change, rollout.RolledBack, time.Minute, 5)
}
