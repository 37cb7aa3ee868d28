package csv

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// runVersion is that of the lines by which a guest reports.
const runVersion = 1

// Phases of a trial run, in order.
const (
	PhaseBoot    = "boot" // before anything of the candidate was there
	PhaseInstall = "install"
	PhaseSmoke   = "smoke"
)

// RunLine is one line, in JSON, of what a guest reports.
type RunLine struct {
	Version int        `json:"version"`
	Step    string     `json:"step,omitempty"` // what begins, for a person
	Kernel  string     `json:"kernel,omitempty"`
	Event   *RunEvent  `json:"event,omitempty"`
	Failed  *RunFailed `json:"failed,omitempty"`
	Lost    uint64     `json:"lost,omitempty"`  // events that were raised and not recorded
	Blind   bool       `json:"blind,omitempty"` // what the image's shell reads raises no events
	End     bool       `json:"end,omitempty"`   // everything was reported
}

// RunEvent is something that the policy would have refused, as the guest's agent
// recorded it.
type RunEvent struct {
	Phase   string `json:"phase"`
	Reason  string `json:"reason"` // as in the agent's records: unlisted, memory-wx, …
	Text    string `json:"text"`
	Kind    string `json:"kind,omitempty"`
	Path    string `json:"path,omitempty"`
	Detail  string `json:"detail,omitempty"`
	SHA256  string `json:"sha256,omitempty"` // of the content; of what lay at Path at the end where the kernel had none
	Process string `json:"process,omitempty"`
	// Old says that the file was there before the candidate was installed. What
	// is gone at the end is not.
	Old bool `json:"old,omitempty"`
}

// RunFailed is a step of the trial that failed: what it tried, and what was said.
type RunFailed struct {
	What   string `json:"what"`
	Output string `json:"output,omitempty"` // its end
	// Command says that it was a command of the caller's or the installation;
	// otherwise the trial itself could not be made.
	Command bool `json:"command,omitempty"`
}

// Run is what a guest reported.
type Run struct {
	Kernel string
	Events []RunEvent
	Failed []RunFailed
	Lost   uint64
	Blind  bool
	Ended  bool
	Lines  int
}

// Bounds of a report.
const (
	maxRunLine   = 256 << 10
	maxRunEvents = 50_000
	maxRunText   = 8 << 10 // of each text
)

// ParseRun reads a guest's report until it ends, and says each step to step,
// unless that is nil. The guest ran the candidate as root: its report is believed
// where it finds something, and shows nothing where it finds nothing but that an
// honest candidate would pass.
func ParseRun(r io.Reader, step func(string)) (*Run, error) {
	out := &Run{}
	in := bufio.NewReaderSize(r, maxRunLine)
	for !out.Ended {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return out, nil // a line without its end was cut
		}
		if err != nil {
			return nil, fmt.Errorf("csv: guest's report, line %d: %w: %w", out.Lines+1, err, errs.Invalid)
		}
		out.Lines++
		if err := out.line(line, step); err != nil {
			return nil, fmt.Errorf("csv: guest's report, line %d: %w", out.Lines, err)
		}
	}
	return out, nil
}

func (o *Run) line(b []byte, step func(string)) error {
	var l RunLine
	if err := json.Unmarshal(b, &l); err != nil {
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if l.Version != runVersion {
		return fmt.Errorf("version %d, want %d: %w", l.Version, runVersion, errs.Invalid)
	}
	if l.Kernel != "" {
		o.Kernel = clip(l.Kernel, 128)
	}
	if l.Step != "" && step != nil {
		step(clip(l.Step, 200))
	}
	if f := l.Failed; f != nil {
		if len(o.Failed) >= 100 {
			return fmt.Errorf("more than 100 failures: %w", errs.Invalid)
		}
		f.What, f.Output = clip(f.What, maxRunText), clip(f.Output, maxRunText)
		o.Failed = append(o.Failed, *f)
	}
	if l.Event != nil {
		if err := o.event(l.Event); err != nil {
			return err
		}
	}
	o.Lost += l.Lost
	o.Blind = o.Blind || l.Blind
	o.Ended = l.End
	return nil
}

func (o *Run) event(e *RunEvent) error {
	if len(o.Events) >= maxRunEvents {
		return fmt.Errorf("more than %d events: %w", maxRunEvents, errs.Invalid)
	}
	switch e.Phase {
	case PhaseBoot, PhaseInstall, PhaseSmoke:
	default:
		return fmt.Errorf("phase %.20q: %w", e.Phase, errs.Invalid)
	}
	if e.Kind != "" {
		if _, err := integrity.ParseKind(e.Kind); err != nil {
			return err
		}
	}
	if e.SHA256 != "" {
		if _, err := integrity.ParseDigest(e.SHA256); err != nil {
			return err
		}
	}
	for _, s := range []*string{&e.Reason, &e.Text, &e.Path, &e.Detail, &e.Process} {
		*s = clip(*s, maxRunText)
	}
	o.Events = append(o.Events, *e)
	return nil
}

// clip bounds a text of the guest's.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}
