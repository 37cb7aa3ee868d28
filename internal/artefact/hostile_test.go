package artefact_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/artefact"
	"ringwall/internal/errs"
)

// cpioEntry is an entry of a cpio archive; what is 0 gets what is usual.
type cpioEntry struct {
	name, body string
	mode       uint32
	ino, nlink uint32
	size       int64 // said; -1: nothing said is 0
}

func cpioOf(entries ...cpioEntry) []byte {
	var b bytes.Buffer
	pad := func() {
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for _, e := range append(slices.Clone(entries), cpioEntry{name: "TRAILER!!!"}) {
		if e.mode == 0 {
			e.mode = 0o100755
		}
		size := int64(len(e.body))
		if e.size != 0 {
			size = e.size
		}
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", e.ino, e.mode, 0, 0, max(e.nlink, 1), 0, uint32(size), 0, 0, 0, 0, len(e.name)+1, 0)
		b.WriteString(e.name + "\x00")
		pad()
		b.WriteString(e.body)
		pad()
	}
	return b.Bytes()
}

// rpmOf is a small package, spoilt by change (nil: not at all).
func rpmOf(change func(tags map[int]any), payload ...cpioEntry) []byte {
	tags := map[int]any{1000: "edged", 1001: "4.7.0", 1002: "1", 1022: "x86_64", 1024: "echo post", 1124: "cpio"}
	if change != nil {
		change(tags)
	}
	if payload == nil {
		payload = []cpioEntry{{name: "./usr/bin/edged", body: sh}}
	}
	b := append([]byte("\xed\xab\xee\xdb\x03\x00"), bytes.Repeat([]byte{0}, 90)...)
	b = append(b, rpmHeader(map[int]any{})...)
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return append(append(b, rpmHeader(tags)...), cpioOf(payload...)...)
}

func rpmHeader(tags map[int]any) []byte {
	var index, store bytes.Buffer
	keys := make([]int, 0, len(tags))
	for k := range tags {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		kind, count := uint32(6), uint32(1)
		at := uint32(store.Len())
		switch v := tags[k].(type) {
		case string:
			store.WriteString(v + "\x00")
		case []string:
			kind, count = 8, uint32(len(v))
			store.WriteString(strings.Join(v, "\x00") + "\x00")
		case []uint32:
			for store.Len()%4 != 0 {
				store.WriteByte(0)
			}
			at = uint32(store.Len())
			kind, count = 4, uint32(len(v))
			_ = binary.Write(&store, binary.BigEndian, v)
		}
		_ = binary.Write(&index, binary.BigEndian, []uint32{uint32(k), kind, at, count})
	}
	b := []byte("\x8e\xad\xe8\x01\x00\x00\x00\x00")
	b = binary.BigEndian.AppendUint32(b, uint32(len(tags)))
	b = binary.BigEndian.AppendUint32(b, uint32(store.Len()))
	return append(append(b, index.Bytes()...), store.Bytes()...)
}

// uki is a PE file with sections.
func uki(sections map[string]string) []byte {
	names := make([]string, 0, len(sections))
	for n := range sections {
		names = append(names, n)
	}
	slices.Sort(names)
	le := binary.LittleEndian
	b := append([]byte("MZ"), bytes.Repeat([]byte{0}, 1022)...)
	le.PutUint32(b[60:], 64)
	copy(b[64:], "PE\x00\x00")
	le.PutUint16(b[70:], uint16(len(names)))
	le.PutUint16(b[84:], 240)
	le.PutUint16(b[88:], 0x20b)
	le.PutUint16(b[88+68:], 10)
	for i, n := range names {
		h := b[88+240+40*i:]
		copy(h[:8], n)
		le.PutUint32(h[8:], uint32(len(sections[n])))
		le.PutUint32(h[16:], uint32(len(sections[n])+511)&^511)
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, sections[n]...)
		for len(b)%512 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

func patch(b []byte, at int, with ...byte) []byte {
	b = bytes.Clone(b)
	copy(b[at:], with)
	return b
}

// sparse is a tar archive whose file claims to be huge.
func sparse(t testing.TB, size int64) []byte {
	t.Helper()
	b := tarOf(t, file{"a", "x", 0o644})
	h := b[:512]
	h[156] = 'S'
	copy(h[257:], "ustar  \x00")
	copy(h[386:], fmt.Sprintf("%011o\x00%011o\x00", size-1, 1)) // one byte at the end
	for i := 410; i < 482; i++ {
		h[i] = 0
	}
	copy(h[483:], fmt.Sprintf("%011o\x00", size))
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func TestHostile(t *testing.T) {
	z := zipOf(t, file{"a.sh", sh, 0o755})
	two := zipOf(t, file{"a.sh", sh, 0o755}, file{"b.sh", sh, 0o755})
	good := cpioOf(cpioEntry{name: "a", body: sh})
	rpm := rpmOf(nil)
	image := uki(map[string]string{".linux": "MZ kernel", ".cmdline": "quiet"})
	central := bytes.Index(z, []byte("PK\x01\x02"))
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"zip: climbs":                 {zipOf(t, file{"../a.sh", sh, 0o755}), errs.Invalid},
		"zip: climbs, backslash kept": {zipOf(t, file{"a/../../b", sh, 0o755}), errs.Invalid},
		"zip: twice":                  {zipOf(t, file{"a", "1", 0o644}, file{"./a", "2", 0o644}), errs.Invalid},
		"zip: names disagree":         {bytes.Replace(z, []byte("a.sh"), []byte("b.sh"), 1), errs.Invalid},
		"zip: methods disagree":       {patch(z, 8, 0), errs.Invalid},
		"zip: encrypted":              {patch(z, central+8, 1), errs.Unsupported},
		"zip: unknown method":         {patch(patch(z, 8, 14), central+10, 14), errs.Unsupported},
		"zip: content changed":        {patch(z, 30+4+3, 'X'), errs.Invalid},
		"zip: cut":                    {z[:len(z)-10], errs.Invalid},
		"zip: cut in the middle":      {append(bytes.Clone(two[:20]), two[60:]...), errs.Invalid},
		"zip: 4 GiB said":             {patch(z, central+24, 0xfe, 0xff, 0xff, 0xff), errs.Invalid},
		"zip: entries said":           {patch(z, len(z)-14, 0xff, 0x0f, 0xff, 0x0f), errs.Invalid},
		"zip: directory elsewhere":    {patch(z, len(z)-6, 0xff, 0xff, 0xff, 0x0f), errs.Invalid},

		"cpio: climbs":             {cpioOf(cpioEntry{name: "../a", body: sh}), errs.Invalid},
		"cpio: twice":              {cpioOf(cpioEntry{name: "a"}, cpioEntry{name: "./a"}), errs.Invalid},
		"cpio: 4 GiB said":         {cpioOf(cpioEntry{name: "a", body: "x", size: 0xffffffff}), errs.Invalid},
		"cpio: cut":                {good[:len(good)-20], errs.Invalid},
		"cpio: no trailer":         {good[:bytes.LastIndex(good, []byte("070701"))], errs.Invalid},
		"cpio: name without end":   {bytes.Replace(good, []byte("a\x00"), []byte("aa"), 1), errs.Invalid},
		"cpio: trailer with more":  {cpioOf(cpioEntry{name: "TRAILER!!!", body: sh}), errs.Invalid},
		"cpio: two contents":       {cpioOf(cpioEntry{name: "a", body: "1", ino: 7, nlink: 2}, cpioEntry{name: "b", body: "2", ino: 7, nlink: 2}), errs.Invalid},
		"cpio: link of 1 MiB":      {cpioOf(cpioEntry{name: "a", mode: 0o120777, body: strings.Repeat("x", 1<<20)}), errs.Invalid},
		"cpio: directory, content": {cpioOf(cpioEntry{name: "a", mode: 0o040755, body: "x"}), errs.Invalid},
		"cpio: device, content":    {cpioOf(cpioEntry{name: "a", mode: 0o020755, body: "x"}), errs.Invalid},
		"cpio: junk after it":      {append(bytes.Clone(good), "junk"...), errs.Invalid},
		"cpio: data in padding":    {bytes.Replace(good, []byte(sh+"\x00\x00"), []byte(sh+"xx"), 1), errs.Invalid},
		"cpio: bad hex":            {patch(good, 10, 'Z'), errs.Invalid},
		"cpio: old form":           {[]byte("070707" + strings.Repeat("0", 200)), errs.Unsupported},
		"initramfs: gz, then junk": {append(gz(t, good), "junkjunk"...), errs.Invalid},
		"initramfs: cut":           {gz(t, good)[:40], errs.Invalid},

		"rpm: header said huge":   {patch(rpm, 96+16+8, 0x7f, 0xff, 0xff, 0xff), errs.Invalid},
		"rpm: store said huge":    {patch(rpm, 96+16+12, 0x7f, 0xff, 0xff, 0xff), errs.Invalid},
		"rpm: cut":                {rpm[:len(rpm)-60], errs.Invalid},
		"rpm: no header":          {rpm[:110], errs.Invalid},
		"rpm: no name":            {rpmOf(func(m map[int]any) { delete(m, 1000) }), errs.Invalid},
		"rpm: other payload":      {rpmOf(func(m map[int]any) { m[1124] = "drpm" }), errs.Unsupported},
		"rpm: fake scriptlet":     {rpmOf(nil, cpioEntry{name: "./RPM/post", body: sh}), errs.Invalid},
		"rpm: large files":        {bytes.Replace(rpm, []byte("070701"), []byte("07070X"), 1), errs.Unsupported},
		"rpm: data after the end": {append(bytes.Clone(rpm), "more"...), errs.Invalid},
		"rpm: capabilities of nobody": {rpmOf(func(m map[int]any) {
			m[5010], m[1117], m[1118], m[1116] = []string{"cap_net_raw=ep"}, []string{"a", "b"}, []string{"/"}, []uint32{0, 0}
		}), errs.Invalid},
		"rpm: file in no directory": {rpmOf(func(m map[int]any) {
			m[5010], m[1117], m[1118], m[1116] = []string{"cap_net_raw=ep"}, []string{"a"}, []string{"/"}, []uint32{7}
		}), errs.Invalid},
		"rpm: millions of texts":  {rpmOf(func(m map[int]any) { m[5010] = make([]string, 2<<20) }), errs.Invalid},
		"rpm: script is a number": {rpmOf(func(m map[int]any) { m[1024] = []uint32{1} }), errs.Invalid},

		"uki: section beyond the end": {patch(image, 88+240+20, 0xff, 0xff, 0xff, 0x7f), errs.Invalid},

		"tar: sparse, 8 TiB": {sparse(t, 8<<30), errs.Invalid},
		"tar: cut":           {tarOf(t, file{"a", strings.Repeat("x", 600), 0o644})[:700], errs.Invalid},
	} {
		_, err := openAndWalk(t, c.b)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{"zip": z, "cpio": good, "rpm": rpm, "uki": image} {
		if got, err := openAndWalk(t, b); err != nil || len(got) == 0 {
			t.Errorf("the %s that the others were made of: %v %v", name, got, err)
		}
	}
}

func openAndWalk(t testing.TB, b []byte) (map[string]string, error) {
	t.Helper()
	a, err := artefact.Open(save(t, "x", b), artefact.Options{})
	if err != nil {
		return nil, err
	}
	defer a.Close()
	return walk(a)
}

func TestRPM_scriptsAndCapabilities(t *testing.T) {
	got, err := openAndWalk(t, rpmOf(func(m map[int]any) {
		m[1023], m[1065], m[1026] = "echo pre", []string{"echo one", "", "echo three"}, ""
		m[5010], m[1117], m[1118], m[1116] = []string{"cap_net_raw=ep"}, []string{"edged"}, []string{"/usr/bin/"}, []uint32{0}
	}))
	if err != nil || got["RPM/trigger-2"] != "0755 "+sum("echo three")+" install" || got["RPM/post"] == "" || got["RPM/pre"] == "" ||
		got["usr/bin/edged"] != "0755 "+sum(sh)+" caps" || len(got) != 5 {
		t.Errorf("%v %v", got, err)
	}
}

func TestUKI(t *testing.T) {
	initrd := cpioOf(cpioEntry{name: "init", body: sh})
	b := uki(map[string]string{".linux": "MZ kernel", ".initrd": string(initrd), ".cmdline": "quiet", ".text": "stub"})
	a := open(t, save(t, "x.efi", b), artefact.Options{})
	got := members(t, a)
	for name, want := range map[string]string{
		"x.efi": "0644 " + sum(string(b)), "x.efi!/.linux": "0644 " + sum("MZ kernel") + " nested", "x.efi!/.initrd": "0644 " + sum(string(initrd)) + " nested",
		"x.efi!/.cmdline": "0644 " + sum("quiet") + " nested", "x.efi!/.initrd!/init": "0755 " + sum(sh) + " nested",
	} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
	if a.Format != artefact.FormatUKI || len(got) != 5 {
		t.Errorf("%s %v", a.Format, got)
	}
}

// A real stub of systemd with sections that objcopy added.
func TestUKI_objcopy(t *testing.T) {
	const stub = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	if _, err := os.Stat(stub); err != nil {
		t.Skip("SKIPPED, NOT CHECKED: systemd-boot-efi is not installed")
	}
	dir := t.TempDir()
	initrd := cpioOf(cpioEntry{name: "init", body: sh})
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "initrd"), initrd, 0o644), os.WriteFile(filepath.Join(dir, "linux"), []byte("MZ kernel"), 0o644)); err != nil {
		t.Fatal(err)
	}
	run(t, dir, "objcopy", "--add-section", ".linux=linux", "--change-section-vma", ".linux=0x2000000",
		"--add-section", ".initrd=initrd", "--change-section-vma", ".initrd=0x3000000", stub, "uki.efi")
	got := members(t, open(t, filepath.Join(dir, "uki.efi"), artefact.Options{}))
	if got["uki.efi!/.linux"] != "0644 "+sum("MZ kernel")+" nested" || got["uki.efi!/.initrd!/init"] != "0755 "+sum(sh)+" nested" {
		t.Errorf("%v", got)
	}
}

