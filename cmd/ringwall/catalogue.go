package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
)

func newCatalogueCommand(e *env) *cobra.Command {
	return newGroup("catalogue", groupSign, "Look into the catalogue of a release", "",
		newCatalogueShowCommand(e))
}

// catalogueEntry is one content of a catalogue.
type catalogueEntry struct {
	SHA256 string   `json:"sha256"`
	Verity string   `json:"verity,omitempty"` // fs-verity digest
	Kinds  []string `json:"kinds"`
	Flags  []string `json:"flags"`
	Names  []string `json:"names"`
}

func newCatalogueShowCommand(e *env) *cobra.Command {
	var names string
	c := &cobra.Command{
		Use:   "show FILE.cat",
		Short: "List what a catalogue authorises",
		Long: `Lists each content with its kinds, flags and the names that it was found under.
It does not ask who signed the catalogue; ringwall verify does.

Flags: data (no code by itself), inner (what is inside a compressed module),
setid, install (a package's maintainer script).

JSON: {"file", "sha256", "classifier", "contents": [{"sha256", "verity",
"kinds", "flags", "names"}]}`,
		Example: "  ringwall catalogue show edged_4.7.0.cat",
		Args:    exactly("FILE.cat"),
		RunE: func(_ *cobra.Command, args []string) error {
			blob, err := readBounded(args[0], maxCatalogueFile)
			if err != nil {
				return err
			}
			c, err := codesign.ParseCatalogue(blob)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			t, err := findNames(args[0], names, c)
			if err != nil {
				return err
			}
			out := struct {
				File       string           `json:"file"`
				SHA256     string           `json:"sha256"`
				Classifier int              `json:"classifier"`
				Contents   []catalogueEntry `json:"contents"`
			}{File: args[0], SHA256: c.Digest().String(), Classifier: c.Classifier(), Contents: []catalogueEntry{}}
			for i, r := range c.All() {
				entry := catalogueEntry{SHA256: r.Digest.String(), Kinds: splitWords(r.Kinds.String()), Flags: splitWords(flagNames(r.Flags)), Names: []string{}}
				if !r.Verity.IsZero() {
					entry.Verity = r.Verity.String()
				}
				if t != nil {
					for _, n := range t.Names[i] {
						entry.Names = append(entry.Names, n.Path)
					}
				}
				out.Contents = append(out.Contents, entry)
			}
			return e.emit(out, func(w io.Writer) {
				for _, c := range out.Contents {
					fmt.Fprintf(w, "%s  %s", c.SHA256, strings.Join(append(c.Kinds, c.Flags...), ","))
					for _, n := range c.Names {
						fmt.Fprintf(w, "  %s", shown(n))
					}
					fmt.Fprintln(w)
				}
			})
		},
	}
	c.Flags().StringVar(&names, "names", "", "the name table `FILE` (default: the .names file beside it, if there is one)")
	return c
}

// findNames reads the name table that was asked for, or the one beside the
// catalogue; nil when there is none.
func findNames(catalogue, names string, c *codesign.Catalogue) (*codesign.NameTable, error) {
	asked := names != ""
	if !asked {
		names = strings.TrimSuffix(catalogue, extCatalogue) + extNames
	}
	blob, err := readBounded(names, maxCatalogueFile)
	if !asked && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	t, err := codesign.ParseNames(blob, c)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", names, err)
	}
	return t, nil
}

func flagNames(f codesign.Flags) string {
	var out []string
	for _, x := range []struct {
		flag codesign.Flags
		name string
	}{
		{codesign.FlagData, "data"}, {codesign.FlagInner, "inner"}, {codesign.FlagSetID, "setid"}, {codesign.FlagInstall, "install"},
	} {
		if f&x.flag != 0 {
			out = append(out, x.name)
		}
	}
	return strings.Join(out, ", ")
}

func splitWords(s string) []string {
	if s == "" {
		return []string{}
	}
	return strings.Split(s, ", ")
}
