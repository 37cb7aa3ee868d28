package rollout

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Verdict is what the evidence about a ring says. Only Pass promotes.
type Verdict string

// The verdicts, the weakest first.
const (
	Pass Verdict = "pass"
	Hold Verdict = "hold" // not enough is known, or a person is wanted
	Fail Verdict = "fail" // the change does harm: go back
)

func (v Verdict) rank() int { return slices.Index([]Verdict{Pass, Hold, Fail}, v) }

// Reason is one thing that speaks for a verdict.
type Reason struct {
	Verdict Verdict  `json:"verdict"`
	Code    string   `json:"code"` // stable, for programs
	Text    string   `json:"text"`
	Hosts   []string `json:"hosts,omitempty"` // at most maxNamed, sorted
	Page    bool     `json:"page,omitempty"`  // an engineer must know now
}

const maxNamed = 20

// Judgement is the verdict on a ring with all that speaks for it.
type Judgement struct {
	Verdict Verdict  `json:"verdict"`
	Reasons []Reason `json:"reasons"`
}

func (j *Judgement) say(v Verdict, code, text string, hosts ...string) *Reason {
	slices.Sort(hosts)
	j.Reasons = append(j.Reasons, Reason{Verdict: v, Code: code, Text: text, Hosts: hosts[:min(len(hosts), maxNamed)]})
	if v.rank() > j.Verdict.rank() {
		j.Verdict = v
	}
	return &j.Reasons[len(j.Reasons)-1]
}

// Member is what is known of a host of the rollout.
type Member struct {
	Host
	Ring     int
	Admitted time.Time // when it was offered the change; zero: not yet
	// Applied is when the host first reported the change's content from the
	// kernel, not when it had downloaded it; zero: not yet.
	Applied time.Time
	Online  bool // heard from within the time after which a host counts as offline
	// Silent: it applied the change and has not been heard of for three heartbeats since.
	Silent bool
	// Refused is why the host could not load the change or went back by itself.
	Refused string
	// Flips are distinct objects denied under the change that the bundle before
	// allows: proof that the change did it, without statistics.
	Flips int
	// Back: it reports the rollback's content.
	Back bool
}

// Signal is something that changed and unchanged hosts are compared by.
type Signal struct {
	Name     string
	Subjects []Subject
}

// Probe is an outside answer: a query, a command, a person, an incident tracker.
type Probe struct {
	Name   string
	NoData Verdict // what no answer means; anything but Fail is Hold
	Answer Verdict // "" for none
	Text   string
}

// View is all that a decision is made from.
type View struct {
	Members  []Member // everyone in scope
	Signals  []Signal
	Probes   []Probe
	Coverage float64 // see Bake.Coverage, of the ring that bakes
	// Quiet is the share of hosts without the change that are not heard of now,
	// 0 to 1; 1 if there are none. Silence of hosts that have it proves nothing
	// while the others are silent too: it is the server that is cut off.
	Quiet float64
	// Incidents are open ones that belong to the change.
	Incidents []string
	// Lag is how far behind the reading of reports is; a gate that is blind holds.
	Lag time.Duration
	// Blind is why reports are not to be had now; empty: they are.
	Blind string
	// Freeze is why nothing may be promoted now; empty: it may.
	Freeze string
	// Halt is why a person, or a stop of every rollout, keeps it from going on.
	Halt string
}

// Judge says how the ring with number at stands, and the ones before it: harm
// that shows late in an earlier ring fails the rollout all the same. baking is
// when the ring converged; zero: it has not.
func (p *Plan) Judge(at int, baking time.Time, v *View, now time.Time) Judgement {
	j := Judgement{Verdict: Pass}
	p.judgeFlips(&j, at, v)
	p.judgeHosts(&j, at, v)
	p.judgeSignals(&j, v)
	for i := range v.Probes {
		judgeProbe(&j, &v.Probes[i])
	}
	p.judgeBake(&j, at, baking, v, now)
	slices.SortStableFunc(j.Reasons, func(a, b Reason) int { return cmp.Compare(b.Verdict.rank(), a.Verdict.rank()) })
	return j
}

// members yields the hosts of the rings up to at that were admitted.
func (v *View) members(at int, yield func(*Member)) {
	for i := range v.Members {
		if m := &v.Members[i]; m.Ring <= at && !m.Admitted.IsZero() {
			yield(m)
		}
	}
}

func (p *Plan) judgeFlips(j *Judgement, at int, v *View) {
	size := make([]int, len(p.Rings))
	for i := range v.Members {
		size[v.Members[i].Ring]++
	}
	var hosts []string
	enough := false
	v.members(at, func(m *Member) {
		if m.Flips == 0 {
			return
		}
		hosts = append(hosts, m.ID)
		if m.Critical || size[m.Ring] <= cmp.Or(p.Limits.SmallRing, DefaultSmallRing) {
			enough = true
		}
	})
	switch {
	case len(hosts) == 0:
	case enough || len(hosts) >= cmp.Or(p.Limits.FlipHosts, DefaultFlipHosts):
		j.say(Fail, "flips", fmt.Sprintf("%s denied what the bundle before allows", count(len(hosts), "host")), hosts...).Page = true
	default:
		j.say(Hold, "flip", "one host denied what the bundle before allows: look before it goes on", hosts...).Page = true
	}
}

