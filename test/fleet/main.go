package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"ringwall/test/fleet/sim"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	o := options{out: os.Stdout}
	flag.IntVar(&o.hosts, "hosts", 10_000, "simulated hosts")
	flag.StringVar(&o.database, "database", "", "URL of a PostgreSQL database for the server (default: SQLite)")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long hosts only wait, for the cost of that")
	flag.DurationVar(&o.load, "load", 10*time.Second, "how long events are sent as fast as they are taken")
	flag.StringVar(&o.skip, "skip", "", "steps to leave out: idle,publish,ingest,page,storm,halt")
	flag.StringVar(&o.dir, "dir", "", "working directory, kept (default: a temporary one)")
	flag.StringVar(&o.program, "ringwall", "", "the ringwall binary (default: built)")
	flag.Parse()
	if err := o.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

type options struct {
	hosts      int
	database   string
	idle, load time.Duration
	skip, dir  string
	program    string
	out        io.Writer
}

// run takes all measurements, in order.
func (o *options) run(ctx context.Context) (err error) {
	// two descriptors a host, one at each end
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if need := uint64(o.hosts) + 1000; limit.Cur < need {
		return fmt.Errorf("%d open files allowed, %d needed: ulimit -n %d", limit.Cur, need, need)
	}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "ringwall-fleet-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	}
	if o.program == "" {
		if o.program, err = sim.Build(ctx, o.dir); err != nil {
			return err
		}
	}
	m := measurement{o: o, began: time.Now()}
	return m.run(ctx)
}
