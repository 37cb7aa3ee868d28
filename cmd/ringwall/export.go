package main

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/kernelsig"
	"ringwall/internal/pki"
)

// kernelKeyLifetime is that of certificates for kernels, whose keyrings are
// filled when a machine is set up.
const kernelKeyLifetime = 10 * 365 * 24 * time.Hour

func newExportCommand(e *env) *cobra.Command {
	return newGroup("export", groupSign, "Make the signatures that kernels check themselves",
		`Linux checks some signatures on its own, by keys in its keyrings: of files
(fs-verity, IMA), volumes (dm-verity), IPE policies and modules. These commands
make them, byte for byte as fsverity, evmctl, openssl and sign-file would. They
are an addition: what Ringwall enforces does not need them.

No gate stands before these commands: they are for development, and for what is
no release. Of a release 'ringwall sign' and the signer make the same signatures,
after its gates, where the release policy says kernel_signatures.

The key is one of its own ('ringwall export key'), or any PEM key (PKCS #8; RSA,
ECDSA) in FILE.key with its certificate in FILE.crt. Which keyring must hold the
certificate, and what that is worth on which kernel, says
docs/design/kernel-signatures.md.`,
		newExportKeyCommand(e), newExportFSVerityCommand(e), newExportIMACommand(e), newExportRootHashCommand(e),
		newExportIPECommand(e), newExportModuleCommand(e))
}

// kernelKey is a key for kernels with its certificate.
type kernelKey struct {
	key  crypto.Signer
	cert *x509.Certificate
}

type kernelKeyFlags struct{ file, passphraseFile string }

func (k *kernelKeyFlags) add(c *cobra.Command, required bool) {
	c.Flags().StringVar(&k.file, "key", "", "the key in `FILE`.key, its certificate in FILE.crt beside it")
	if required {
		require(c, "key")
	}
}

// load reads the key and its certificate.
func (k *kernelKeyFlags) load(e *env) (*kernelKey, error) {
	stem := strings.TrimSuffix(k.file, ".key")
	pass, err := readPassphrase(e, k.passphraseFile)
	if err != nil {
		return nil, err
	}
	b, err := readBounded(stem+".key", 64<<10)
	if err != nil {
		return nil, hint(fmt.Errorf("key: %w", err), "make one with: ringwall export key DIR --name NAME")
	}
	out := &kernelKey{}
	if out.key, err = pki.DecodeAnyKey(b, pass); err != nil {
		return nil, fmt.Errorf("key %s: %w", stem+".key", err)
	}
	if out.cert, err = readCertificate(stem + ".crt"); err != nil {
		return nil, err
	}
	return out, nil
}

// readCertificate reads a certificate in PEM or DER.
func readCertificate(file string) (*x509.Certificate, error) {
	b, err := readBounded(file, 64<<10)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	var c *x509.Certificate
	if strings.HasPrefix(string(b), "-----") {
		c, err = pki.DecodeCertificate(b)
	} else if c, err = x509.ParseCertificate(b); err != nil {
		err = fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if err != nil {
		return nil, fmt.Errorf("certificate %s: %w", file, err)
	}
	return c, nil
}

func newExportKeyCommand(e *env) *cobra.Command {
	var name, kind, passphraseFile string
	c := &cobra.Command{
		Use:   "key DIR --name NAME",
		Short: "Make a key that signs for kernels",
		Long: `Makes kernel.key (mode 0600, encrypted when a passphrase is given), kernel.crt and
the same certificate as kernel.der, which is what keyctl and mokutil take. It is
self-signed, for code signing only, and valid for ten years: a keyring is filled
once. The key is RSA of 3072 bits, which every kernel knows; Debian's 6.1 has no
ECDSA, 6.12 has (--type p256: smaller signatures, faster to verify).

JSON: {"key", "certificate", "der", "key_id"}`,
		Example: `  ringwall export key keys --name "Example Fleet kernels"
  sudo mokutil --import keys/kernel.der`,
		Args: exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			pass, err := readPassphrase(e, passphraseFile)
			if err != nil {
				return err
			}
			key, err := newKernelKey(kind)
			if err != nil {
				return err
			}
			cert, err := kernelsig.NewCertificate(key, name, e.now(), kernelKeyLifetime)
			if err != nil {
				return err
			}
			data, err := pki.EncodeAnyKey(key, pass)
			if err != nil {
				return err
			}
			stem := filepath.Join(args[0], "kernel")
			out := struct {
				Key         string `json:"key"`
				Certificate string `json:"certificate"`
				DER         string `json:"der"`
				KeyID       string `json:"key_id"`
			}{stem + ".key", stem + ".crt", stem + ".der", hex.EncodeToString(cert.SubjectKeyId)}
			for _, f := range []string{out.Key, out.Certificate, out.DER} {
				if exists(f) {
					return fmt.Errorf("%s is there already: %w", f, errs.Conflict)
				}
			}
			if err := os.MkdirAll(args[0], 0o700); err != nil {
				return err
			}
			if err := errors.Join(
				host.WriteFile(out.Key, data, 0o600), host.WriteFile(out.Certificate, pki.EncodeCertificate(cert), 0o644),
				host.WriteFile(out.DER, cert.Raw, 0o644),
			); err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				fmt.Fprintf(w, "%s\n%s\n%s\n  key id %s\n", out.Key, out.Certificate, out.DER, out.KeyID)
			})
		},
	}
	c.Flags().StringVar(&name, "name", "", "`NAME` in the certificate, which kernels show")
	c.Flags().StringVar(&kind, "type", "rsa", "kind of key: rsa or p256")
	complete(c, "type", "rsa", "p256")
	passphraseFlag(c, &passphraseFile)
	require(c, "name")
	return c
}