// Images that point into themselves, and numbers that are not there.
func TestHostile_images(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "d/a"), bytes.Repeat([]byte("words"), 5000), 0o644)); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	for _, c := range []string{"mksquashfs . OUT -quiet -no-progress -noI -noD -noF -noX", "mksquashfs . OUT -quiet -no-progress", "mkfs.erofs --quiet OUT ."} {
		file := filepath.Join(out, "image")
		_ = os.Remove(file)
		if _, err := exec.LookPath(strings.Fields(c)[0]); err != nil {
			t.Skipf("SKIPPED, NOT CHECKED: %s is not installed", c)
		}
		run(t, dir, "sh", "-c", strings.ReplaceAll(c, "OUT", file)+" >/dev/null")
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 64<<10 {
			b = b[:64<<10]
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		// every byte of the first blocks, and every place to cut
		step := max(len(b)/400, 1)
		for at := 0; at < len(b); at += step {
			for _, spoilt := range [][]byte{patch(b, at, b[at]^0xff), patch(b, at, 0xff, 0xff, 0xff, 0x7f), b[:at]} {
				if _, err := openAndWalk(t, spoilt); err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) {
					t.Fatalf("%s, byte %d: error of no kind: %v", c, at, err)
				}
			}
		}
		runtime.ReadMemStats(&after)
		if got := int64(after.Sys) - int64(before.Sys); got > 256<<20 {
			t.Errorf("%s: %d MiB more of memory", c, got>>20)
		}
	}
}

// A directory that contains itself has twice as many names with every level: it
// is known by its place, not by the length of a path.
func TestErofs_directoryLoop(t *testing.T) {
	f, err := os.Open("testdata/loop.erofs.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	_, err = walk(open(t, save(t, "loop.erofs", b), artefact.Options{}))
	if !errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "contains itself") {
		t.Errorf("%v", err)
	}
}
