package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/agentpb"
)

func note(i int) *agentpb.Record {
	return &agentpb.Record{AtUs: int64(i), What: &agentpb.Record_Notice{Notice: &agentpb.Notice{Code: "test", Text: fmt.Sprint(i)}}}
}

func openLane(t *testing.T, dir string, limit int64) *spool {
	t.Helper()
	s, err := openSpool(dir, agentpb.Lane_LANE_BLOCKS, limit)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// numbers are the records of a batch, which must be without a gap.
func numbers(t *testing.T, s *spool) (first uint64, out []int64) {
	t.Helper()
	first, rs, err := s.batch()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		out = append(out, r.GetAtUs())
	}
	return first, out
}

// Whatever a killed agent leaves of the last write, the next one goes on with
// every record that was whole, in order, under the same number.
func TestSpool_killedAtEveryByte(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openLane(t, dir, spoolBlocks)
	for i := 1; i <= 3; i++ {
		s.add(note(i))
	}
	s.ack(1)
	stream := s.stream
	name := s.file(1)
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	_, two := parseFrames(whole[:len(whole)-1])
	for cut := two; cut <= len(whole); cut++ {
		if err := os.WriteFile(name, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		n := openLane(t, dir, spoolBlocks)
		want := "[2]"
		if cut == len(whole) {
			want = "[2 3]"
		}
		if first, got := numbers(t, n); first != 2 || fmt.Sprint(got) != want || n.stream != stream {
			t.Fatalf("cut at %d: first %d, records %v, want %s", cut, first, got, want)
		}
		n.add(note(9))
		if first, got := numbers(t, n); first != 2 || got[len(got)-1] != 9 {
			t.Fatalf("cut at %d, one more: first %d, records %v", cut, first, got)
		}
		n.close()
	}
}

func TestSpool_manyFilesAndAcks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openLane(t, dir, spoolBlocks)
	big := strings.Repeat("x", 30<<10)
	const n = 100 // three files
	for i := 1; i <= n; i++ {
		r := note(i)
		r.GetNotice().Text = big
		s.add(r)
	}
	var all []int64
	for len(all) < n {
		first, got := numbers(t, s)
		if len(got) == 0 || first != uint64(len(all))+1 {
			t.Fatalf("first %d after %d records", first, len(all))
		}
		all = append(all, got...)
		s.ack(uint64(len(all)))
		s.close()
		s = openLane(t, dir, spoolBlocks)
	}
	for i, x := range all {
		if x != int64(i)+1 {
			t.Fatalf("record %d is %d", i+1, x)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(dir, "*"+segSuffix)); len(files) != 1 {
		t.Errorf("%d files left of what was acknowledged", len(files))
	}
	if b, _ := s.waiting(); b != 0 {
		t.Errorf("%d bytes wait", b)
	}
	// the number goes on although nothing is left
	if err := os.Remove(filepath.Join(dir, "acked")); err != nil {
		t.Fatal(err)
	}
	s.close()
	s = openLane(t, dir, spoolBlocks)
	s.add(note(1000))
	_, got := numbers(t, s)
	if got[len(got)-1] != 1000 || s.segs[len(s.segs)-1].end() != n+2 {
		t.Errorf("records %v, next number %d", got, s.segs[len(s.segs)-1].end())
	}
}

func TestSpool_full(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	one := int64(len(frame([]byte("x")))) // at least
	s := openLane(t, dir, 40*one)
	for i := 1; i <= 100; i++ {
		s.add(note(i))
	}
	_, got := numbers(t, s)
	kept := len(got)
	if kept == 0 || kept == 100 {
		t.Fatalf("%d kept", kept)
	}
	if _, dropped := s.waiting(); dropped != uint64(100-kept) {
		t.Errorf("%d dropped of %d", dropped, 100-kept)
	}
	s.ack(uint64(kept))
	s.close()
	s = openLane(t, dir, spoolBlocks) // room again, another agent
	s.add(note(200))
	first, rs, err := s.batch()
	if err != nil || first != uint64(kept)+1 || len(rs) != 2 {
		t.Fatalf("first %d, %d records, %v", first, len(rs), err)
	}
	if l := rs[0].GetLost(); l.GetRecords() != uint64(100-kept) {
		t.Errorf("the loss of %d is told as %d", 100-kept, l.GetRecords())
	}
}

func TestSpool_damage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openLane(t, dir, spoolBlocks)
	for i := range 60 {
		r := note(i)
		r.GetNotice().Text = strings.Repeat("y", 40<<10)
		s.add(r)
	}
	s.close()
	name := s.file(1)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	n := openLane(t, dir, spoolBlocks)
	if n.stream == s.stream {
		t.Error("the same stream without its records")
	}
	n.add(note(1))
	_, rs, err := n.batch()
	if err != nil || len(rs) != 2 || rs[0].GetLost() == nil {
		t.Errorf("%d records, %v: the loss is not told", len(rs), err)
	}
}

func FuzzParseFrames(f *testing.F) {
	f.Add(append(frame([]byte("one")), frame([]byte("two"))...))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		frames, good := parseFrames(raw)
		var again []byte
		for _, x := range frames {
			again = append(again, frame(x)...)
		}
		if !bytes.Equal(again, raw[:good]) {
			t.Errorf("%d frames do not give back their bytes", len(frames))
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	f.Add([]byte(`{"manifest":"` + strings.Repeat("1", 64) + `","epoch":1,"policy":"` + strings.Repeat("2", 64) + `","index":[],"since_us":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := parseBundle(raw)
		if err == nil && (b.isZero() || b.Epoch == 0) {
			t.Error("an empty record is taken")
		}
	})
}
