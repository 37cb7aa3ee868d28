package main

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/image"
	"ringwall/internal/integrity"
	"ringwall/internal/kernelsig"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

// What lies beside an image, by the names that systemd and veritysetup use.
const (
	extRootHash          = ".roothash"
	extRootHashSignature = ".roothash.p7s"
)

func newImageCommand(e *env) *cobra.Command {
	return newGroup("image", groupSign, "Make and check dm-verity images",
		`An image is a read-only file system with a hash tree over it. One hash, that of
the tree's root, authorises all of it: the kernel checks every block when it is
read, and a policy rule with dmverity lets programs run from it. Images are
reproducible: the same content gives the same root.`,
		newImageBuildCommand(e), newImageVerifyCommand(e), newImageShowCommand(e))
}

type imageBuildOptions struct {
	image              image.Options
	format, salt, path string
}

// imageResult is what image commands say of an image.
type imageResult struct {
	Image      string        `json:"image"`
	Format     string        `json:"format"`
	Root       string        `json:"root"`
	SHA256     string        `json:"sha256,omitempty"` // of the file
	Size       int64         `json:"size"`
	DataBlocks uint64        `json:"data_blocks"` // of 4 KiB
	HashOffset int64         `json:"hash_offset"`
	Salt       string        `json:"salt"`
	RootHash   string        `json:"root_hash_file,omitempty"`
	SignedBy   string        `json:"root_hash_signed_by,omitempty"`
	Release    *imageRelease `json:"release,omitempty"`
	Allowed    *bool         `json:"allowed,omitempty"` // by the policy: its root
}

// imageRelease is the release record beside an image.
type imageRelease struct {
	Product  string `json:"product"`
	Version  string `json:"version"`
	Epoch    uint32 `json:"epoch"`
	Identity string `json:"identity"`
	Release  string `json:"release"` // SHA-256 of the statement
	Records  int    `json:"records"`
	Bundle   string `json:"bundle"`
}

func newImageRelease(bundle string, r *codesign.Release, c *codesign.Catalogue) *imageRelease {
	return &imageRelease{
		Product: r.Product, Version: r.Version, Epoch: r.Epoch, Identity: r.Identity, Release: r.Record.String(),
		Records: c.Len(), Bundle: bundle,
	}
}

func describeImage(path string, v *image.Volume) *imageResult {
	format := string(v.Format)
	if format == "" {
		format = "unknown"
	}
	return &imageResult{
		Image: path, Format: format, Root: hex.EncodeToString(v.Root[:]), Size: v.Size, DataBlocks: v.DataBlocks,
		HashOffset: v.HashOffset(), Salt: hex.EncodeToString(v.Salt),
	}
}

func newImageBuildCommand(e *env) *cobra.Command {
	var o imageBuildOptions
	c := &cobra.Command{
		Use:   "build DIR|TAR -o IMAGE",
		Short: "Make an image of a directory or an archive",
		Long: `Makes a file system of a directory or a tar archive, appends the hash tree, and
writes IMAGE.roothash. Owners, times, extended attributes and the order of files
do not count: everything in the image is root's, at one time. It needs
mkfs.erofs, or mksquashfs for --format squashfs.

It signs nothing: an image is an artefact like any other, and 'ringwall sign', or
the signer, signs it after its gates. The record then names its root hash, which
can be signed for the kernel in the same run.

JSON: {"image", "format", "root", "sha256", "size", "data_blocks", "hash_offset",
"salt", "root_hash_file"}`,
		Example: `  ringwall image build ./dist -o edged.img
  ringwall image build rootfs.tar.zst -o rootfs.img --format squashfs --compress
  ringwall sign edged.img --keys keys --product edged --version 4.7.0 --epoch 12 \
      --release-policy edged-release.yaml --evidence evidence --kernel-key keys/kernel`,
		Args: exactly("DIR|TAR"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args[0]) },
	}
	f := c.Flags()
	f.StringVarP(&o.path, "out", "o", "", "write the image to the file `IMAGE`")
	f.StringVar(&o.format, "format", string(image.EROFS), "the file system: erofs or squashfs")
	f.BoolVar(&o.image.Compress, "compress", false, "compress it (erofs: LZ4, squashfs: zstd)")
	f.Int64Var(&o.image.Time, "time", 0, "time of every file, in `SECONDS` since 1970")
	f.StringVar(&o.salt, "salt", "", "salt of the hash tree, as `HEX`; without one, equal content has equal roots")
	require(c, "out")
	complete(c, "format", string(image.EROFS), string(image.Squashfs))
	return c
}

