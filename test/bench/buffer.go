package main

import (
	"bytes"
	"sync"
)

// lockedBuffer keeps what a running program writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// dots counts the signs of life of `micro loop`.
func (l *lockedBuffer) dots() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte("."))
}

func (l *lockedBuffer) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(bytes.Trim(l.b.Bytes(), "."))
}