func newKernelKey(kind string) (crypto.Signer, error) {
	switch kind {
	case "rsa":
		return rsa.GenerateKey(rand.Reader, 3072)
	case "p256":
		return pki.NewKey()
	}
	return nil, usage(fmt.Errorf("--type %q: want rsa or p256", kind))
}

// exported is one signature that was made.
type exported struct {
	File      string `json:"file"`
	Digest    string `json:"digest"` // what was signed
	Signature string `json:"signature"`
}

func emitExported(e *env, list []exported) error {
	return e.emit(struct {
		Signatures []exported `json:"signatures"`
	}{list}, func(w io.Writer) {
		for _, x := range list {
			fmt.Fprintf(w, "%s\n", shown(x.Signature))
		}
	})
}

// eachFile signs every file with the same key.
func (k *kernelKeyFlags) eachFile(e *env, files []string, sign func(*kernelKey, string) (exported, error)) error {
	key, err := k.load(e)
	if err != nil {
		return err
	}
	list := []exported{}
	for _, f := range files {
		x, err := sign(key, f)
		if err != nil {
			return errors.Join(fmt.Errorf("sign %s: %w", f, err), emitExported(e, list))
		}
		list = append(list, x)
	}
	return emitExported(e, list)
}

// hashFile returns a file's SHA-256 and its fs-verity digest.
func hashFile(file string) (content, verity integrity.Digest, err error) {
	f, err := os.Open(file)
	if err != nil {
		return content, verity, err
	}
	defer f.Close()
	h := codesign.NewHasher()
	if _, err := io.Copy(h, f); err != nil {
		return content, verity, err
	}
	content, verity = h.Sums()
	return content, verity, nil
}

func newExportFSVerityCommand(e *env) *cobra.Command {
	var k kernelKeyFlags
	c := &cobra.Command{
		Use:   "fsverity FILE... --key FILE",
		Short: "Sign files for fs-verity",
		Long: `Writes FILE.fsv-sig, which 'fsverity enable FILE --signature=FILE.fsv-sig' takes:
SHA-256, blocks of 4 KiB, no salt. The kernel checks it by the keyring .fs-verity
and refuses files without one where fs.verity.require_signatures is 1.

JSON: {"signatures": [{"file", "digest", "signature"}]}`,
		Example: `  ringwall export fsverity /usr/local/bin/edged --key keys/kernel
  fsverity enable /usr/local/bin/edged --signature=/usr/local/bin/edged.fsv-sig`,
		Args: atLeastOne("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			return k.eachFile(e, args, func(key *kernelKey, file string) (x exported, err error) {
				_, verity, err := hashFile(file)
				if err != nil {
					return x, err
				}
				sig, err := kernelsig.FSVeritySignature(key.key, key.cert, verity)
				if err != nil {
					return x, err
				}
				x = exported{file, "fsverity:" + verity.String(), file + ".fsv-sig"}
				return x, host.WriteFile(x.Signature, sig, 0o644)
			})
		},
	}
	k.add(c, true)
	passphraseFlag(c, &k.passphraseFile)
	return c
}

