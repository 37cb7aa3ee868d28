package signer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/integrity"
	"ringwall/internal/kernelsig"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

// countingKey says how often it was asked to sign.
type countingKey struct {
	crypto.Signer
	n int
}

func (k *countingKey) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	k.n++
	return k.Signer.Sign(r, digest, o)
}

// withKernel is a world whose policy asks for kernel signatures.
func withKernel(t *testing.T, forms string) (*world, *countingKey) {
	t.Helper()
	w := newWorld(t)
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := kernelsig.NewCertificate(key, "Fleet kernels", epoch(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	k := &countingKey{Signer: key}
	w.Kernel = &signer.KernelKey{Key: k, Cert: cert}
	w.put(t, "policies/edged.yaml", []byte(w.policy("edged")+"kernel_signatures: ["+forms+"]\n"))
	return w, k
}

// content makes another artefact of the world's.
func (w *world) content(t *testing.T, files map[string]string) {
	t.Helper()
	b := archive(t, files)
	w.put(t, "edged.tar", b)
	w.digest = sha256.Sum256(b)
}

func unpack(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if out[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func sums(t *testing.T, text string) (content, verity integrity.Digest) {
	t.Helper()
	h := codesign.NewHasher()
	if _, err := io.WriteString(h, text); err != nil {
		t.Fatal(err)
	}
	return h.Sums()
}

func TestSign_kernelSignatures(t *testing.T) {
	const module = "\x7fELF of a module"
	w, _ := withKernel(t, "fsverity, ima, ima-verity, module, roothash, ipe")
	w.content(t, map[string]string{"bin/edged": "#!/bin/sh\necho edged\n", "lib/modules/edged.ko": module})
	out, err := w.Sign(t.Context(), w.order(w.passed(t)))
	if err != nil {
		t.Fatal(err)
	}
	files, trusted := unpack(t, out.Kernel.Archive), []*x509.Certificate{w.Kernel.Cert}
	want := []string{
		"fsverity/bin/edged.fsv-sig", "fsverity/lib/modules/edged.ko.fsv-sig", "ima-verity/bin/edged.sig", "ima-verity/lib/modules/edged.ko.sig",
		"ima/bin/edged.sig", "ima/lib/modules/edged.ko.sig", "ipe/edged.p7b", "module/lib/modules/edged.ko",
	}
	if got := slices.Sorted(maps.Keys(files)); !slices.Equal(got, want) {
		t.Fatalf("%q", got)
	}
	signed := files["module/lib/modules/edged.ko"]
	if _, err := kernelsig.VerifyModule(signed, trusted); err != nil || !bytes.HasPrefix(signed, []byte(module)) {
		t.Errorf("module: %v", err)
	}
	for path, text := range map[string]string{"bin/edged": "#!/bin/sh\necho edged\n", "lib/modules/edged.ko": string(signed)} {
		content, verity := sums(t, text)
		_, err1 := kernelsig.VerifyFSVerity(files["fsverity/"+path+".fsv-sig"], verity, trusted)
		_, err2 := kernelsig.VerifyIMA(files["ima/"+path+".sig"], content, trusted)
		_, err3 := kernelsig.VerifyIMA(files["ima-verity/"+path+".sig"], verity, trusted)
		if err := errors.Join(err1, err2, err3); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		// what a host decides by knows the signed module, too
		if c, err := codesign.ParseCatalogue(out.Built.Catalogue); err != nil || !listed(c, content) {
			t.Errorf("%s is not in the catalogue (%v)", path, err)
		}
	}
	if want := map[gate.KernelSignature]int{"fsverity": 2, "ima": 2, "ima-verity": 2, "module": 1, "roothash": 0, "ipe": 1}; !maps.Equal(out.Describe().KernelSignatures, want) {
		t.Errorf("%v", out.Describe().KernelSignatures)
	}

	// the record names the archive, and no other will do
	r, _, err := codesign.VerifyRelease(out.Bundle, out.Built.Catalogue, w.authority.Roots(pki.PurposeBuild))
	if err != nil {
		t.Fatal(err)
	}
	if err := signer.VerifyKernelSignatures(r, out.Kernel.Archive); err != nil {
		t.Error(err)
	}
	for _, other := range [][]byte{nil, append(slices.Clone(out.Kernel.Archive), 0)} {
		if err := signer.VerifyKernelSignatures(r, other); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%d bytes: %v", len(other), err)
		}
	}
	if len(w.audit) != 1 || len(w.audit[0].Kernel) != 6 {
		t.Errorf("audit %+v", w.audit)
	}
}

func listed(c *codesign.Catalogue, d integrity.Digest) bool {
	for _, r := range c.All() {
		if r.Digest == d {
			return true
		}
	}
	return false
}

// What is refused costs no signature of the kernel's key either.
func TestSign_kernelKeyComesLast(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*world, *signer.Order)
		kind error
	}{
		"gates hold": {func(_ *world, o *signer.Order) { o.Evidence = nil }, errs.Denied},
		"gates fail": {func(w *world, o *signer.Order) { o.Evidence = append(o.Evidence, w.failing...) }, errs.Denied},
		"audit":      {func(w *world, _ *signer.Order) { w.auditErr = errFull }, errs.Unsupported},
		"epoch": {func(w *world, _ *signer.Order) {
			_ = os.WriteFile(filepath.Join(w.dir, "epochs.json"), []byte(`{"edged":4}`), 0o600)
		}, errs.Denied},
		"no kernel key": {func(w *world, _ *signer.Order) { w.Kernel = nil }, errs.NotFound},
		"image changed": {func(w *world, _ *signer.Order) {
			w.Volume = func(context.Context, string) (*signer.Volume, error) { return &signer.Volume{}, nil }
		}, errs.Conflict},
		"image broken": {func(w *world, _ *signer.Order) {
			w.Volume = func(context.Context, string) (*signer.Volume, error) { return nil, errs.Untrusted }
		}, errs.Untrusted},
	} {
		t.Run(name, func(t *testing.T) {
			w, key := withKernel(t, "ima")
			w.failing = []signer.Evidence{w.evidence(t, "ci", gate.TypeTest, `{"result":"FAILED","failedTests":["TestX"]}`)}
			o := w.order(w.passed(t))
			tc.edit(w, &o)
			out, err := w.Sign(t.Context(), o)
			if !errors.Is(err, tc.kind) {
				t.Errorf("%v, want %v", err, tc.kind)
			}
			if key.n != 0 || out != nil && (out.Kernel != nil || out.Bundle != nil) {
				t.Errorf("signed %d times", key.n)
			}
		})
	}
}

// Modules that cannot carry the signature stop the release: it would not load.
func TestSign_kernelModules(t *testing.T) {
	w, key := withKernel(t, "module")
	already, err := kernelsig.SignModule(key, w.Kernel.Cert, []byte("\x7fELF"))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		path, content string
		kind          error
	}{
		"signed already": {"edged.ko", string(already), errs.Conflict},
		"no ELF":         {"edged.ko", "text", errs.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			w.content(t, map[string]string{tc.path: tc.content})
			if out, err := w.Sign(t.Context(), w.order(w.passed(t))); !errors.Is(err, tc.kind) || out.Bundle != nil {
				t.Errorf("%v, want %v", err, tc.kind)
			}
		})
	}
}

