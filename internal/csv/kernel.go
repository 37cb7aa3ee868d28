package csv

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/kernelsig"
)

// trust is what a cell's kernels and firmware believe.
type trust struct {
	keys    []*x509.Certificate // of module signatures
	db, dbx *kernelsig.SignatureDB
	sbat    []kernelsig.SBATEntry
}

// key tells trusts apart.
func (t *trust) key() string {
	var b strings.Builder
	for _, c := range t.keys {
		b.Write(c.Raw)
	}
	fmt.Fprintf(&b, "|%p|%p|%v", t.db, t.dbx, t.sbat)
	return b.String()
}

// What came of a signature that one trust was asked about; anything else is
// what is wrong with it.
const (
	sigGood     = ""
	sigUnknown  = "?" // nobody said what hosts believe
	sigUnsigned = "!" // it is unsigned, and nobody said
)

// keepsWhole says whether a member's signature is checked, for which all of it
// is needed at once.
func keepsWhole(m codesign.Member, head []byte) (module, image bool) {
	base := path.Base(m.Path)
	for _, x := range []string{".xz", ".zst", ".gz"} {
		base = strings.TrimSuffix(base, x)
	}
	if strings.HasSuffix(base, ".ko") {
		return true, false
	}
	return false, len(head) >= 2 && string(head[:2]) == "MZ" && codesign.Classify(m.Path, m.Mode, head).Kinds.Has(integrity.KindKexec)
}

// modules checks a module under every trust. What cannot be read is the error.
func (in *inspector) module(blob []byte) ([]string, error) {
	plain, err := unpacked(blob)
	if err != nil {
		return nil, err
	}
	out := make([]string, len(in.trusts))
	for i := range in.trusts {
		keys := in.trusts[i].keys
		if len(in.own) > 0 {
			keys = append(append([]*x509.Certificate{}, keys...), in.own...)
		}
		_, err := kernelsig.VerifyModule(plain, keys)
		switch {
		case err == nil:
		case len(keys) > 0:
			out[i] = plainErr(err)
		default:
			if out[i] = sigUnknown; !bytes.HasSuffix(plain, []byte("~Module signature appended~\n")) {
				out[i] = sigUnsigned
			}
		}
	}
	return out, nil
}

func plainErr(err error) string {
	return strings.TrimSuffix(plain(err), ": "+errs.Untrusted.Error())
}

// unpacked is what the kernel sees of a module.
func unpacked(blob []byte) ([]byte, error) {
	if codesign.Compression(blob) == "" {
		return blob, nil
	}
	d, err := codesign.Decompress(bytes.NewReader(blob))
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(d, maxModule+1))
	if err := errors.Join(err, d.Close()); err != nil {
		return nil, err
	}
	if len(b) > maxModule {
		return nil, fmt.Errorf("more than %d bytes: %w", maxModule, errs.Invalid)
	}
	return b, nil
}

// image checks a boot image under every trust, and takes the keys out of a
// kernel: the modules that come with it are signed by them.
func (in *inspector) image(blob []byte) ([]string, error) {
	if k, err := kernelsig.KernelCertificates(blob); err == nil {
		in.own = append(in.own, k.Builtin...)
	}
	m, err := kernelsig.ParseImage(blob)
	if err != nil {
		return nil, err
	}
	out := make([]string, len(in.trusts))
	for i := range in.trusts {
		t := &in.trusts[i]
		if t.db == nil {
			out[i] = sigUnknown
			continue
		}
		if _, err := m.Verify(t.db, t.dbx); err != nil {
			out[i] = plainErr(err)
			continue
		}
		if err := m.CheckSBAT(t.sbat); err != nil {
			out[i] = plainErr(err)
		}
	}
	return out, nil
}

// kernel tells what this column's kernels and firmware say of a signature.
func (q *questions) kernel(i int32, f *facts) {
	if f.modules != nil {
		switch r := f.modules[q.col.trust]; r {
		case sigGood:
		case sigUnknown:
			q.j.note("module signatures: nobody said which keys the kernels of ring %q take (module_keys, --module-key)", q.col.cell.Ring)
		case sigUnsigned:
			q.j.l.hit(i, cause{BadModule, Warn, "it is not signed; a kernel that insists on signatures refuses it", "sign it with the kernel's key, or with one that hosts have enrolled"}, q.col.n)
		default:
			q.j.l.hit(i, cause{BadModule, Block, "its signature is not one that the kernel takes: " + r, "sign it with the kernel's key, or with one that hosts have enrolled"}, q.col.n)
		}
	}
	if f.images != nil {
		switch r := f.images[q.col.trust]; r {
		case sigGood:
		case sigUnknown:
			q.j.note("EFI signatures: nobody said what the firmware of ring %q allows (efi_db, --efi-db)", q.col.cell.Ring)
		default:
			q.j.l.hit(i, cause{BadEFI, Block, "firmware with Secure Boot does not start it: " + r, "sign it under a certificate in db; if it is revoked, build a newer version"}, q.col.n)
		}
	}
}
