package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/store"
	"ringwall/internal/transparency"
)

// lockData holds a server's directory until release: alone for a server whose
// database is in it and for who replaces that, shared by servers whose database
// is elsewhere. It ends with the process, however that ends.
func lockData(dir string, alone bool) (release func() error, err error) {
	f, err := os.OpenFile(filepath.Join(dir, "server.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	how := syscall.LOCK_SH
	if alone {
		how = syscall.LOCK_EX
	}
	if err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = fmt.Errorf("%s is in use: a server runs there, or a restore; stop the server: %w", dir, errs.Conflict)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

// restored is what `ringwall server restore` did.
type restored struct {
	File     string           `json:"file"`
	Records  int              `json:"records"` // of its audit log
	To       audit.Checkpoint `json:"to"`      // its end, before the restore's own record
	Replaced string           `json:"replaced,omitempty"`
	// Published is where the published log is now that knows records which the
	// backup lacks; those are lost.
	Published string `json:"published,omitempty"`
	Lost      uint64 `json:"lost"`
}

func newServerRestoreCommand(e *env) *cobra.Command {
	var data, published string
	c := &cobra.Command{
		Use:   "restore FILE",
		Short: "Put a backup in place of the database, while the server is stopped",
		Long: `Checks a file that ringwall server backup wrote: that it is not damaged, that its
audit log is a whole chain, and that it is the beginning of what this server
published. Then it takes the place of DATA/control.db, which stays beside it as
control.db.before-TIME.

What was changed after the backup is lost, and what was taken back since is valid
again: tokens, roles, revoked certificates. If the published audit log knows of
such changes, it is kept as evidence under another name, with its key, and the
server begins a new one: verifications against old checkpoints fail from then on,
as they must. Clients that follow the change feed are told to list everything
anew; no ETag from before can overwrite anything. The restore is itself a record
of the audit log.

On another machine put DATA/tls in place first, so that clients still know the
server. PostgreSQL is restored with its own tools.

JSON: {"file", "records", "to": {"seq", "hash"}, "replaced", "published", "lost"}`,
		Example: `  systemctl stop ringwall-server
  ringwall server restore --data ./fleet /srv/backup/control-2031-05-01.db`,
		Args: exactly("FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(data, 0o700); err != nil {
				return err
			}
			if published == "" {
				published = filepath.Join(data, "audit-log")
			}
			r := restore{data: data, tiles: published, stamp: e.now().UTC().Format("20060102T150405Z")}
			out, err := r.run(c.Context(), args[0])
			if err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				fmt.Fprintf(w, "restored: %d audit records, the last one %s\n", out.Records, out.To)
				if out.Replaced != "" {
					fmt.Fprintf(w, "the database of before: %s\n", shown(out.Replaced))
				}
				if out.Published != "" {
					fmt.Fprintf(w, "%d records that were published later are lost; their log is kept: %s\n", out.Lost, shown(out.Published))
				}
			})
		},
	}
	f := c.Flags()
	f.StringVar(&data, "data", defaultServerDir, "the server's `DIRECTORY`")
	f.StringVar(&published, "audit-log", "", "where the audit log is published (`DIR`, default: DATA/audit-log)")
	return c
}

// restore is one under way.
type restore struct {
	data, tiles, stamp string
}

// run prepares everything in a directory beside, and moves files last: a failure
// before leaves all as it was.
func (r *restore) run(ctx context.Context, file string) (*restored, error) {
	release, err := lockData(r.data, true)
	if err != nil {
		return nil, err
	}
	defer func() { _ = release() }()
	work := filepath.Join(r.data, "restore.tmp")
	if err := os.RemoveAll(work); err != nil {
		return nil, err
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(work) }()
	sum, err := copyBackup(file, filepath.Join(work, "control.db"))
	if err != nil {
		return nil, err
	}
	out := &restored{File: file}
	if err := r.prepare(ctx, work, sum, out); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if out.Lost > 0 {
		if out.Published, err = r.setAside(); err != nil {
			return nil, err
		}
	}
	return out, r.swap(work, out)
}

func copyBackup(from, to string) (string, error) {
	in, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer func() { _ = in.Close() }()
	head := make([]byte, 16)
	if _, err := io.ReadFull(in, head); err != nil || string(head) != "SQLite format 3\x00" {
		return "", fmt.Errorf("%s is no SQLite database: %w", from, errs.Invalid)
	}
	h := sha256.New()
	all := io.TeeReader(io.MultiReader(bytes.NewReader(head), in), h)
	err = host.WriteFileFrom(to, all, 0o600)
	return hex.EncodeToString(h.Sum(nil)), err
}