// An image's root is named, and signed where the policy says so.
func TestSign_image(t *testing.T) {
	w, _ := withKernel(t, "roothash, ipe, fsverity")
	root := integrity.Digest{1, 2, 3}
	w.Volume = func(context.Context, string) (*signer.Volume, error) {
		return &signer.Volume{Root: root, SHA256: integrity.Digest(w.digest)}, nil
	}
	out, err := w.Sign(t.Context(), w.order(w.passed(t)))
	if err != nil {
		t.Fatal(err)
	}
	if a := out.Release.Artefacts; len(a) != 3 || a[1].Name != "dm-verity root of edged.tar" || a[1].Digest != root || a[2].Name != "kernel signatures of edged.tar" {
		t.Errorf("%+v", a)
	}
	files, trusted := unpack(t, out.Kernel.Archive), []*x509.Certificate{w.Kernel.Cert}
	if _, err := kernelsig.VerifyRootHash(files["edged.tar.roothash.p7s"], root, trusted); err != nil || string(files["edged.tar.roothash"]) != root.String() || len(files) != 3 {
		t.Errorf("%v, %d files", err, len(files))
	}
	if !bytes.Contains(files["ipe/edged.p7b"], []byte("policy_version=0.3.0")) || !bytes.Contains(files["ipe/edged.p7b"], []byte("dmverity_roothash=sha256:"+root.String())) {
		t.Errorf("%q", files["ipe/edged.p7b"])
	}
}

// Over the wire the archive comes along.
func TestServer_kernelSignatures(t *testing.T) {
	s := newService(t)
	w, _ := withKernel(t, "fsverity")
	s.Kernel = w.Kernel
	s.put(t, "policies/edged.yaml", []byte(s.policy("edged")+"kernel_signatures: [fsverity]\n"))
	a, err := s.client(t, "ci").Submit(t.Context(), s.order(s.passed(t)), nil)
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := codesign.VerifyRelease(a.Bundle, a.Catalogue, s.authority.Roots(pki.PurposeBuild))
	if err != nil {
		t.Fatal(err)
	}
	if err := signer.VerifyKernelSignatures(r, a.Kernel); err != nil || len(unpack(t, a.Kernel)) != 1 || a.Result.KernelSignatures["fsverity"] != 1 {
		t.Errorf("%v, %v", err, a.Result.KernelSignatures)
	}
	// who asks cannot choose
	if _, err := s.client(t, "ci").Submit(t.Context(), signer.Order{
		Path: s.file, Product: "edged", Version: "4.7.0", Epoch: 3, Evidence: []signer.Evidence{s.passed(t)},
		KernelSignatures: []gate.KernelSignature{gate.SignIMA},
	}, nil); err != nil {
		t.Fatal(err)
	}
	if last := s.audit[len(s.audit)-1]; len(last.Kernel) != 1 || last.Kernel[0] != gate.SignFSVerity {
		t.Errorf("%+v", last)
	}
	if !strings.HasPrefix(string(a.Kernel), "fsverity/") {
		t.Error("no archive")
	}
}
