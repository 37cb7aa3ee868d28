package attest

import (
	"bytes"
	"hash"
	"slices"
	"strings"
)

// Bounds of an IMA list. A host that measures every file of a distribution
// has some 100,000 entries.
const (
	MaxIMA          = 256 << 20
	maxIMAEntries   = 2 << 20
	maxIMATemplate  = 32
	maxIMAData      = 1 << 20
	imaNameLen      = 255 // IMA_EVENT_NAME_LEN_MAX
	templateIMA     = "ima"
	bootAggregate   = "boot_aggregate"
	maxIMAFieldName = 64
	maxPath         = 4096 // PATH_MAX
)

// IMAEntry is one measurement of the kernel's list. The slices alias the list
// and hold until the next entry is read.
type IMAEntry struct {
	Index    int // in the whole list, from 0
	Template string
	// Violation: the file was open for writing while it was measured, or the
	// other way round. The TPM was then extended with ones instead of the
	// entry's digest, so that Path is a claim and Digest is not there.
	Violation bool
	Alg       string // of the file's digest, as the kernel names it
	Digest    []byte // of the file, or of Buffer
	Verity    bool   // Digest is an fs-verity digest
	Path      string
	// Buffer is measured data that is no file: the command line of kexec, keys,
	// critical data. It is given only where Digest was recomputed from it.
	Buffer []byte
	// Signature is the file's security.ima signature, if the template has one.
	Signature []byte

	data []byte // what the template digest is made of
}

// IMAState is how far a list was verified: the number of entries and the
// value of PCR 10 after them. The zero IMAState is the beginning of a boot.
type IMAState struct {
	Entries int    `json:"entries"`
	PCR     []byte `json:"pcr"`
}

// ReplayIMA continues from a verified state and reads entries of the binary
// list (binary_runtime_measurements, little-endian) until PCR 10 has the
// quoted value. A list that runs ahead of the quote is fine: the rest is not
// looked at, and rest tells how many bytes that are. visit is called with
// every entry that the quote covers, after the whole run was found to lead to
// the quoted value, never before; an error of visit ends the replay.
//
// digestSize is the size of the template digests in the list: 20 for the
// classic file, the algorithm's for the files that kernels from 6.10 give for
// each bank. The digests of the quoted bank are always recomputed.
//
// It fails with ReasonIMAReplay when no prefix leads to the quoted value:
// entries were dropped, edited or not sent.
func ReplayIMA(list []byte, digestSize int, from IMAState, bank Alg, quoted []byte, visit func(*IMAEntry) error) (to IMAState, rest int, err error) {
	if len(list) > MaxIMA {
		return from, 0, tooLarge("IMA list of %d bytes (at most %d)", len(list), MaxIMA)
	}
	w := imaWalk{cursor: littleEndian(list), bank: bank, digestSize: digestSize, hash: bank.new()}
	pcr, entries := slices.Clone(from.PCR), from.Entries
	if entries == 0 && len(pcr) == 0 {
		pcr = make([]byte, bank.Size())
	}
	if len(pcr) != bank.Size() || len(quoted) != bank.Size() {
		return from, 0, malformed("PCR 10 of %d bytes for %s", len(pcr), bank)
	}
	for !bytes.Equal(pcr, quoted) {
		if len(w.b) == 0 {
			return from, 0, refusePCR(ReasonIMAReplay, pcrIMA, "%d entries lead to %x, the TPM quotes %x", entries, pcr, quoted)
		}
		if entries == maxIMAEntries {
			return from, 0, tooLarge("IMA list of more than %d entries", maxIMAEntries)
		}
		if _, err := w.next(entries); err != nil {
			return from, 0, err
		}
		w.hash.Reset()
		w.hash.Write(pcr)
		w.hash.Write(w.extended)
		pcr = w.hash.Sum(pcr[:0])
		entries++
	}
	to, rest = IMAState{Entries: entries, PCR: pcr}, len(w.b)
	if visit == nil {
		return to, rest, nil
	}
	w.cursor = littleEndian(list[:len(list)-rest])
	for i := from.Entries; i < entries; i++ {
		e, err := w.read(i)
		if err == nil {
			err = e.fields()
		}
		if err == nil {
			err = visit(e)
		}
		if err != nil {
			return from, 0, err
		}
	}
	return to, rest, nil
}

