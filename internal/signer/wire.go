package signer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/textproto"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/integrity"
)

// The protocol, version 1. A request is multipart/form-data: the order as JSON,
// then evidence, then the artefact, in this order, so that a request that will
// be refused is refused before the artefact is sent. The answer is
// multipart/mixed: the result as JSON, then the files of a release, of which the
// kernel signatures may be empty; or an error as JSON.
const (
	pathSign      = "/v1/sign"
	partOrder     = "order"
	partEvidence  = "evidence"
	partArtefact  = "artefact"
	partResult    = "result"
	partRelease   = "release"
	partCatalogue = "catalogue"
	partNames     = "names"
	partKernel    = "kernel"

	maxOrder     = 64 << 10
	maxResult    = 4 << 20
	maxBundle    = 1 << 20
	maxCatalogue = 320 << 20
	// maxKernel is of what is in a tar archive, which adds two blocks at most to each file
	maxKernelWire = maxKernel + maxKernelFiles<<10 + 1<<20
	typeJSON      = "application/json"
	typeBytes     = "application/octet-stream"
)

// Result is what a signature was given for.
type Result struct {
	Product      string         `json:"product"`
	Version      string         `json:"version"`
	Epoch        uint32         `json:"epoch"`
	Identity     string         `json:"identity"`
	Release      string         `json:"release"` // SHA-256 of the statement
	Artefact     string         `json:"artefact"`
	SHA256       string         `json:"sha256"`
	Architecture string         `json:"architecture,omitempty"`
	Files        int            `json:"files"`
	Code         int            `json:"code"`
	Records      int            `json:"records"`
	Kinds        map[string]int `json:"kinds"`
	Decision     *gate.Decision `json:"decision,omitempty"`
	// KernelSignatures are how many of each kind were made; nil: none were asked for.
	KernelSignatures map[gate.KernelSignature]int `json:"kernel_signatures,omitempty"`
}

// Describe returns the result of a signature.
func (s *Signed) Describe() Result {
	r := Result{
		Product: s.Release.Product, Version: s.Release.Version, Epoch: s.Release.Epoch, Identity: s.Release.Identity, Release: s.Release.Record.String(),
		Artefact: s.Artefact, SHA256: s.SHA256.String(), Architecture: s.Architecture,
		Files: s.Built.Files, Code: s.Built.Code, Records: s.Built.Records, Kinds: map[string]int{}, Decision: s.Decision,
	}
	if s.Kernel != nil {
		r.KernelSignatures = map[gate.KernelSignature]int{}
		for _, f := range s.forms { // also what nothing fitted
			r.KernelSignatures[f] = s.Kernel.Count[f]
		}
	}
	for _, k := range integrity.Kinds() {
		if n := s.Built.Kinds[k]; n > 0 {
			r.Kinds[k.String()] = n
		}
	}
	return r
}

// KernelArchive is the archive of kernel signatures; empty: there is none.
func (s *Signed) KernelArchive() []byte {
	if s.Kernel == nil {
		return nil
	}
	return s.Kernel.Archive
}

// problem is an error on the wire.
type problem struct {
	Error    string         `json:"error"`
	Kind     string         `json:"kind"`
	Decision *gate.Decision `json:"decision,omitempty"`
	Product  string         `json:"product,omitempty"`
	Artefact string         `json:"artefact,omitempty"`
}

// kindsOnWire maps kinds of failure to statuses, and back.
func kindsOnWire() []struct {
	kind   string
	err    error
	status int
} {
	return []struct {
		kind   string
		err    error
		status int
	}{
		{"denied", errs.Denied, http.StatusForbidden},
		{"untrusted", errs.Untrusted, http.StatusUnprocessableEntity},
		{"conflict", errs.Conflict, http.StatusConflict},
		{"unsupported", errs.Unsupported, http.StatusUnsupportedMediaType},
		{"invalid", errs.Invalid, http.StatusBadRequest},
		{"not-found", errs.NotFound, http.StatusNotFound},
	}
}

// sendProblem answers with an error. What is no kind of ours may speak of this
// machine's insides, so it is not sent.
func sendProblem(w http.ResponseWriter, err error, id string) {
	p, status := problem{Error: "internal error, see the signer's audit for request " + id, Kind: "internal"}, http.StatusInternalServerError
	for _, k := range kindsOnWire() {
		if errors.Is(err, k.err) {
			p.Error, p.Kind, status = err.Error(), k.kind, k.status
			break
		}
	}
	if refused, ok := errors.AsType[*Refused](err); ok {
		p.Decision, p.Product, p.Artefact = refused.Decision, refused.Product, refused.Artefact.String()
	}
	w.Header().Set("Content-Type", typeJSON)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(p)
}

// asError is what sendProblem sent.
func (p *problem) asError() error {
	if p.Decision != nil {
		r := &Refused{Product: p.Product, Decision: p.Decision}
		if d, err := integrity.ParseDigest(p.Artefact); err == nil {
			r.Artefact = d
		}
		return r
	}
	for _, k := range kindsOnWire() {
		if p.Kind == k.kind {
			return fmt.Errorf("signer: %s: %w", p.Error, k.err)
		}
	}
	return fmt.Errorf("signer: %s", p.Error)
}

// sendSigned answers with a release.
func sendSigned(w http.ResponseWriter, s *Signed) error {
	m := multipart.NewWriter(w)
	w.Header().Set("Content-Type", mime.FormatMediaType("multipart/mixed", map[string]string{"boundary": m.Boundary()}))
	w.Header().Set("Cache-Control", "no-store")
	result, err := json.Marshal(s.Describe())
	if err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{partResult, result}, {partCatalogue, s.Built.Catalogue}, {partNames, s.Built.Names}, {partKernel, s.KernelArchive()}, {partRelease, s.Bundle},
	} {
		if err := addPart(m, f.name, "", f.data); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
	return m.Close()
}

func addPart(m *multipart.Writer, name, file string, data []byte) error {
	w, err := newPart(m, name, file)
	if err != nil {
		return err
	}
	_, err = w.Write(data)
	return err
}

func newPart(m *multipart.Writer, name, file string) (io.Writer, error) {
	p := map[string]string{"name": name}
	if file != "" {
		p["filename"] = file
	}
	return m.CreatePart(textproto.MIMEHeader{
		"Content-Disposition": {mime.FormatMediaType("form-data", p)}, "Content-Type": {typeBytes},
	})
}

// readPart reads a part that must have a name, and is small.
func readPart(p *multipart.Part, name string, limit int64) ([]byte, error) {
	if p.FormName() != name {
		return nil, fmt.Errorf("part %.40q (want %s): %w", p.FormName(), name, errs.Invalid)
	}
	b, err := io.ReadAll(io.LimitReader(p, limit+1))
	if err != nil {
		return nil, fmt.Errorf("part %s: %w: %w", name, err, errs.Invalid)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("part %s has more than %d bytes: %w", name, limit, errs.Invalid)
	}
	return b, nil
}
