package rollout

import "time"

// Record is what must be remembered of a host of a rollout: the rest of Member
// is what the host reports now.
type Record struct {
	Host     string
	Ring     int
	Entered  time.Time // online for the first time since the rollout began; zero: not yet
	Admitted time.Time // zero: not yet
	Applied  time.Time // first report of the change in force; zero: none
	Base     Base
}

// Base is how a host stood when it entered: what was wrong before is not the
// change's doing.
type Base struct {
	Boot        string   `json:"boot,omitempty"`
	AgentStarts uint32   `json:"agent_starts,omitempty"` // since that boot
	FailedUnits []string `json:"failed_units,omitempty"`
}

// Hit is the first time that a signal was seen on a host since it entered. It
// is never taken back.
type Hit struct {
	Host   string
	Signal string
	At     time.Time // received, by the server's clock
	Text   string
}
