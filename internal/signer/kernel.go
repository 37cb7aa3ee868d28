package signer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/integrity"
	"ringwall/internal/kernelsig"
)

// KernelKey signs what kernels check themselves, with its certificate.
type KernelKey struct {
	Key  crypto.Signer
	Cert *x509.Certificate
}

// Volume is what a dm-verity image was found to be, in the whole of it.
type Volume struct {
	Root   integrity.Digest
	SHA256 integrity.Digest // of the file
}

// In a release record's artefacts, what these are put before is the artefact's
// name.
const (
	RootArtefact   = "dm-verity root of "
	KernelArtefact = "kernel signatures of "
)

// Bounds of the archive of kernel signatures.
const (
	maxKernelFiles = 1 << 17
	maxKernel      = 320 << 20 // bytes
	maxModules     = 256 << 20 // bytes of all modules that are signed in one run
)

// KernelSignatures is a tar archive, always the same for the same signatures:
// FORM/PATH of each file with the ending of the form, and for an image
// NAME.roothash and NAME.roothash.p7s.
type KernelSignatures struct {
	Archive []byte
	Count   map[gate.KernelSignature]int
}

// kernelRun makes the signatures of one release.
type kernelRun struct {
	key    *KernelKey
	forms  []gate.KernelSignature
	files  map[string][]byte
	count  map[gate.KernelSignature]int
	total  int
	volume *Volume // nil: the artefact is no image
}

func (k *kernelRun) wants(f gate.KernelSignature) bool { return slices.Contains(k.forms, f) }

func (k *kernelRun) put(f gate.KernelSignature, name string, data []byte) error {
	if k.total += len(data); k.total > maxKernel || len(k.files) >= maxKernelFiles {
		return fmt.Errorf("more than %d signatures, or too large; sign parts of it: %w", maxKernelFiles, errs.Invalid)
	}
	k.files[name] = data
	if f != "" {
		k.count[f]++
	}
	return nil
}

// forms are the signatures for kernels that a release is to get. A signer that
// cannot make them makes no release either.
func (s *Signer) forms(o *Order, policy *gate.Policy) ([]gate.KernelSignature, error) {
	forms := o.KernelSignatures
	if policy != nil {
		forms = policy.KernelSignatures
	}
	if len(forms) > 0 && s.Kernel == nil {
		return nil, fmt.Errorf("kernel signatures are asked for, and this signer has no key for them: %w", errs.NotFound)
	}
	return forms, nil
}

// volume measures a dm-verity image; nil: the artefact is none. What it tells
// is about the very bytes that the catalogue was made of, or it is an error.
func (s *Signer) volume(ctx context.Context, path string, artefact integrity.Digest) (*Volume, error) {
	if s.Volume == nil {
		return nil, nil //nolint:nilnil // no image
	}
	v, err := s.Volume(ctx, path)
	if err != nil || v == nil {
		return nil, err
	}
	if v.SHA256 != artefact {
		return nil, fmt.Errorf("artefact %s changed while it was read: %w", path, errs.Conflict)
	}
	return v, nil
}

// signModules makes the catalogue anew, with the modules as they are once they
// are signed: by those hosts decide.
func (s *Signer) signModules(ctx context.Context, o *Order, out *Signed, k *kernelRun) error {
	in, err := s.Open(ctx, o.Path)
	if err != nil {
		return err
	}
	built, err := codesign.Build(&moduleSource{in, k}, codesign.Options{AllFiles: o.AllFiles})
	if err := errors.Join(err, in.Close()); err != nil {
		return err
	}
	if in.Digest() != out.SHA256 {
		return fmt.Errorf("artefact %s changed while it was read: %w", in.Name(), errs.Conflict)
	}
	out.Built = built
	return nil
}

// moduleSource yields an artefact, and then its kernel modules again with a
// signature.
type moduleSource struct {
	codesign.Source
	run *kernelRun
}

