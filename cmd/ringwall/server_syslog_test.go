package main

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/pki"
)

// collector is somebody's syslog server: RFC 5424 with counted octets.
type collector struct {
	mu          sync.Mutex
	records     map[uint64]audit.Record
	checkpoints []string
}

func (c *collector) listen(t *testing.T, address string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go c.read(conn)
		}
	}()
}

func (c *collector) read(conn net.Conn) {
	in := bufio.NewReader(conn)
	for {
		n, err := in.ReadString(' ')
		if err != nil {
			return
		}
		size, _ := strconv.Atoi(strings.TrimSpace(n))
		b := make([]byte, size)
		if _, err := io.ReadFull(in, b); err != nil {
			return
		}
		head, text, _ := strings.Cut(string(b), " - ")
		c.mu.Lock()
		var r audit.Record
		var note struct{ Checkpoint string }
		if strings.HasSuffix(head, " audit") && json.Unmarshal([]byte(text), &r) == nil {
			c.records[r.Seq] = r
		} else if strings.HasSuffix(head, " checkpoint") && json.Unmarshal([]byte(text), &note) == nil {
			c.checkpoints = append(c.checkpoints, note.Checkpoint)
		}
		c.mu.Unlock()
	}
}

// A collector that was away gets every record, and a checkpoint that shows later
// that the log was cut off.
func TestServer_syslog(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	s := startServer(t, "--syslog", "tcp://"+address)
	s.admin()
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.published()
	c := &collector{records: map[uint64]audit.Record{}}
	c.listen(t, address)
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")
	_, exported, _ := s.run("admin", "", "audit", "export")
	want := strings.Count(exported, "\n")
	for range 1000 {
		c.mu.Lock()
		records, checkpoints := len(c.records), len(c.checkpoints)
		c.mu.Unlock()
		if records >= want && checkpoints > 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var end audit.Checkpoint
	for seq := range uint64(want) {
		r := c.records[seq+1]
		if err := r.Follows(end); err != nil {
			t.Fatal(err)
		}
		end = r.Checkpoint()
	}
	line, err := readLine(s.dir + "/fleet/audit-log.pub")
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.ParseLogKey(line)
	if err != nil || len(c.checkpoints) == 0 {
		t.Fatalf("%d checkpoints, %v", len(c.checkpoints), err)
	}
	last := c.checkpoints[len(c.checkpoints)-1]
	cp, err := pki.OpenCheckpoint([]byte(last), key)
	if err != nil || cp.Size != uint64(want) {
		t.Errorf("%+v, %v", cp, err)
	}
	// Somebody cuts the log's end off: what the collector kept shows it.
	lines := strings.SplitAfter(exported, "\n")
	s.must(5, "admin", "", "audit", "verify", s.file("cut.jsonl", []byte(strings.Join(lines[:want-1], ""))),
		"--signed", s.file("kept", []byte(last)), "--trust", s.dir+"/fleet/audit-log.pub")
}
