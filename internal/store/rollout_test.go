package store_test

import (
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"ringwall/internal/rollout"
	"ringwall/internal/store"
)

func TestRollout(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		noon := time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)
		write := func(fn func(*store.Tx) error) {
			t.Helper()
			if err := s.Write(ctx, fn); err != nil {
				t.Fatal(err)
			}
		}
		read := func(of string) (hosts []rollout.Record, hits []rollout.Hit) {
			t.Helper()
			err := s.Read(ctx, func(tx *store.Tx) (err error) {
				if hosts, err = tx.RolloutHosts(ctx, of); err != nil {
					return err
				}
				hits, err = tx.RolloutHits(ctx, of)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			return hosts, hits
		}
		var many []rollout.Record
		for i := range 450 { // more than one statement
			many = append(many, rollout.Record{
				Host: fmt.Sprintf("h%03d", i), Ring: i % 3, Entered: noon,
				Base: rollout.Base{Boot: "b", AgentStarts: 2, FailedUnits: []string{"a.service"}},
			})
		}
		write(func(tx *store.Tx) error {
			return errors.Join(tx.PutRolloutHosts(ctx, "/a", many), tx.PutRolloutHosts(ctx, "/b", many[:1]), tx.PutRolloutHosts(ctx, "/a", nil))
		})
		many[7].Admitted, many[7].Applied = noon.Add(time.Second), noon.Add(time.Minute)
		first := rollout.Hit{Host: "h007", Signal: "flip", At: noon, Text: "one"}
		write(func(tx *store.Tx) error {
			return errors.Join(tx.PutRolloutHosts(ctx, "/a", many[7:8]), tx.AddRolloutHits(ctx, "/a", []rollout.Hit{first}))
		})
		write(func(tx *store.Tx) error {
			again := rollout.Hit{Host: "h007", Signal: "flip", At: noon.Add(time.Hour), Text: "two"}
			return tx.AddRolloutHits(ctx, "/a", []rollout.Hit{again, {Host: "h008", Signal: "lost", At: noon}})
		})
		hosts, hits := read("/a")
		if !reflect.DeepEqual(hosts, many) {
			t.Errorf("%d hosts, %+v", len(hosts), hosts[7])
		}
		if len(hits) != 2 || hits[0] != first {
			t.Errorf("the first hit does not stay: %+v", hits)
		}
		write(func(tx *store.Tx) error { return tx.ForgetRollout(ctx, "/a") })
		if hosts, hits := read("/a"); len(hosts)+len(hits) != 0 {
			t.Errorf("remembers %d hosts and %d hits", len(hosts), len(hits))
		}
		if hosts, _ := read("/b"); len(hosts) != 1 {
			t.Error("another rollout's hosts are gone")
		}
		err := s.Read(ctx, func(tx *store.Tx) error { return tx.ForgetRollout(ctx, "/b") })
		if err == nil {
			t.Error("a reading transaction wrote")
		}
	})
}