// Walk implements codesign.Source.
func (m *moduleSource) Walk(visit func(codesign.Member, io.Reader) error) error {
	type module struct {
		codesign.Member
		data []byte
	}
	var signed []module
	total := 0
	err := m.Source.Walk(func(x codesign.Member, r io.Reader) error {
		if !codesign.Classify(x.Path, x.Mode, nil).Kinds.Has(integrity.KindModule) || x.Hard || x.Nested || r == nil {
			return visit(x, r)
		}
		data, err := io.ReadAll(io.LimitReader(r, maxModules-int64(total)+1))
		if err != nil {
			return err
		}
		if total += len(data); total > maxModules {
			return fmt.Errorf("kernel modules of more than %d bytes; sign parts of it: %w", maxModules, errs.Invalid)
		}
		if err := visit(x, bytes.NewReader(data)); err != nil {
			return err
		}
		if codesign.Classify(x.Path, x.Mode, data[:min(len(data), codesign.HeadSize)]).Compressed != "" {
			return fmt.Errorf("%s is compressed, and the kernel wants the signature inside: ship it as .ko: %w", x.Path, errs.Unsupported)
		}
		b, err := kernelsig.SignModule(m.run.key.Key, m.run.key.Cert, data)
		if err != nil {
			return fmt.Errorf("%s: %w", x.Path, err)
		}
		x.Path = m.run.name(gate.SignModule, x.Path, "", sha256.Sum256(data))
		x.Origin, x.Size, x.Alone = codesign.OriginSigned, int64(len(b)), true
		signed = append(signed, module{x, b})
		return m.run.put(gate.SignModule, x.Path, b)
	})
	if err != nil {
		return err
	}
	for _, x := range signed {
		if err := visit(x.Member, bytes.NewReader(x.data)); err != nil {
			return err
		}
	}
	return nil
}

// name is a place in the archive. Two contents of one path (platforms of one
// image) are told apart by digest.
func (k *kernelRun) name(f gate.KernelSignature, path, ending string, content integrity.Digest) string {
	name := string(f) + "/" + path + ending
	if _, taken := k.files[name]; taken {
		name = string(f) + "/sha256/" + content.String() + ending
	}
	return name
}

// sign signs every file of the catalogue that stays one on a host: no script of
// the package manager, nothing inside an archive, nothing that is only known
// decompressed, no module that gets its own signature. What is in an image is
// the root hash's to protect.
func (k *kernelRun) sign(ctx context.Context, o *Order, built *codesign.Built) error {
	c, err := codesign.ParseCatalogue(built.Catalogue)
	if err != nil {
		return err
	}
	t, err := codesign.ParseNames(built.Names, c)
	if err != nil {
		return err
	}
	var files [][32]byte
	for i, r := range c.All() {
		if k.volume != nil || r.Flags&(codesign.FlagInstall|codesign.FlagNested|codesign.FlagInner) != 0 || r.Verity.IsZero() {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if r.Flags&codesign.FlagData == 0 {
			files = append(files, r.Verity)
		}
		for _, f := range []struct {
			form   gate.KernelSignature
			ending string
			digest [32]byte
			sign   func(crypto.Signer, *x509.Certificate, [32]byte) ([]byte, error)
		}{
			{gate.SignFSVerity, ".fsv-sig", r.Verity, kernelsig.FSVeritySignature},
			{gate.SignIMA, ".sig", r.Digest, kernelsig.IMASignature},
			{gate.SignIMAVerity, ".sig", r.Verity, kernelsig.IMAVeritySignature},
		} {
			if !k.wants(f.form) {
				continue
			}
			sig, err := f.sign(k.key.Key, k.key.Cert, f.digest)
			if err != nil {
				return err
			}
			for _, n := range t.Names[i] {
				path, signed := n.Path, n.Origin == codesign.OriginSigned
				if k.count[gate.SignModule] > 0 && r.Kinds.Has(integrity.KindModule) && !signed {
					continue // a host gets the signed one in its place
				}
				if signed {
					path = strings.TrimPrefix(path, string(gate.SignModule)+"/")
				}
				if err := k.put(f.form, k.name(f.form, path, f.ending, r.Digest), sig); err != nil {
					return err
				}
			}
		}
	}
	if err := k.signRoot(o.Name); err != nil {
		return err
	}
	return k.signIPE(o, files)
}

func (k *kernelRun) signRoot(name string) error {
	if k.volume == nil || !k.wants(gate.SignRootHash) {
		return nil
	}
	sig, err := kernelsig.RootHashSignature(k.key.Key, k.key.Cert, k.volume.Root)
	if err != nil {
		return err
	}
	if err := k.put("", name+".roothash", []byte(k.volume.Root.String())); err != nil {
		return err
	}
	return k.put(gate.SignRootHash, name+".roothash.p7s", sig)
}

// signIPE makes a policy that allows the image, or every program of the build,
// and what was in the initramfs. Its version follows the epoch, so that the
// kernel takes no older one in its place.
func (k *kernelRun) signIPE(o *Order, files [][32]byte) error {
	if !k.wants(gate.SignIPE) {
		return nil
	}
	r := kernelsig.IPERules{Name: o.Product, BootVerified: true, Files: files, Version: [3]uint16{uint16(o.Epoch >> 16), uint16(o.Epoch), 0}} //nolint:gosec // its halves
	if k.volume != nil {
		r.Volumes = [][32]byte{k.volume.Root}
	}
	text, err := r.Text()
	if err != nil {
		return err
	}
	b, err := kernelsig.IPEPolicy(k.key.Key, k.key.Cert, text)
	if err != nil {
		return err
	}
	return k.put(gate.SignIPE, string(gate.SignIPE)+"/"+o.Product+".p7b", b)
}

// pack returns the archive, and nil if nothing fits what was asked for.
func (k *kernelRun) pack() (*KernelSignatures, error) {
	out := &KernelSignatures{Count: k.count}
	if len(k.files) == 0 {
		return out, nil
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(k.files)) {
		data := k.files[name]
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(data)), Mode: 0o644}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	out.Archive = b.Bytes()
	return out, nil
}

