package attest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"ringwall/internal/errs"
)

func TestParseVariable(t *testing.T) {
	good := variableData(guidGlobal, "SecureBoot", []byte{1})
	v, err := parseVariable(good)
	if err != nil || !v.is(guidGlobal, "SecureBoot") || !bytes.Equal(v.Data, []byte{1}) {
		t.Fatalf("%+v, %v", v, err)
	}
	edit := func(offset int, n uint64) []byte {
		b := bytes.Clone(good)
		binary.LittleEndian.PutUint64(b[offset:], n)
		return b
	}
	for what, bad := range map[string][]byte{
		"empty": nil, "cut": good[:len(good)-1], "something follows": append(bytes.Clone(good), 1), "much follows": append(bytes.Clone(good), make([]byte, 9)...),
		"long name": edit(16, 1<<62), "name that wraps": edit(16, 1<<63), "long data": edit(24, 1<<63), "NUL in the name": variableData(guidGlobal, "Secure\x00Boot", nil),
	} {
		if _, err := parseVariable(bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// as shim before 15.3 logs it
	if v, err := parseVariable(append(bytes.Clone(good), make([]byte, 5)...)); err != nil || len(v.Data) != 1 {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestParseSignatures(t *testing.T) {
	list := slices.Concat(signatureList(guidX509, certificate("a")), signatureList(guidSHA256, revokedHash(1), revokedHash(2)))
	got, err := parseSignatures(list)
	if err != nil || len(got) != 3 || got[0].Type != guidX509 || got[2].id() != FormatDigest(SHA256, revokedHash(2)) {
		t.Fatalf("%+v, %v", got, err)
	}
	edit := func(offset int, n uint32) []byte {
		b := bytes.Clone(list)
		binary.LittleEndian.PutUint32(b[offset:], n)
		return b
	}
	many := binary.LittleEndian.AppendUint32(guidBytes(guidSHA256), uint32(28+17*(maxSignatures+1)))
	many = binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(many, 0), 17)
	many = append(many, make([]byte, 17*(maxSignatures+1))...)
	for what, bad := range map[string][]byte{
		"cut": list[:len(list)-1], "short head": list[:20], "list shorter than its head": edit(16, 27), "list of 4 GiB": edit(16, 0xffffffff),
		"header of 4 GiB": edit(20, 0xffffffff), "no size": edit(24, 0), "owner only": edit(24, 16), "size that does not fit": edit(24, 17), "too many": many,
	} {
		if _, err := parseSignatures(bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParseSignatures(f *testing.F) {
	f.Add(signatureList(guidSHA256, revokedHash(1), revokedHash(2)))
	f.Add(variableData(guidGlobal, "SecureBoot", []byte{1}))
	f.Fuzz(func(_ *testing.T, b []byte) {
		s, _ := parseSignatures(b)
		for i := range s {
			_ = s[i].id()
		}
		if v, err := parseVariable(b); err == nil {
			_ = authorityID(v.Data)
		}
		_ = DataText(b)
	})
}

func FuzzVerifyArchive(f *testing.F) {
	in := newMachine().input(f, newForger(f))
	r, _, _ := Appraise(in)
	signed, err := r.Sign(plain{})
	if err != nil {
		f.Fatal(err)
	}
	archive, err := NewArchive(in, signed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(archive)
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = VerifyArchive(b, newCatalogue("true"), plain{}.open) })
}