func newExportIMACommand(e *env) *cobra.Command {
	var k kernelKeyFlags
	var set, verity bool
	c := &cobra.Command{
		Use:   "ima FILE... --key FILE",
		Short: "Sign files for IMA",
		Long: `Writes FILE.sig, the value of the extended attribute security.ima as evmctl makes
it, or with --set sets the attribute (as root). IMA checks it by its keyring
(.ima, or _ima where the kernel has no trusted one) under rules with
appraise_type=imasig; --verity is for rules with digest_type=verity and
appraise_type=sigv3, on files with fs-verity.

JSON: {"signatures": [{"file", "digest", "signature"}]}`,
		Example: `  ringwall export ima /usr/local/bin/edged --key keys/kernel --set
  ringwall export ima pkg/usr/bin/* --key keys/kernel`,
		Args: atLeastOne("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			return k.eachFile(e, args, func(key *kernelKey, file string) (x exported, err error) {
				content, tree, err := hashFile(file)
				if err != nil {
					return x, err
				}
				x = exported{file, "sha256:" + content.String(), file + ".sig"}
				sign := kernelsig.IMASignature
				if verity {
					sign, content, x.Digest = kernelsig.IMAVeritySignature, tree, "fsverity:"+tree.String()
				}
				sig, err := sign(key.key, key.cert, content)
				if err != nil {
					return x, err
				}
				if !set {
					return x, host.WriteFile(x.Signature, sig, 0o644)
				}
				x.Signature = file + " (security.ima)"
				if err := unix.Setxattr(file, "security.ima", sig, 0); err != nil {
					return x, fmt.Errorf("set security.ima: %w", err)
				}
				return x, nil
			})
		},
	}
	k.add(c, true)
	passphraseFlag(c, &k.passphraseFile)
	c.Flags().BoolVar(&set, "set", false, "set the extended attribute instead of writing FILE.sig")
	c.Flags().BoolVar(&verity, "verity", false, "sign the fs-verity digest (format 3) instead of the content's SHA-256")
	return c
}

func newExportRootHashCommand(e *env) *cobra.Command {
	var k kernelKeyFlags
	var out string
	c := &cobra.Command{
		Use:   "roothash HASH -o FILE --key FILE",
		Short: "Sign a dm-verity root hash",
		Long: `Signs a root hash (64 hexadecimal digits, or the name of a file that holds them)
for 'veritysetup open … --root-hash-signature=FILE' and systemd's
RootHashSignature=. The kernel checks it by its builtin keyring, and the
secondary and platform ones where it was built so.

JSON: {"signatures": [{"file", "digest", "signature"}]}`,
		Example: "  ringwall export roothash edged.img.roothash -o edged.img.roothash.p7s --key keys/kernel",
		Args:    exactly("HASH"),
		RunE: func(_ *cobra.Command, args []string) error {
			text := args[0]
			if len(text) != 64 || exists(text) {
				b, err := readBounded(text, 1<<10)
				if err != nil {
					return err
				}
				text = strings.TrimSpace(string(b))
			}
			root, err := integrity.ParseDigest(text)
			if err != nil {
				return fmt.Errorf("root hash: %w", err)
			}
			return k.eachFile(e, args, func(key *kernelKey, file string) (x exported, err error) {
				sig, err := kernelsig.RootHashSignature(key.key, key.cert, root)
				if err != nil {
					return x, err
				}
				x = exported{file, "dmverity:" + root.String(), out}
				return x, host.WriteFile(out, sig, 0o644)
			})
		},
	}
	k.add(c, true)
	passphraseFlag(c, &k.passphraseFile)
	c.Flags().StringVarP(&out, "out", "o", "", "write the signature to `FILE`")
	require(c, "out")
	return c
}

func newExportModuleCommand(e *env) *cobra.Command {
	var k kernelKeyFlags
	c := &cobra.Command{
		Use:   "module FILE... --key FILE",
		Short: "Sign kernel modules",
		Long: `Appends a signature to each module, which is replaced at once or not at all.
Compressed ones (.ko.xz) must be decompressed first. The kernel checks it by its
builtin keyring, and the secondary and machine owner's where it was built so; it
refuses others with module.sig_enforce=1 or lockdown.

JSON: {"signatures": [{"file", "digest", "signature"}]}`,
		Example: "  ringwall export module edge.ko --key keys/kernel && modinfo -F signer edge.ko",
		Args:    atLeastOne("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			return k.eachFile(e, args, func(key *kernelKey, file string) (x exported, err error) {
				st, err := os.Stat(file)
				if err != nil {
					return x, err
				}
				b, err := readBounded(file, 512<<20)
				if err != nil {
					return x, err
				}
				signed, err := kernelsig.SignModule(key.key, key.cert, b)
				if err != nil {
					return x, err
				}
				content, _, err := hashFile(file)
				if err != nil {
					return x, err
				}
				return exported{file, "sha256:" + content.String(), file}, host.WriteFile(file, signed, st.Mode().Perm())
			})
		},
	}
	k.add(c, true)
	passphraseFlag(c, &k.passphraseFile)
	return c
}

