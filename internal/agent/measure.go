package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of measuring.
const (
	maxMeasured  = 500_000
	expectFor    = 15 * time.Minute // how long new packages' files are waited for
	expectPeriod = 50 * time.Millisecond
)

// measurer makes the kernel know the content of authorised scripts where it
// cannot hash a file at the moment at which an interpreter opens it (before
// Linux 6.9). It holds them open, because the kernel forgets a digest with the
// inode. What is not measured is refused: this fails closed.
type measurer struct {
	measure func(*os.File) error

	mu   sync.Mutex
	held map[string]*held
	next map[string]bool // paths that are about to come or to change
	till time.Time
}

// held is a measured file.
type held struct {
	f        *os.File
	dev, ino uint64
}

// newMeasurer returns nil on kernels that need none; a nil measurer does nothing.
func newMeasurer(w Watcher) *measurer {
	if !w.MustMeasure() {
		return nil
	}
	lim := unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &lim) != nil {
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
			lim.Cur = lim.Max
			_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &lim) // as many as may be
		}
	}
	return &measurer{measure: w.Measure, held: map[string]*held{}, next: map[string]bool{}}
}

// all measures paths, and says how many there are and could be measured. Paths
// that do not exist are left out: a package may be known and not installed.
func (m *measurer) all(ctx context.Context, paths []string) (there, measured int) {
	if m == nil {
		return 0, 0
	}
	for _, p := range paths {
		if ctx.Err() != nil {
			break
		}
		switch err := m.one(p); {
		case err == nil:
			there++
			measured++
		case !errors.Is(err, fs.ErrNotExist):
			there++
		}
	}
	return there, measured
}

// one measures the file that a path leads to now.
func (m *measurer) one(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	m.mu.Lock()
	old, n := m.held[path], len(m.held)
	m.mu.Unlock()
	if old != nil && old.dev == st.Dev && old.ino == st.Ino {
		return m.measure(old.f)
	}
	if n >= maxMeasured {
		return errors.ErrUnsupported
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if err := m.measure(f); err != nil {
		return errors.Join(err, f.Close())
	}
	if old != nil {
		_ = old.f.Close()
	}
	m.mu.Lock()
	m.held[path] = &held{f: f, dev: st.Dev, ino: st.Ino}
	m.mu.Unlock()
	return nil
}

// tree measures a file, or the regular files below a directory.
func (m *measurer) tree(ctx context.Context, root string) (int, error) {
	if m == nil {
		return 0, nil
	}
	n := 0
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if d.Type().IsRegular() && m.one(p) == nil {
			n++
		}
		return nil
	})
	return n, err
}

// expect waits for paths to come or to be replaced, as dpkg does after apt's
// hook: they are measured as soon as they are there.
func (m *measurer) expect(paths []string) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range paths {
		m.next[p] = true
	}
	m.till = time.Now().Add(expectFor)
}

// watch measures what is expected until ctx ends.
func (m *measurer) watch(ctx context.Context) {
	if m == nil {
		return
	}
	next := time.NewTimer(expectPeriod)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
			began := time.Now()
			m.poll()
			// many paths must not keep a processor busy
			next.Reset(max(expectPeriod, 9*time.Since(began)))
		}
	}
}

func (m *measurer) poll() {
	m.mu.Lock()
	if len(m.next) > 0 && time.Now().After(m.till) {
		clear(m.next)
	}
	paths := make([]string, 0, len(m.next))
	for p := range m.next {
		paths = append(paths, p)
	}
	m.mu.Unlock()
	for _, p := range paths {
		var st unix.Stat_t
		if unix.Stat(p, &st) != nil {
			continue
		}
		m.mu.Lock()
		old := m.held[p]
		m.mu.Unlock()
		if old != nil && old.dev == st.Dev && old.ino == st.Ino {
			continue // not replaced yet
		}
		if m.one(p) == nil {
			m.mu.Lock()
			delete(m.next, p)
			m.mu.Unlock()
		}
	}
}

// close lets go of all files.
func (m *measurer) close() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for p, h := range m.held {
		_ = h.f.Close()
		delete(m.held, p)
	}
}