// judgeHosts looks at hosts that could not take the change, or that it silenced.
// Machines die and networks fail without any change: what is rare among many
// hosts is left to the comparison with unchanged ones, see Evidence.
func (p *Plan) judgeHosts(j *Judgement, at int, v *View) {
	var refused, silent []string
	members := 0
	v.members(at, func(m *Member) {
		members++
		switch {
		case m.Refused != "":
			refused = append(refused, m.ID)
		case m.Silent:
			silent = append(silent, m.ID)
		}
	})
	for _, c := range []struct {
		code, text string
		hosts      []string
	}{
		{"refused", "could not load the change or went back to the bundle before", refused},
		{"silent", "not heard of since the change was applied", silent},
	} {
		n := len(c.hosts)
		text := fmt.Sprintf("%s of %d %s", count(n, "host"), members, c.text)
		switch {
		case n == 0:
		case c.code == "silent" && float64(n) <= moreSilent*v.Quiet*float64(members):
			j.say(Hold, c.code, text+"; so are others, or there are no others: the server may be cut off", c.hosts...).Page = true
		case n >= 2 && 100*n > tolerated*members:
			j.say(Fail, c.code, text, c.hosts...).Page = true
		case members <= cmp.Or(p.Limits.SmallRing, DefaultSmallRing):
			j.say(Hold, c.code, text, c.hosts...).Page = true
		default:
			j.say(Pass, c.code, text, c.hosts...)
		}
	}
}

// moreSilent is how many times more often than others hosts with the change must
// be silent, to speak against it.
const moreSilent = 3

// tolerated is the percentage of hosts that may fail by themselves.
const tolerated = 2

// judgeSignals splits the chance of a false alarm over the signals.
func (p *Plan) judgeSignals(j *Judgement, v *View) {
	if len(v.Signals) == 0 {
		return
	}
	limit := float64(len(v.Signals)) / cmp.Or(p.Limits.FalseAlarm, DefaultFalseAlarm)
	for i := range v.Signals {
		s := &v.Signals[i]
		if e := Evidence(s.Subjects); e >= limit {
			var hosts []string
			for k := range s.Subjects {
				if x := &s.Subjects[k]; !x.Hit.IsZero() && !x.Activated.IsZero() && !x.Hit.Before(x.Activated) {
					hosts = append(hosts, x.ID)
				}
			}
			j.say(Fail, "signal", fmt.Sprintf("%s: hosts with the change are hit more often than the others (evidence %.3g, limit %.3g)", s.Name, e, limit), hosts...).Page = true
		}
	}
}

func judgeProbe(j *Judgement, p *Probe) {
	answer, text := p.Answer, p.Text
	if answer.rank() < 0 {
		text = "no data"
		if answer = Hold; p.NoData == Fail {
			answer = Fail
		}
	}
	if answer != Pass {
		j.say(answer, "probe", p.Name+": "+text).Page = answer == Fail
	}
}

func (p *Plan) judgeBake(j *Judgement, at int, baking time.Time, v *View, now time.Time) {
	if v.Halt != "" {
		j.say(Hold, "halted", v.Halt)
	}
	if v.Freeze != "" {
		j.say(Hold, "frozen", v.Freeze)
	}
	if len(v.Incidents) > 0 {
		j.say(Hold, "incident", count(len(v.Incidents), "incident")+" of this change is open: "+v.Incidents[0])
	}
	if baking.IsZero() {
		online, applied, late := p.converged(at, v, now)
		j.say(Hold, "converging", fmt.Sprintf("%d of %d online hosts have applied the change", applied, online), late...).Page = len(late) > 0
		return
	}
	b := &p.Rings[at].Bake
	if left := b.Time - now.Sub(baking); left > 0 {
		j.say(Hold, "baking", "bakes for another "+left.Round(time.Second).String())
	}
	switch {
	case v.Blind != "":
		j.say(Hold, "blind", v.Blind)
	case v.Lag > max(b.Time/10, time.Minute):
		j.say(Hold, "blind", "reports are read "+v.Lag.Round(time.Second).String()+" late")
	}
	hours, there := 0.0, 0
	v.members(at, func(m *Member) {
		if m.Ring == at && m.Online && !m.Applied.IsZero() {
			there++
			hours += now.Sub(m.Applied).Hours()
		}
	})
	if there == 0 {
		j.say(Hold, "nobody", "no host of the ring that has the change is heard of now")
	}
	if hours < b.HostHours {
		j.say(Hold, "host-hours", fmt.Sprintf("%.1f of %.1f host hours", hours, b.HostHours))
	}
	if at+1 < len(p.Rings) && v.Coverage < b.Coverage {
		j.say(Hold, "coverage", fmt.Sprintf("%.0f %% of what the next ring runs was seen here, %.0f %% are wanted", 100*v.Coverage, 100*b.Coverage))
	}
}

// converged counts the online members of a ring and those that applied the
// change, and names those that had time enough. Offline hosts are in neither;
// they take what is admitted when they return.
func (p *Plan) converged(at int, v *View, now time.Time) (online, applied int, late []string) {
	v.members(at, func(m *Member) {
		if m.Ring != at || !m.Online || m.Refused != "" {
			return
		}
		online++
		switch {
		case !m.Applied.IsZero():
			applied++
		case now.Sub(m.Admitted) > cmp.Or(p.Limits.ApplyTime, DefaultApplyTime):
			late = append(late, m.ID)
		}
	})
	return online, applied, late
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