type exportIPEOptions struct {
	key                 kernelKeyFlags
	version, name, out  string
	operations          []string
	boot, volumes, file bool
}

func newExportIPECommand(e *env) *cobra.Command {
	var o exportIPEOptions
	c := &cobra.Command{
		Use:   "ipe POLICY",
		Short: "Turn a policy into one for the kernel's IPE",
		Long: `Prints, for Integrity Policy Enforcement (Linux 6.12 and newer), what an integrity
policy says of dm-verity roots and fs-verity digests; everything else is denied.
IPE knows no signers of builds, packages, scripts or anonymous memory: it suits
hosts whose whole system is one signed image. Exceptions with an end are left
out.

With --key it writes a signed policy to --out, for
/sys/kernel/security/ipe/new_policy.

JSON: {"name", "version", "rules", "text", "signed"}`,
		Example: `  ringwall export ipe base.yaml
  ringwall export ipe base.yaml --version 0.0.2 --key keys/kernel --out base.p7b`,
		Args: exactly("POLICY"),
		RunE: func(_ *cobra.Command, args []string) error { return o.run(e, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.name, "name", "", "`NAME` of the IPE policy (the policy's own)")
	f.StringVar(&o.version, "version", "0.0.1", "`VERSION` of the IPE policy, which must grow with updates")
	f.StringSliceVar(&o.operations, "operations", nil, "only for these `OPERATIONS`, such as EXECUTE,KMODULE (all)")
	f.BoolVar(&o.boot, "boot-verified", true, "allow what is in the initramfs")
	f.BoolVar(&o.volumes, "signed-volumes", false, "allow every volume with a root hash signature that the kernel accepts")
	f.BoolVar(&o.file, "signed-files", false, "allow every file with an fs-verity signature that the kernel accepts")
	f.StringVarP(&o.out, "out", "o", "", "write the signed policy to `FILE`")
	o.key.add(c, false)
	passphraseFlag(c, &o.key.passphraseFile)
	return c
}

func (o *exportIPEOptions) run(e *env, file string) error {
	if (o.key.file == "") != (o.out == "") {
		return usage(errors.New("--key and --out belong together"))
	}
	p, err := loadPolicy(file)
	if err != nil {
		return err
	}
	r := kernelsig.IPERules{Name: o.name, Operations: o.operations, BootVerified: o.boot, SignedVolumes: o.volumes, SignedFiles: o.file}
	if r.Name == "" {
		r.Name = p.Name
	}
	if r.Version, err = ipeVersion(o.version); err != nil {
		return err
	}
	for i := range p.Allow {
		a := &p.Allow[i]
		if !a.Until.IsZero() {
			continue
		}
		for _, d := range a.DMVerity {
			r.Volumes = append(r.Volumes, d)
		}
		for _, d := range a.FSVerity {
			r.Files = append(r.Files, d)
		}
	}
	text, err := r.Text()
	if err != nil {
		return err
	}
	if o.out != "" {
		key, err := o.key.load(e)
		if err != nil {
			return err
		}
		b, err := kernelsig.IPEPolicy(key.key, key.cert, text)
		if err != nil {
			return err
		}
		if err := host.WriteFile(o.out, b, 0o644); err != nil {
			return err
		}
	}
	out := struct {
		Name    string `json:"name"`
		Version string `json:"version"`
		Rules   int    `json:"rules"`
		Text    string `json:"text"`
		Signed  string `json:"signed,omitempty"`
	}{r.Name, o.version, strings.Count(text, "\nop="), text, o.out}
	return e.emit(out, func(w io.Writer) { fmt.Fprint(w, out.Text) })
}

func ipeVersion(s string) (v [3]uint16, err error) {
	parts := strings.Split(s, ".")
	for i := range v {
		n := uint64(0)
		if len(parts) == len(v) {
			n, err = strconv.ParseUint(parts[i], 10, 16)
		}
		if err != nil || len(parts) != len(v) {
			return v, usage(fmt.Errorf("--version %q: want three numbers, such as 0.0.2", s))
		}
		v[i] = uint16(n)
	}
	return v, nil
}
