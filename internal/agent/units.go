package agent

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// Units asks the service manager.
type Units struct {
	// Watch are those without which nobody reaches the host: a trial ends if one
	// that was active no longer is.
	Watch []string
	// Run runs systemctl and returns what it prints; nil: there is no systemd here
	// and nothing is known.
	Run func(ctx context.Context, args ...string) (string, error)
}

// Bounds of what is asked and reported.
const (
	unitsWait      = 10 * time.Second
	maxFailedUnits = 32
	maxUnits       = 32 // to watch
)

// DefaultUnits asks systemd, if this machine runs it.
func DefaultUnits() Units {
	u := Units{Watch: []string{
		"ssh.service", "sshd.service", "ssh.socket", "systemd-networkd.service", "NetworkManager.service", "networking.service", "systemd-resolved.service", "wicked.service", "dbus.service",
	}}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		u.Run = func(ctx context.Context, args ...string) (string, error) {
			out, err := exec.CommandContext(ctx, "systemctl", args...).Output()
			return string(out), err
		}
	}
	return u
}

// active are those of Watch that are active now. It exits with an error when one
// is not: what it prints counts.
func (u Units) active(ctx context.Context) []string {
	if u.Run == nil || len(u.Watch) == 0 {
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, unitsWait)
	defer stop()
	out, _ := u.Run(ctx, append([]string{"is-active", "--"}, u.Watch...)...) // its exit code tells of any unit
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != len(u.Watch) {
		return nil // nothing is known; of a trial's units: none is active
	}
	var on []string
	for i, l := range lines {
		if l == "active" || l == "reloading" || l == "activating" {
			on = append(on, u.Watch[i])
		}
	}
	return on
}

// failed are the units in failed state, sorted.
func (u Units) failed(ctx context.Context) []string {
	if u.Run == nil {
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, unitsWait)
	defer stop()
	out, err := u.Run(ctx, "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager", "--full")
	if err != nil {
		return nil
	}
	var list []string
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 0 {
			list = append(list, clip(f[0], 256))
		}
	}
	slices.Sort(list)
	return list[:min(len(list), maxFailedUnits)]
}