// kernel makes the kernel signatures that a release is to get, and says in its
// record which they are.
func (s *Signer) kernel(ctx context.Context, o *Order, out *Signed, info *codesign.ReleaseInfo) error {
	v, err := s.volume(ctx, o.Path, out.SHA256)
	if err != nil {
		return err
	}
	if v != nil {
		info.Artefacts = append(info.Artefacts, codesign.Artefact{Name: RootArtefact + o.Name, Digest: v.Root})
	}
	if len(out.forms) == 0 {
		return nil
	}
	k := &kernelRun{key: s.Kernel, forms: out.forms, files: map[string][]byte{}, count: map[gate.KernelSignature]int{}, volume: v}
	if v == nil && k.wants(gate.SignModule) && out.Built.Kinds[integrity.KindModule] > 0 {
		if err := s.signModules(ctx, o, out, k); err != nil {
			return fmt.Errorf("kernel signatures: %w", err)
		}
	}
	if err := k.sign(ctx, o, out.Built); err != nil {
		return fmt.Errorf("kernel signatures: %w", err)
	}
	if out.Kernel, err = k.pack(); err != nil {
		return fmt.Errorf("kernel signatures: %w", err)
	}
	if out.Kernel.Archive != nil {
		info.Artefacts = append(info.Artefacts, codesign.Artefact{Name: KernelArtefact + o.Name, Digest: sha256.Sum256(out.Kernel.Archive)})
	}
	return nil
}

// VerifyKernelSignatures says whether an archive of kernel signatures is the one
// that a verified release names. A release that names one and comes without is
// errs.Untrusted, and the other way round.
func VerifyKernelSignatures(r *codesign.Release, archive []byte) error {
	want := slices.IndexFunc(r.Artefacts, func(a codesign.Artefact) bool { return strings.HasPrefix(a.Name, KernelArtefact) })
	switch sum := sha256.Sum256(archive); {
	case want < 0 && len(archive) == 0:
		return nil
	case want < 0:
		return fmt.Errorf("release %s %s has no kernel signatures, and here are some: %w", r.Product, r.Version, errs.Untrusted)
	case r.Artefacts[want].Digest != integrity.Digest(sum):
		return fmt.Errorf("kernel signatures are %s, the record is about %s: %w", hex.EncodeToString(sum[:]), r.Artefacts[want].Digest, errs.Untrusted)
	}
	return nil
}