func (o *imageBuildOptions) run(ctx context.Context, e *env, source string) error {
	o.image.Format = image.Format(o.format)
	if o.image.Format != image.EROFS && o.image.Format != image.Squashfs {
		return usage(fmt.Errorf("--format %q: want erofs or squashfs", o.format))
	}
	var err error
	if o.image.Salt, err = hex.DecodeString(o.salt); err != nil || len(o.image.Salt) > 256 {
		return usage(fmt.Errorf("--salt %.80q: want at most 256 bytes in hexadecimal", o.salt))
	}
	for _, f := range []string{o.path, o.path + extRootHash} {
		if exists(f) {
			return fmt.Errorf("%s is there already: %w", f, errs.Conflict)
		}
	}
	b, err := image.Build(ctx, source, o.path, o.image)
	if err != nil {
		return err
	}
	out := describeImage(o.path, &b.Volume)
	out.SHA256, out.RootHash = hex.EncodeToString(b.SHA256[:]), o.path+extRootHash
	if err := host.WriteFile(out.RootHash, []byte(out.Root), 0o644); err != nil {
		return err
	}
	return e.emit(out, func(w io.Writer) { out.write(w); out.writeRule(w) })
}

func (r *imageResult) write(w io.Writer) {
	fmt.Fprintf(w, "image %s: %s, %d KiB\n", shown(r.Image), r.Format, r.Size>>10)
	fmt.Fprintf(w, "  root         %s\n", r.Root)
	if r.SHA256 != "" {
		fmt.Fprintf(w, "  sha256       %s\n", r.SHA256)
	}
	fmt.Fprintf(w, "  hash offset  %d\n", r.HashOffset)
	if r.Salt != "" {
		fmt.Fprintf(w, "  salt         %s\n", r.Salt)
	}
	if r.SignedBy != "" {
		fmt.Fprintf(w, "  for kernels  signed by %s\n", shown(r.SignedBy))
	}
	if r.Release != nil {
		fmt.Fprintf(w, "  release      %s %s, epoch %d, by %s\n", r.Release.Product, r.Release.Version, r.Release.Epoch, r.Release.Identity)
	}
	if r.Allowed != nil {
		fmt.Fprintf(w, "  policy       allows its root: %v\n", *r.Allowed)
	}
}

// writeRule prints what a policy needs, and how the volume is opened.
func (r *imageResult) writeRule(w io.Writer) {
	rule := strings.TrimSuffix(filepath.Base(r.Image), filepath.Ext(r.Image))
	fmt.Fprintf(w, "\nA policy that lets programs run from it has, below allow:\n  - rule: %s\n    dmverity: [%s]\n", yamlString(rule), r.Root)
	fmt.Fprintf(w, "\nOn the host:\n  veritysetup open IMAGE NAME IMAGE %s --hash-offset=%d\n  mount -o ro /dev/mapper/NAME DIR\n", r.Root, r.HashOffset)
}

type imageVerifyOptions struct{ trust, record, cert, root string }

