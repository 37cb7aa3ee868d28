package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"

	"ringwall/internal/testkit"
	"ringwall/test/fleet/sim"
)

// TestFleet takes every measurement with few hosts, on both databases: what must
// arrive arrives, once. Figures are for a run with many, see doc.go.
func TestFleet(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: a server with simulated hosts (-short)")
	}
	program, err := sim.Build(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Run("sqlite", func(t *testing.T) { testFleet(t, program, "") })
	t.Run("postgres", func(t *testing.T) { testFleet(t, program, testkit.StartPostgres(t).Database()) })
}

func testFleet(t *testing.T, program, database string) {
	t.Helper()
	var out bytes.Buffer
	o := options{hosts: 60, database: database, idle: 500 * time.Millisecond, load: time.Second, dir: t.TempDir(), program: program, out: &out}
	if err := o.run(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	t.Log(out.String())
	for _, want := range []string{`60 hosts enrolled`, `all of them wait`, `in force on all hosts`, `block → page accepted`, `the same block on 60 hosts`, `pages +1 `, `the line was stopped`, `done`} {
		if !regexp.MustCompile(want).MatchString(out.String()) {
			t.Errorf("the report lacks %q", want)
		}
	}
	if strings.Contains(out.String(), "wait: ") {
		t.Error("hosts could not wait")
	}
}
