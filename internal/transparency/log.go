package transparency

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"k8s.io/klog/v2"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// How long things may take: an append is a few files and, with a key in a
// token, one signature.
const (
	appendTimeout      = 30 * time.Second
	closeTimeout       = 10 * time.Second
	batchAge           = 5 * time.Millisecond
	checkpointInterval = 100 * time.Millisecond // the least that tessera allows
	checkpointPoll     = 10 * time.Millisecond
)

// Log is a log that can be appended to. Its methods may be called from several
// goroutines, and several processes may have the same directory open; one
// process must not open it twice.
type Log struct {
	key      pki.LogKey
	appender *tessera.Appender
	await    *tessera.PublicationAwaiter
	reader   *Reader
	close    func() error
	// integrated is how many entries the tree has, in a checkpoint or not yet.
	integrated func(context.Context) (uint64, error)

	mu   sync.Mutex
	last *pki.Checkpoint // the newest that was seen: what comes must continue it
}

// Create makes an empty log in dir, which must not hold one.
func Create(dir string, key pki.LogKey, signer crypto.Signer) error {
	if _, err := os.Lstat(filepath.Join(dir, checkpointPath)); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create log in %s: there is one already: %w", dir, errs.Conflict)
	}
	l, err := open(dir, key, signer)
	if err == nil {
		err = l.Close()
	}
	if err != nil {
		return fmt.Errorf("create log in %s: %w", dir, err)
	}
	return nil
}

// Open opens the log in dir to append to it. A directory without a log is an
// error (errs.NotFound): making a new one there would be a second history.
func Open(dir string, key pki.LogKey, signer crypto.Signer) (*Log, error) {
	r := NewReader(Dir(dir), key)
	last, _, err := r.Checkpoint(context.Background())
	if err != nil {
		return nil, fmt.Errorf("open log in %s: %w", dir, err)
	}
	l, err := open(dir, key, signer)
	if err != nil {
		return nil, fmt.Errorf("open log in %s: %w", dir, err)
	}
	l.last = last
	return l, nil
}

func open(dir string, key pki.LogKey, signer crypto.Signer) (*Log, error) {
	if signer == nil {
		return nil, fmt.Errorf("the log's key is not here: %w", errs.NotFound)
	}
	if pub, ok := signer.Public().(*ecdsa.PublicKey); !ok || !pub.Equal(key.Key) {
		return nil, fmt.Errorf("the key is not the log's: %w", errs.Invalid)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // what is published
		return nil, err
	}
	// Tessera tells klog, which is global, what it does; what matters comes back as an error.
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)

	ctx, cancel := context.WithCancel(context.Background())
	driver, err := posix.New(ctx, posix.Config{Path: dir})
	if err != nil {
		cancel()
		return nil, err
	}
	appender, shutdown, reader, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(&checkpointSigner{key, signer}).
		WithCheckpointInterval(checkpointInterval).
		WithCheckpointRepublishInterval(0).
		WithBatching(tessera.DefaultBatchMaxSize, batchAge))
	if err != nil {
		cancel()
		return nil, err
	}
	return &Log{
		key: key, appender: appender, reader: NewReader(Dir(dir), key), integrated: reader.IntegratedSize,
		await: tessera.NewPublicationAwaiter(ctx, reader.ReadCheckpoint, checkpointPoll),
		close: func() error {
			c, done := context.WithTimeout(ctx, closeTimeout)
			err := shutdown(c)
			done()
			cancel()
			return err
		},
	}, nil
}

// Close waits until what was appended is in a checkpoint.
func (l *Log) Close() error {
	if err := l.close(); err != nil {
		return fmt.Errorf("close log %s: %w", l.key.Origin, err)
	}
	return nil
}

// Append adds the signature of a bundle to the log and returns the bundle with
// the proof of it. What the bundle says is not verified. It fails closed: when
// the log's directory is not what it was before, there is no proof.
func (l *Log) Append(ctx context.Context, bundle []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	b, err := l.append(ctx, bundle)
	if err != nil {
		return nil, fmt.Errorf("append to log %s: %w", l.key.Origin, err)
	}
	return b, nil
}

func (l *Log) append(ctx context.Context, bundle []byte) ([]byte, error) {
	body, err := pki.LogBody(bundle)
	if err != nil {
		return nil, err
	}
	at, note, err := l.await.Await(ctx, l.appender.Add(ctx, tessera.NewEntry(body)))
	if err != nil {
		return nil, err
	}
	c, err := pki.OpenCheckpoint(note, &l.key)
	if err != nil {
		return nil, err
	}
	if err := l.advance(ctx, c); err != nil {
		return nil, err
	}
	proof, err := l.reader.Inclusion(ctx, pki.LeafHash(body), at.Index, c)
	if err != nil {
		return nil, err
	}
	return pki.AttachProof(bundle, pki.LogProof{LogID: l.key.ID(), Index: at.Index, Hashes: proof, Checkpoint: note})
}

// advance checks that a checkpoint and the newest one are of one history.
func (l *Log) advance(ctx context.Context, c *pki.Checkpoint) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	older, newer := l.last, c
	if older == nil {
		older = &pki.Checkpoint{}
	}
	if older.Size > newer.Size { // another goroutine was faster
		older, newer = newer, older
	}
	if err := l.reader.Consistent(ctx, older, newer); err != nil {
		return err
	}
	l.last = newer
	return nil
}

// checkpointSigner signs notes for tessera.
type checkpointSigner struct {
	key    pki.LogKey
	signer crypto.Signer
}

func (s *checkpointSigner) Name() string { return s.key.Origin }

func (s *checkpointSigner) KeyHash() uint32 {
	id := s.key.ID()
	return binary.BigEndian.Uint32(id[:4])
}

func (s *checkpointSigner) Sign(text []byte) ([]byte, error) {
	digest := sha256.Sum256(text)
	return s.signer.Sign(rand.Reader, digest[:], crypto.SHA256)
}
