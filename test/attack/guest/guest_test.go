package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

// reduced is a part of the suite: some techniques of each group, those first
// that once got through.
const reduced = `^(exec-tmp|exec-unlinked|ldso-.*|memfd-exec|mount-tmpfs|bind-program|overlay-(lower|swap)|loop-ext4|fuse-changing|change-(times|mapped)|race-exec|handle-exec` +
	`|shebang-env|binfmt-program|ld-preload|perl-dynaloader|dlopen-picture|map-data-later|imply-brk|memfd-map-dual|anon-rw-rx|cow-library|userfault-library|rwx-library` +
	`|mem-child|ptrace-attach|write-(old-fd|under-overlay)|device-write|file-(python|make)|fifo-(mawk|sh)|awk-include|make-files|python-(library|pyc)|dot-fifo|eval-sh` +
	`|stdin-(pipe-sh|terminal-sh)|inline-(sh|python|python-timeit|mawk|perl5opt|lua-init|node-options|makeflags|bash-env|bash-function|python-long|find)` +
	`|memfd-sh|spawn-find|module-(memory|xz)|modprobe-install|kexec-file|helper-core|systemd-run|apt-hook|dpkg-hook|bpf-load|bpf-detach|agent-kill|agent-freeze|state-edit|ftrace-off|policy-older|uring-map|compile-run)$`

// known techniques remain in the strict profile, see docs/security-evaluation.md; true: and raise an event.
func known() map[string]bool {
	return map[string]bool{
		"eval-sh":           false, // an authorised script that evaluates what it is given
		"stdin-terminal-sh": true,
		"apt-hook":          true,
		"dpkg-hook":         true,
	}
}

// TestStrict fails if a technique runs under the strict profile that is not
// known to, or one that is known to does so silently.
func TestStrict(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: boots a whole Debian, which takes minutes (-short)")
	}
	kernels := os.Getenv("RINGWALL_KERNELS")
	if kernels == "" {
		kernels = "6.1 6.12"
	}
	t.Chdir("../../..")
	for kernel := range strings.FieldsSeq(kernels) {
		if kernel != "6.1" && kernel != "6.12" {
			continue // the guest of this suite has Debian 12's own kernels only
		}
		t.Run(kernel, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "results")
			err := run(t.Context(), []string{"-kernel", kernel, "-profile", "strict", "-o", out, "-options", `-only "` + reduced + `"`})
			if errors.Is(err, errs.Unsupported) {
				t.Skipf("SKIPPED, NOT TESTED: %v", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			check(t, out)
		})
	}
}

func check(t *testing.T, path string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	stopped := 0
	for s := bufio.NewScanner(bytes.NewReader(raw)); s.Scan(); {
		var r struct {
			ID, As, Outcome, Error string
			Alerted                *bool
		}
		if err := json.Unmarshal(s.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		alert, expected := known()[r.ID]
		switch {
		case r.Outcome == "stopped":
			stopped++
		case r.Outcome == "unavailable":
			t.Logf("NOT TESTED: %s %s: %s", r.As, r.ID, r.Error)
		case !expected || r.Outcome != "ran":
			t.Errorf("%s %s: %s %s", r.As, r.ID, r.Outcome, r.Error)
		case alert && (r.Alerted == nil || !*r.Alerted):
			t.Errorf("%s %s ran without an event", r.As, r.ID)
		}
	}
	if stopped < 100 {
		t.Errorf("only %d attempts were stopped: the run is not what it was meant to be", stopped)
	}
}