// IMALeadsTo is where a whole list leads: what PCR 10 would be if a kernel had
// written it and no more.
func IMALeadsTo(list []byte, digestSize int, bank Alg) (IMAState, error) {
	s := IMAState{PCR: make([]byte, bank.Size())}
	if len(list) > MaxIMA {
		return s, tooLarge("IMA list of %d bytes (at most %d)", len(list), MaxIMA)
	}
	w := imaWalk{cursor: littleEndian(list), bank: bank, digestSize: digestSize, hash: bank.new()}
	for ; len(w.b) > 0; s.Entries++ {
		if s.Entries == maxIMAEntries {
			return s, tooLarge("IMA list of more than %d entries", maxIMAEntries)
		}
		if _, err := w.next(s.Entries); err != nil {
			return s, err
		}
		s.PCR = bank.sum(s.PCR, w.extended)
	}
	return s, nil
}

// imaWalk steps through a list; its buffers are used again for every entry.
type imaWalk struct {
	cursor
	bank       Alg
	digestSize int
	hash       hash.Hash
	entry      IMAEntry
	recorded   []byte
	extended   []byte // what the TPM was extended with
	padded     [SHA1Size + imaNameLen + 1]byte
}

// SHA1Size is the length of a SHA-1 digest in bytes.
const SHA1Size = 20

// next reads an entry and computes what PCR 10 was extended with.
func (w *imaWalk) next(index int) (*IMAEntry, error) {
	e, err := w.read(index)
	if err != nil {
		return nil, err
	}
	if e.Violation {
		w.extended = slices.Grow(w.extended[:0], w.bank.Size())[:w.bank.Size()]
		for i := range w.extended {
			w.extended[i] = 0xff
		}
		return e, nil
	}
	w.hash.Reset()
	w.hash.Write(e.data)
	w.extended = w.hash.Sum(w.extended[:0])
	// What the classic list records is SHA-1 and proves nothing: it is not even
	// compared.
	if w.digestSize == w.bank.Size() && !bytes.Equal(w.extended, w.recorded) {
		return nil, malformed("IMA entry %d: its digest is not the one of its data", index)
	}
	return e, nil
}

// read takes the next entry apart, as ima_measurements_show in the kernel's
// security/integrity/ima/ima_fs.c writes it.
func (w *imaWalk) read(index int) (*IMAEntry, error) {
	pcr := w.u32()
	w.recorded = w.bytes(uint64(w.digestSize)) //nolint:gosec // a digest's size
	nameLen := w.u32()
	if w.short || nameLen == 0 || nameLen > maxIMATemplate {
		return nil, malformed("IMA entry %d: template name of %d bytes, or the list ends within the entry", index, nameLen)
	}
	if pcr != pcrIMA {
		return nil, malformed("IMA entry %d: PCR %d", index, pcr)
	}
	w.entry = IMAEntry{Index: index, Violation: allZero(w.recorded), Template: intern(w.bytes(uint64(nameLen)))}
	e := &w.entry
	if e.Template == templateIMA {
		// digest, length of the name, name; the digest is over the name
		// padded to 256 bytes, without the length
		digest := w.bytes(SHA1Size)
		name := w.sized32()
		if w.short || len(name) > imaNameLen {
			return nil, malformed("IMA entry %d: name of %d bytes, or the list ends within it", index, len(name))
		}
		clear(w.padded[:])
		copy(w.padded[:], digest)
		copy(w.padded[SHA1Size:], name)
		e.data = w.padded[:]
		return e, nil
	}
	size := w.u32()
	if size > maxIMAData {
		return nil, tooLarge("IMA entry %d: %d bytes (at most %d)", index, size, maxIMAData)
	}
	e.data = w.bytes(uint64(size))
	if w.short {
		return nil, malformed("IMA entry %d: the list ends within it", index)
	}
	return e, nil
}