func newImageVerifyCommand(e *env) *cobra.Command {
	var o imageVerifyOptions
	c := &cobra.Command{
		Use:   "verify IMAGE",
		Short: "Check an image, its root hash and its signatures",
		Long: `Reads the whole image, computes the hash tree and compares it with the one that is
there, then compares the root with what is trusted: the release record
(--trust), the kernel's signature (--cert), or a hash that is given (--root). The record is IMAGE.release.json unless --release says otherwise,
the kernel's signature IMAGE.roothash.p7s. All that are given must hold. With a policy as --trust it also
says whether that policy allows the root; if not, the exit code is 1.

JSON: {"image", "format", "root", "sha256", "size", "data_blocks", "hash_offset",
"salt", "root_hash_signed_by", "release": {"product",
"version", "epoch", "identity", "release", "records", "bundle"}, "allowed"}`,
		Example: `  ringwall image verify edged.img --trust base.yaml
  ringwall image verify edged.img --trust keys --release edged_4.7.0.release.json --cert keys/kernel.crt`,
		Args: exactly("IMAGE"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.trust, "trust", "", "whom to believe about the release: an authority's `DIR`, or a policy's YAML")
	f.StringVar(&o.record, "release", "", "the release record's `FILE` (default: IMAGE.release.json)")
	f.StringVar(&o.cert, "cert", "", "certificate of the kernel's signature, in `FILE` (PEM or DER)")
	f.StringVar(&o.root, "root", "", "the root hash that it must have, as `HEX`")
	return c
}

func (o *imageVerifyOptions) run(ctx context.Context, e *env, path string) error {
	if o.trust == "" && o.cert == "" && o.root == "" {
		return usage(errors.New("nothing says which root is right; give --trust, --cert or --root"))
	}
	v, err := image.Check(ctx, path)
	if err != nil {
		return err
	}
	out := describeImage(path, &v.Volume)
	out.SHA256 = hex.EncodeToString(v.SHA256[:])
	if o.root != "" && o.root != out.Root {
		return fmt.Errorf("image %s: its root is %s, not the one that was given: %w", path, out.Root, errs.Untrusted)
	}
	if b, err := readBounded(path+extRootHash, 1<<10); err == nil && strings.TrimSpace(string(b)) != out.Root {
		return fmt.Errorf("image %s: its root is %s, %s says %.80q: %w", path, out.Root, path+extRootHash, b, errs.Untrusted)
	}
	if o.cert != "" {
		cert, err := readCertificate(o.cert)
		if err != nil {
			return err
		}
		sig, err := readBounded(path+extRootHashSignature, 1<<20)
		if err != nil {
			return fmt.Errorf("root hash signature: %w", err)
		}
		by, err := kernelsig.VerifyRootHash(sig, v.Root, []*x509.Certificate{cert})
		if err != nil {
			return fmt.Errorf("image %s: %w", path, err)
		}
		out.SignedBy = by.Subject.CommonName
	}
	if o.trust != "" {
		if err := o.release(out, v); err != nil {
			return err
		}
	}
	if err := e.emit(out, out.write); err != nil {
		return err
	}
	if out.Allowed != nil && !*out.Allowed {
		return fmt.Errorf("policy %s does not allow root %s: %w", o.trust, out.Root, errs.Denied)
	}
	return nil
}

// release holds the record beside the image against what was found.
func (o *imageVerifyOptions) release(out *imageResult, v *image.Checked) error {
	st, err := os.Stat(o.trust)
	if err != nil {
		return fmt.Errorf("trust: %w", err)
	}
	if !st.IsDir() {
		p, err := loadPolicy(o.trust)
		if err != nil {
			return err
		}
		allowed := slices.ContainsFunc(p.Allow, func(r integrity.AllowRule) bool { return slices.Contains(r.DMVerity, integrity.Digest(v.Root)) })
		out.Allowed = &allowed
	}
	roots, err := loadRoots(o.trust, pki.PurposeBuild)
	if err != nil {
		return err
	}
	if o.record == "" {
		o.record = out.Image + extRelease
	}
	r, err := loadRelease(o.record, roots)
	if err != nil {
		return err
	}
	names := func(d [32]byte, root bool) bool {
		return slices.ContainsFunc(r.Artefacts, func(a codesign.Artefact) bool {
			return a.Digest == integrity.Digest(d) && strings.HasPrefix(a.Name, signer.RootArtefact) == root
		})
	}
	if !names(v.Root, true) || !names(v.SHA256, false) {
		return fmt.Errorf("image %s: release %s %s is about another image: %w", out.Image, r.Product, r.Version, errs.Untrusted)
	}
	out.Release = newImageRelease(o.record, r.Release, r.catalogue)
	return nil
}

func newImageShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "show IMAGE",
		Short: "Show an image's root hash and how to open it",
		Long: `Shows what an image says of itself, without reading all of it, with the policy
rule and the commands that go with it. Nothing of that is verified: see
'ringwall image verify'.

JSON: {"image", "format", "root", "size", "data_blocks", "hash_offset", "salt"}`,
		Example: "  ringwall image show edged.img",
		Args:    exactly("IMAGE"),
		RunE: func(_ *cobra.Command, args []string) error {
			v, err := image.Open(args[0])
			if err != nil {
				return err
			}
			out := describeImage(args[0], v)
			return e.emit(out, func(w io.Writer) { out.write(w); out.writeRule(w) })
		},
	}
}