// prepare checks the copy and makes it one that goes on.
func (r *restore) prepare(ctx context.Context, work, sum string, out *restored) (err error) {
	s, err := store.Open(ctx, "sqlite:"+work)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.CheckFile(ctx); err != nil {
		return err
	}
	published, err := r.published(ctx)
	if err != nil {
		return err
	}
	var rep *audit.Report
	if rep, out.Lost, err = r.compare(ctx, s, published); err != nil {
		return err
	}
	out.Records, out.To = rep.Records, rep.To
	detail, err := json.Marshal(map[string]any{"sha256": sum, "lost": out.Lost, "end": rep.To})
	if err != nil {
		return err
	}
	return s.Write(ctx, func(tx *store.Tx) error {
		if err := tx.Restored(ctx); err != nil {
			return err
		}
		return tx.AppendAudit(ctx, &audit.Record{
			Actor: "ringwall server restore", Action: "Ringwall.Server/databases/restore/action", Target: "/", Outcome: audit.Done,
			Reason: "by whoever holds the server's directory", Detail: string(detail),
		})
	})
}

// published is the checkpoint of the published log, if there is one.
func (r *restore) published(ctx context.Context) (*pki.Checkpoint, error) {
	line, err := readLine(filepath.Join(r.data, "audit-log.pub"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // nothing was published
	}
	if err != nil {
		return nil, err
	}
	key, err := pki.ParseLogKey(line)
	if err != nil {
		return nil, err
	}
	c, _, err := transparency.NewReader(transparency.Dir(r.tiles), *key).Checkpoint(ctx)
	if errors.Is(err, errs.NotFound) {
		return nil, nil //nolint:nilnil // nothing was published
	}
	return c, err
}

// compare verifies the copy's chain, and that it and the published log are one
// history as far as both go; lost is how many published records it lacks.
func (r *restore) compare(ctx context.Context, s *store.Store, published *pki.Checkpoint) (*audit.Report, uint64, error) {
	end, err := s.AuditEnd(ctx)
	if err != nil {
		return nil, 0, err
	}
	if published == nil || published.Size <= end.Seq {
		var signed []pki.Checkpoint
		if published != nil {
			signed = append(signed, *published)
		}
		rep, err := audit.VerifySigned(storedAudit(ctx, s), signed)
		return rep, 0, err
	}
	// The published log knows more: its entry of the copy's last record must be that record.
	kept := end
	line, err := readLine(filepath.Join(r.data, "audit-log.pub"))
	if err != nil {
		return nil, 0, err
	}
	key, err := pki.ParseLogKey(line)
	if err != nil {
		return nil, 0, err
	}
	err = transparency.NewReader(transparency.Dir(r.tiles), *key).Each(ctx, published, func(index uint64, entry []byte) error {
		if index+1 == end.Seq && string(entry) != end.String() {
			return fmt.Errorf("record %d was published as %s and is %s here: this is no backup of this server: %w", end.Seq, entry, end, errs.Untrusted)
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	rep, err := audit.VerifySigned(storedAudit(ctx, s), nil, kept)
	return rep, published.Size - end.Seq, err
}

// storedAudit is a database's audit log as an export.
func storedAudit(ctx context.Context, s *store.Store) io.Reader {
	r, w := io.Pipe()
	go func() {
		enc, after := json.NewEncoder(w), uint64(0)
		for {
			page, err := s.AuditAfter(ctx, after, 1000)
			for i := 0; err == nil && i < len(page); i++ {
				after, err = page[i].Seq, enc.Encode(&page[i])
			}
			if err != nil || len(page) == 0 {
				w.CloseWithError(err) // nil is io.EOF
				return
			}
		}
	}()
	return r
}

// setAside keeps the published log as evidence; the server makes a new one, with
// a new key, as nobody may sign two histories with one.
func (r *restore) setAside() (string, error) {
	kept := r.tiles + ".before-" + r.stamp
	if err := os.Rename(r.tiles, kept); err != nil {
		return "", err
	}
	for _, name := range []string{"audit-log.key", "audit-log.pub"} {
		file := filepath.Join(r.data, name)
		if err := os.Rename(file, file+".before-"+r.stamp); err != nil {
			return "", err
		}
	}
	return kept, nil
}

func (r *restore) swap(work string, out *restored) error {
	db := filepath.Join(r.data, "control.db")
	if exists(db) {
		out.Replaced = db + ".before-" + r.stamp
		if exists(out.Replaced) {
			return fmt.Errorf("%s exists: %w", out.Replaced, errs.Conflict)
		}
		for _, suffix := range []string{"-wal", "-shm", ""} { // the file itself last
			if err := os.Rename(db+suffix, out.Replaced+suffix); err != nil && (suffix == "" || !errors.Is(err, fs.ErrNotExist)) {
				return err
			}
		}
	}
	if err := os.Rename(filepath.Join(work, "control.db"), db); err != nil {
		return err
	}
	d, err := os.Open(r.data)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
