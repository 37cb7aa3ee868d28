package codesign_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/codesign"
)

// plainVerity is fs-verity's definition, written out level by level.
func plainVerity(data []byte) [32]byte {
	block := func(b []byte) [32]byte {
		p := make([]byte, 4096)
		copy(p, b)
		return sha256.Sum256(p)
	}
	var root [32]byte
	if len(data) > 0 {
		level := data
		for len(level) > 4096 {
			var next []byte
			for i := 0; i < len(level); i += 4096 {
				d := block(level[i:min(i+4096, len(level))])
				next = append(next, d[:]...)
			}
			level = next
		}
		root = block(level)
	}
	d := make([]byte, 256)
	d[0], d[1], d[2] = 1, 1, 12
	binary.LittleEndian.PutUint64(d[8:], uint64(len(data)))
	copy(d[16:], root[:])
	return sha256.Sum256(d)
}

func sizes() []int {
	return []int{0, 1, 4095, 4096, 4097, 8192, 4096 * 127, 4096 * 128, 4096*128 + 1, 4096 * 129, 4096*128*3 + 5, 4096 * 128 * 128, 4096*128*128 + 1}
}

func TestHasher(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 4096*128*128+1)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	for name, h := range hashers(t) {
		for _, n := range sizes() {
			h.Reset()
			for rest := data[:n]; len(rest) > 0; { // in pieces of any size
				k := min(len(rest), 1+rng.IntN(20_000))
				_, _ = h.Write(rest[:k])
				rest = rest[k:]
			}
			flat, verity := h.Sums()
			if flat != sha256.Sum256(data[:n]) || verity != plainVerity(data[:n]) {
				t.Errorf("%s, size %d", name, n)
			}
		}
	}
}

// hashers are the ways to compute both digests.
func hashers(t testing.TB) map[string]*codesign.Hasher {
	t.Helper()
	plain := codesign.NewHasher()
	codesign.Unpair(plain)
	out := map[string]*codesign.Hasher{"plain": plain}
	if h := codesign.NewHasher(); codesign.Paired(h) {
		out["paired"] = h
	} else {
		t.Log("WARNING: this processor has no SHA instructions; how they are used is not tested")
	}
	return out
}

// FuzzHasher compares with the standard library, for content that is cut anywhere.
func FuzzHasher(f *testing.F) {
	f.Add([]byte("content"), uint16(3), uint16(700))
	f.Fuzz(func(t *testing.T, b []byte, cut, times uint16) {
		data := bytes.Repeat(b, min(int(times), 1<<14/max(1, len(b))))
		at := min(int(cut), len(data))
		for name, h := range hashers(t) {
			_, _ = h.Write(data[:at])
			_, _ = h.Write(data[at:])
			if flat, verity := h.Sums(); flat != sha256.Sum256(data) || verity != plainVerity(data) {
				t.Errorf("%s, %d bytes, cut at %d", name, len(data), at)
			}
		}
	})
}

func BenchmarkHasher(b *testing.B) {
	data := make([]byte, 1<<20)
	for name, h := range hashers(b) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				h.Reset()
				_, _ = h.Write(data)
				_, _ = h.Sums()
			}
		})
	}
	b.Run("one SHA-256", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			_ = sha256.Sum256(data)
		}
	})
}

func TestHasher_fsverityTool(t *testing.T) {
	tool, err := exec.LookPath("fsverity")
	if err != nil {
		t.Skip("SKIPPED: fsverity is not installed; fs-verity digests are compared with our own definition only")
	}
	path := filepath.Join(t.TempDir(), "f")
	rng := rand.New(rand.NewPCG(3, 4))
	for _, n := range sizes() {
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(tool, "digest", "--compact", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		h := codesign.NewHasher()
		_, _ = h.Write(data)
		if _, v := h.Sums(); v.String() != strings.TrimSpace(string(out)) {
			t.Errorf("size %d: %v, fsverity says %s", n, v, out)
		}
	}
}
