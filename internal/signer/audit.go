package signer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"
)

// Lines is a file of JSON lines that is only ever appended to.
type Lines struct {
	mu sync.Mutex
	f  *os.File
}

// OpenLines opens the file, or makes it.
func OpenLines(path string) (*Lines, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &Lines{f: f}, nil
}

// Add writes a line, and returns once it is on the disk.
func (l *Lines) Add(_ context.Context, e Entry) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("write %s: %w", l.f.Name(), err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err = l.f.Write(append(b, '\n'))
	if err := errors.Join(err, l.f.Sync()); err != nil {
		return fmt.Errorf("write %s: %w", l.f.Name(), err)
	}
	return nil
}

// Close closes the file.
func (l *Lines) Close() error { return l.f.Close() }

const notifyTime = 15 * time.Second

// Alerts raises an alert: a line in a file, which must succeed, and a command
// that gets the line on its standard input. That the command fails does not
// stop a break-glass signature, which is for when things are down already;
// failed is told.
func Alerts(file *Lines, command []string, failed func(error)) func(context.Context, Entry) error {
	return func(ctx context.Context, e Entry) error {
		if err := file.Add(ctx, e); err != nil {
			return err
		}
		if len(command) == 0 {
			return nil
		}
		line, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("alert: %w", err)
		}
		ctx, cancel := context.WithTimeout(ctx, notifyTime)
		defer cancel()
		c := exec.CommandContext(ctx, command[0], command[1:]...)
		c.Stdin, c.WaitDelay = bytes.NewReader(append(line, '\n')), time.Second
		if out, err := c.CombinedOutput(); err != nil {
			failed(fmt.Errorf("notify command %s: %w: %.200s", command[0], err, bytes.TrimSpace(out)))
		}
		return nil
	}
}
