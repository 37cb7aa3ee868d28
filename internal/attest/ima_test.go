package attest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"

	"ringwall/internal/errs"
)

// imaList writes a list as the kernel does, and what PCR 10 is extended with.
type imaList struct {
	bytes.Buffer
	digestSize int
	extended   [][]byte
}

func field(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func (l *imaList) add(template string, violation bool, data []byte) {
	sum := SHA1.sum(data)
	if l.digestSize == SHA256.Size() {
		sum = SHA256.sum(data)
	}
	d := SHA256.sum(data)
	if violation {
		sum, d = make([]byte, l.digestSize), bytes.Repeat([]byte{0xff}, SHA256.Size())
	}
	le := binary.LittleEndian
	l.Write(le.AppendUint32(nil, pcrIMA))
	l.Write(sum)
	l.Write(field([]byte(template)))
	l.Write(field(data))
	l.extended = append(l.extended, d)
}

func ng(alg string, digest []byte, path string) []byte {
	return slices.Concat(field(append([]byte(alg+":\x00"), digest...)), field(append([]byte(path), 0)))
}

func (l *imaList) file(path, content string) {
	l.add("ima-ng", false, ng("sha256", SHA256.sum([]byte(content)), path))
}

// legacy adds an entry of the template "ima".
func (l *imaList) legacy(path, content string) {
	digest := SHA1.sum([]byte(content))
	padded := make([]byte, SHA1Size+imaNameLen+1)
	copy(padded, digest)
	copy(padded[SHA1Size:], path)
	le := binary.LittleEndian
	l.Write(le.AppendUint32(nil, pcrIMA))
	l.Write(SHA1.sum(padded))
	l.Write(field([]byte("ima")))
	l.Write(digest)
	l.Write(field([]byte(path)))
	l.extended = append(l.extended, SHA256.sum(padded))
}

// pcr is PCR 10 after n entries.
func (l *imaList) pcr(n int) []byte {
	v := make([]byte, SHA256.Size())
	for _, d := range l.extended[:n] {
		v = SHA256.sum(v, d)
	}
	return v
}

func everyTemplate(digestSize int) *imaList {
	l := &imaList{digestSize: digestSize}
	l.file(bootAggregate, "boot")
	l.file("/usr/bin/true", "true")
	l.add("ima-sig", false, append(ng("sha256", SHA256.sum([]byte("signed")), "/usr/bin/signed"), field([]byte{3, 2, 4, 1, 2, 3})...))
	l.add("ima-ng", true, ng("sha256", make([]byte, 32), "/var/log/open"))
	buffer := []byte("root=/dev/vda1 quiet")
	l.add("ima-buf", false, append(ng("sha256", SHA256.sum(buffer), "kexec-cmdline"), field(buffer)...))
	l.add("ima-buf", false, append(ng("sha256", SHA256.sum([]byte("other")), "liar"), field(buffer)...))
	l.add("ima-ngv2", false, ng("verity:sha256", SHA256.sum([]byte("v")), "/usr/bin/verity"))
	l.add("ima-sigv2", false, append(ng("ima:sha512", SHA512.sum([]byte("v")), "/usr/bin/sigv2"), field(nil)...))
	l.add("ima-modsig", false, append(ng("sha256", SHA256.sum([]byte("m")), "/lib/m.ko"), slices.Concat(field(nil), field(nil), field(nil))...))
	evm := ng("sha256", SHA256.sum([]byte("e")), "/usr/bin/evm")
	for range 7 {
		evm = append(evm, field(nil)...)
	}
	l.add("evm-sig", false, evm)
	l.add("d-ng|n-ng", false, ng("sha256", SHA256.sum([]byte("custom")), "/usr/bin/custom format"))
	l.file("/usr/bin/last", "last")
	return l
}

func TestReplayIMA(t *testing.T) {
	for _, size := range []int{SHA1Size, SHA256.Size()} {
		l := everyTemplate(size)
		n := len(l.extended)
		if got := IMADigestSize(l.Bytes(), SHA256); got != size {
			t.Errorf("digests of %d bytes are taken for %d", size, got)
		}
		w := imaWalk{cursor: littleEndian(l.Bytes()), digestSize: size}
		for i := range n { // a later round may begin anywhere
			if got := IMADigestSize(w.b, SHA256); got != size {
				t.Errorf("from entry %d on: digests of %d bytes are taken for %d", i, size, got)
			}
			if _, err := w.read(i); err != nil {
				t.Fatal(err)
			}
		}
		var seen []IMAEntry
		to, rest, err := ReplayIMA(l.Bytes(), size, IMAState{}, SHA256, l.pcr(n), func(e *IMAEntry) error {
			seen = append(seen, *e)
			return nil
		})
		if err != nil || to.Entries != n || rest != 0 || len(seen) != n {
			t.Fatalf("%d of %d entries, %d bytes rest, %v", to.Entries, n, rest, err)
		}
		if end, err := IMALeadsTo(l.Bytes(), size, SHA256); err != nil || end.Entries != n || !bytes.Equal(end.PCR, l.pcr(n)) {
			t.Errorf("it leads to %+v, %v", end, err)
		}
		if _, err := IMALeadsTo(l.Bytes()[:l.Len()-1], size, SHA256); !errors.Is(err, errs.Invalid) {
			t.Errorf("cut: %v", err)
		}
		for i, want := range []struct {
			path, alg string
			digest    []byte
		}{
			1: {"/usr/bin/true", "sha256", SHA256.sum([]byte("true"))}, 3: {"/var/log/open", "", nil},
			6: {"/usr/bin/verity", "sha256", SHA256.sum([]byte("v"))}, 7: {"/usr/bin/sigv2", "sha512", SHA512.sum([]byte("v"))},
			10: {"/usr/bin/custom format", "sha256", SHA256.sum([]byte("custom"))},
		} {
			if e := seen[i]; want.path != "" && (e.Index != i || e.Path != want.path || e.Alg != want.alg || !bytes.Equal(e.Digest, want.digest)) {
				t.Errorf("entry %d: %+v", i, e)
			}
		}
		if !seen[3].Violation || seen[1].Violation || !seen[6].Verity || seen[7].Verity || len(seen[2].Signature) != 6 {
			t.Errorf("%+v", seen)
		}
		if seen[4].Buffer == nil || seen[5].Buffer != nil {
			t.Error("a buffer is shown whose digest is another, or one is missing")
		}
	}
}

// The list may run ahead of the quote; it may not lag, and a later round goes
// on from where the last one ended.
func TestReplayIMA_incremental(t *testing.T) {
	l := everyTemplate(SHA1Size)
	all := len(l.extended)
	for n := range all + 1 {
		to, rest, err := ReplayIMA(l.Bytes(), SHA1Size, IMAState{}, SHA256, l.pcr(n), nil)
		if err != nil || to.Entries != n {
			t.Fatalf("%d entries: %d, %v", n, to.Entries, err)
		}
		count := 0
		end, rest2, err := ReplayIMA(l.Bytes()[l.Len()-rest:], SHA1Size, to, SHA256, l.pcr(all), func(*IMAEntry) error { count++; return nil })
		if err != nil || end.Entries != all || rest2 != 0 || count != all-n {
			t.Errorf("from %d on: %d, %v", n, end.Entries, err)
		}
		// what is not covered is not shown
		_, _, err = ReplayIMA(l.Bytes(), SHA1Size, IMAState{}, SHA256, l.pcr(n), func(e *IMAEntry) error {
			if e.Index >= n {
				return fmt.Errorf("entry %d of %d", e.Index, n)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	half, rest, err := ReplayIMA(l.Bytes(), SHA1Size, IMAState{}, SHA256, l.pcr(5), nil)
	if err != nil {
		t.Fatal(err)
	}
	tail := l.Bytes()[l.Len()-rest:]
	nobody := func(e *IMAEntry) error { t.Errorf("entry %d of an unverified list is shown", e.Index); return nil }
	for what, c := range map[string]struct {
		list []byte
		from IMAState
	}{
		"list stops while PCR 10 moves":  {nil, half},
		"list starts again from zero":    {l.Bytes(), half},
		"another running value":          {tail, IMAState{Entries: 5, PCR: l.pcr(4)}},
		"list without its first entries": {tail, IMAState{}},
	} {
		_, _, err := ReplayIMA(c.list, SHA1Size, c.from, SHA256, l.pcr(all), nobody)
		wantReason(t, what, err, ReasonIMAReplay)
	}
	_, _, err = ReplayIMA(tail, SHA1Size, IMAState{Entries: 5, PCR: []byte{1}}, SHA256, l.pcr(all), nobody)
	wantReason(t, "bad state", err, ReasonMalformed)
}

func TestReplayIMA_tampered(t *testing.T) {
	l := everyTemplate(SHA1Size)
	want := l.pcr(len(l.extended))
	nobody := func(e *IMAEntry) error { t.Errorf("entry %d of an unverified list is shown", e.Index); return nil }
	bounds := []int{0}
	w := imaWalk{cursor: littleEndian(l.Bytes()), digestSize: SHA1Size}
	for i := range l.extended {
		if _, err := w.read(i); err != nil {
			t.Fatal(err)
		}
		bounds = append(bounds, l.Len()-len(w.b))
	}
	for i := range l.extended {
		// dropped
		bad := slices.Concat(l.Bytes()[:bounds[i]], l.Bytes()[bounds[i+1]:])
		_, _, err := ReplayIMA(bad, SHA1Size, IMAState{}, SHA256, want, nobody)
		wantReason(t, fmt.Sprintf("entry %d dropped", i), err, ReasonIMAReplay)
		// turned into a violation, so that nobody asks for its digest
		bad = bytes.Clone(l.Bytes())
		if clear(bad[bounds[i]+4 : bounds[i]+24]); !bytes.Equal(bad, l.Bytes()) {
			_, _, err = ReplayIMA(bad, SHA1Size, IMAState{}, SHA256, want, nobody)
			wantReason(t, fmt.Sprintf("entry %d as a violation", i), err, ReasonIMAReplay)
		}
		if i > 0 { // swapped with the one before
			bad = slices.Concat(l.Bytes()[:bounds[i-1]], l.Bytes()[bounds[i]:bounds[i+1]], l.Bytes()[bounds[i-1]:bounds[i]], l.Bytes()[bounds[i+1]:])
			_, _, err = ReplayIMA(bad, SHA1Size, IMAState{}, SHA256, want, nobody)
			wantReason(t, fmt.Sprintf("entry %d moved", i), err, ReasonIMAReplay)
		}
	}
	// Any changed byte is found, but for what no digest covers: the names of
	// templates, and what a violation says.
	uncovered := 0
	for i := range l.Len() {
		bad := bytes.Clone(l.Bytes())
		bad[i] ^= 0x08
		var got []IMAEntry
		_, _, err := ReplayIMA(bad, SHA1Size, IMAState{}, SHA256, want, func(e *IMAEntry) error { got = append(got, *e); return nil })
		if err != nil {
			continue
		}
		uncovered++
		honest := 0
		_, _, _ = ReplayIMA(l.Bytes(), SHA1Size, IMAState{}, SHA256, want, func(e *IMAEntry) error {
			g := got[honest]
			honest++
			if !e.Violation && (g.Path != e.Path || g.Alg != e.Alg || !bytes.Equal(g.Digest, e.Digest) || g.Violation) {
				t.Errorf("byte %d: entry %d says %+v", i, e.Index, g)
			}
			return nil
		})
	}
	// and the SHA-1 digests that the list records
	if recorded := SHA1Size * len(l.extended); uncovered == 0 || uncovered > 200+recorded {
		t.Errorf("%d bytes can be changed", uncovered)
	}
}

func TestReplayIMA_legacyTemplate(t *testing.T) {
	l := &imaList{digestSize: SHA1Size}
	l.legacy(bootAggregate, "boot")
	l.legacy("/usr/bin/true", "true")
	var paths []string
	_, _, err := ReplayIMA(l.Bytes(), SHA1Size, IMAState{}, SHA256, l.pcr(2), func(e *IMAEntry) error {
		paths = append(paths, e.Alg+" "+e.Path)
		return nil
	})
	if err != nil || !slices.Equal(paths, []string{"sha1 boot_aggregate", "sha1 /usr/bin/true"}) {
		t.Errorf("%q, %v", paths, err)
	}
}

func TestReplayIMA_hostile(t *testing.T) {
	le := binary.LittleEndian
	head := func(pcr uint32, name string) []byte {
		return slices.Concat(le.AppendUint32(nil, pcr), SHA1.sum(nil), field([]byte(name)))
	}
	want := SHA256.sum(nil)
	for what, c := range map[string]struct {
		list []byte
		want Reason
	}{
		"PCR 11":             {append(head(11, "ima-ng"), field(nil)...), ReasonMalformed},
		"4 GiB name":         {slices.Concat(le.AppendUint32(nil, 10), SHA1.sum(nil), []byte{0xff, 0xff, 0xff, 0xff}), ReasonMalformed},
		"no name":            {head(10, ""), ReasonMalformed},
		"4 GiB entry":        {append(head(10, "ima-ng"), 0xff, 0xff, 0xff, 0xff), ReasonTooLarge},
		"100 MB entry":       {append(head(10, "ima-ng"), field(make([]byte, 100<<20))...), ReasonTooLarge},
		"ends in the digest": {head(10, "ima-ng")[:10], ReasonMalformed},
		"ends in the data":   {append(head(10, "ima-ng"), 9, 0, 0, 0, 1), ReasonMalformed},
		"long legacy name":   {slices.Concat(head(10, "ima"), make([]byte, 20), field(make([]byte, 256))), ReasonMalformed},
	} {
		_, _, err := ReplayIMA(c.list, SHA1Size, IMAState{}, SHA256, want, nil)
		wantReason(t, what, err, c.want)
	}
	wrong := slices.Concat(le.AppendUint32(nil, 10), want, field([]byte("ima-ng")), field([]byte("x")))
	_, _, err := ReplayIMA(wrong, SHA256.Size(), IMAState{}, SHA256, want, nil)
	wantReason(t, "wrong digest", err, ReasonMalformed)
	// entries that lead to the quoted value and make no sense
	for what, data := range map[string][]byte{
		"one field": field([]byte("sha256:\x00x")), "no NUL after the name": append(field([]byte("sha256:\x00")), field([]byte("x"))...),
		"NUL in the name": append(field([]byte("sha256:\x00")), field([]byte("x\x00y\x00"))...), "empty": nil,
		"no algorithm": ng("", nil, "x")[4:], "short digest": ng("sha256", []byte{1}, "x"), "odd kind": ng("fs:sha256", SHA256.sum(nil), "x"),
		"field too long": {0xff, 0xff, 0xff, 0xff, 1}, "three fields": append(ng("sha256", SHA256.sum(nil), "x"), field(nil)...),
	} {
		l := &imaList{digestSize: SHA1Size}
		l.add("ima-ng", false, data)
		_, _, err := ReplayIMA(l.Bytes(), SHA1Size, IMAState{}, SHA256, l.pcr(1), func(*IMAEntry) error { return nil })
		if !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzReplayIMA(f *testing.F) {
	l := everyTemplate(SHA1Size)
	f.Add(l.Bytes(), 3)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		// a list that leads to itself shows its entries without a crash
		w := imaWalk{cursor: littleEndian(b), bank: SHA256, digestSize: SHA1Size, hash: SHA256.new()}
		pcr := make([]byte, SHA256.Size())
		for i := range min(max(n, 0), 100) {
			if _, err := w.next(i); err != nil {
				break
			}
			pcr = SHA256.sum(pcr, w.extended)
		}
		to, _, err := ReplayIMA(b, SHA1Size, IMAState{}, SHA256, pcr, func(*IMAEntry) error { return nil })
		if err == nil && !bytes.Equal(to.PCR, pcr) {
			t.Error("a replay ends elsewhere")
		}
	})
}

func benchmarkIMA(b *testing.B, entries int) {
	l := &imaList{digestSize: SHA1Size}
	for i := range entries {
		l.file(fmt.Sprintf("/usr/lib/x86_64-linux-gnu/library-with-a-usual-name-%06d.so.1", i), fmt.Sprint(i))
	}
	want := l.pcr(entries)
	known := map[[32]byte]bool{}
	b.SetBytes(int64(l.Len()))
	b.ReportAllocs()
	for b.Loop() {
		unknown := 0
		_, _, err := ReplayIMA(l.Bytes(), SHA1Size, IMAState{}, SHA256, want, func(e *IMAEntry) error {
			if !known[[32]byte(e.Digest)] {
				unknown++
			}
			return nil
		})
		if err != nil || unknown != entries {
			b.Fatal(err, unknown)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(entries), "ns/entry")
}

func BenchmarkReplayIMA_100k(b *testing.B) { benchmarkIMA(b, 100_000) }
func BenchmarkReplayIMA_10k(b *testing.B)  { benchmarkIMA(b, 10_000) }
func BenchmarkReplayIMA_100(b *testing.B)  { benchmarkIMA(b, 100) }
