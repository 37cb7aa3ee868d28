package main

import (
	"errors"
	"fmt"
	"io"

	"ringwall/internal/errs"
	"ringwall/internal/strictyaml"
)

// checkedDocument is the result of reading one document that people write.
type checkedDocument struct {
	File     string               `json:"file"`
	OK       bool                 `json:"ok"`
	Name     string               `json:"name,omitempty"`
	Epoch    uint64               `json:"epoch,omitempty"`   // of a policy
	Product  string               `json:"product,omitempty"` // of a release policy
	Problems []strictyaml.Problem `json:"problems"`
	Warnings []string             `json:"warnings"`

	about string // the document in a few words, once it is read
}

// checkDocuments reads documents and lists what is wrong with each. read fills
// in what a valid one says.
func checkDocuments(e *env, what string, files []string, read func(*checkedDocument) error) error {
	out := struct {
		Policies []checkedDocument `json:"policies"`
	}{}
	bad := 0
	for _, f := range files {
		d := checkedDocument{File: f, Problems: []strictyaml.Problem{}, Warnings: []string{}}
		err := read(&d)
		var problems *strictyaml.Error
		switch {
		case errors.As(err, &problems):
			bad++
			d.Problems = problems.Problems
		case err != nil:
			return err
		default:
			d.OK = true
		}
		out.Policies = append(out.Policies, d)
	}
	if err := e.emit(out, func(w io.Writer) {
		for i := range out.Policies {
			out.Policies[i].write(w)
		}
	}); err != nil {
		return err
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d %s are not valid: %w", bad, len(files), what, errs.Invalid)
	}
	return nil
}

func (d *checkedDocument) write(w io.Writer) {
	for _, p := range d.Problems {
		fmt.Fprint(w, d.File)
		if p.Line > 0 {
			fmt.Fprintf(w, ":%d:%d", p.Line, p.Column)
		}
		if p.Path != "" {
			fmt.Fprintf(w, ": %s", p.Path)
		}
		fmt.Fprintf(w, ": %s\n", p.Text)
		if p.Fix != "" {
			fmt.Fprintf(w, "  fix: %s\n", p.Fix)
		}
	}
	if d.OK {
		fmt.Fprintf(w, "%s: %s, is valid\n", d.File, d.about)
	}
	for _, x := range d.Warnings {
		fmt.Fprintf(w, "  warning: %s\n", x)
	}
}
