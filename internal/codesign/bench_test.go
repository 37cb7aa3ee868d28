package codesign_test

import (
	"crypto/sha256"
	"fmt"
	"testing"

	"ringwall/internal/codesign"
	"ringwall/internal/integrity"
)

// Half of the digests are there.
func BenchmarkCatalogue_lookup(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			digests := make([]integrity.Digest, 2*n)
			records := make([]codesign.Record, n)
			for i := range digests {
				digests[i] = sha256.Sum256(fmt.Append(nil, i))
			}
			for i := range records {
				records[i] = codesign.Record{Digest: digests[2*i], Kinds: integrity.SetOf(integrity.KindExec)}
			}
			blob, err := codesign.EncodeCatalogue(records)
			if err != nil {
				b.Fatal(err)
			}
			c, err := codesign.ParseCatalogue(blob)
			if err != nil {
				b.Fatal(err)
			}
			i := 0
			for b.Loop() {
				i = (i + 7919) % len(digests)
				if _, ok := c.Lookup(digests[i]); ok != (i%2 == 0) {
					b.Fatalf("digest %d: found is %v", i, ok)
				}
			}
		})
	}
}