// fields fills in what the entry says. The template's name is covered by no
// digest, so its first two fields are read by their own form, which all
// templates but "ima" share; how many fields there are is known for the
// kernel's own templates.
func (e *IMAEntry) fields() error {
	if e.Template == templateIMA {
		e.Alg, e.Digest = "sha1", e.data[:SHA1Size]
		e.Path = string(bytes.TrimRight(e.data[SHA1Size:], "\x00"))
		return nil
	}
	var f [9][]byte
	n := 0
	c := littleEndian(e.data)
	for len(c.b) > 0 && n < len(f) {
		f[n] = c.sized32()
		n++
	}
	if !c.done() || n < 2 || (imaFields(e.Template) != 0 && imaFields(e.Template) != n) {
		return malformed("IMA entry %d: %d fields do not make up template %q", e.Index, n, e.Template)
	}
	path, found := bytes.CutSuffix(f[1], []byte{0})
	if !found || bytes.IndexByte(path, 0) >= 0 {
		return malformed("IMA entry %d: a name that does not end with its only NUL", e.Index)
	}
	if len(path) > maxPath {
		return tooLarge("IMA entry %d: a name of %d bytes (at most %d)", e.Index, len(path), maxPath)
	}
	e.Path = string(path)
	if !e.Violation {
		if err := e.digestField(f[0]); err != nil {
			return err
		}
	}
	if n < 3 {
		return nil
	}
	switch e.Template {
	case "ima-sig", "ima-sigv2", "ima-modsig":
		e.Signature = f[2]
	case "ima-buf":
		if a, err := ParseAlg(e.Alg); err == nil && bytes.Equal(a.sum(f[2]), e.Digest) {
			e.Buffer = f[2]
		}
	}
	return nil
}

// digestField reads d-ng ("sha256:" NUL digest) and d-ngv2 ("ima:sha256:" or
// "verity:sha256:").
func (e *IMAEntry) digestField(f []byte) error {
	head, digest, found := bytes.Cut(f, []byte{0})
	name, ok := strings.CutSuffix(intern(head), ":")
	if !found || !ok || len(name) > maxIMAFieldName {
		return malformed("IMA entry %d: no algorithm before the digest", e.Index)
	}
	if kind, alg, two := strings.Cut(name, ":"); two {
		if kind != "ima" && kind != "verity" {
			return malformed("IMA entry %d: digest of kind %.20q", e.Index, kind)
		}
		e.Verity, name = kind == "verity", alg
	}
	if a, err := ParseAlg(name); (err == nil && len(digest) != a.Size()) || len(digest) > SHA512.Size() {
		return malformed("IMA entry %d: %s digest of %d bytes", e.Index, name, len(digest))
	}
	e.Alg, e.Digest = name, digest
	return nil
}

// imaFields is how many fields a template of the kernel's has (ima_template.c);
// 0 for one that it has not.
func imaFields(template string) int {
	switch template {
	case "ima-ng", "ima-ngv2":
		return 2
	case "ima-sig", "ima-sigv2", "ima-buf":
		return 3
	case "ima-modsig":
		return 5
	case "evm-sig":
		return 9
	}
	return 0
}

// intern spares a copy for every entry of the usual names.
func intern(b []byte) string {
	for _, s := range [...]string{"ima-ng", "ima-sig", "sha256:"} {
		if string(b) == s {
			return s
		}
	}
	return string(b)
}

// checkBootAggregate compares the first entry of a list with the PCRs: the
// kernel hashes PCR 0 to 7, and from 5.8 on PCR 8 and 9 too unless it hashes
// with SHA-1. It ties the list to the boot.
func checkBootAggregate(e *IMAEntry, firmware *Bank) error {
	if e.Path != bootAggregate || e.Violation {
		return refuse(ReasonIMABootAggregate, "the list begins with %.80q", e.Path)
	}
	a, err := ParseAlg(e.Alg)
	if err != nil || a != firmware.Alg {
		return refuse(ReasonIMABootAggregate, "it is %s, the quote is %s", e.Alg, firmware.Alg)
	}
	if !bytes.Equal(a.sum(firmware.Values[:10]...), e.Digest) {
		return refuse(ReasonIMABootAggregate, "%x is not the digest of PCR 0 to 9", e.Digest)
	}
	return nil
}

// IMADigestSize tells the classic list from one of the newer per-bank files by
// the first entry; 0 if neither fits.
func IMADigestSize(list []byte, bank Alg) int {
	for _, size := range []int{SHA1Size, bank.Size()} {
		w := imaWalk{cursor: littleEndian(list), digestSize: size}
		e, err := w.read(0)
		if err == nil && strings.IndexFunc(e.Template, func(r rune) bool { return r <= ' ' || r > '~' }) < 0 {
			return size
		}
	}
	return 0
}
