package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	builds "ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

func newCatalogueCommand(e *env) *cobra.Command {
	return newGroup("catalogue", groupSign, "List what a build or a release can run", "",
		newCatalogueMakeCommand(e), newCatalogueShowCommand(e))
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
setid, caps (file capabilities), install (a package's maintainer script), nested
(only found in an archive within the build: ARCHIVE!/PATH).

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
			}{File: args[0], SHA256: c.Digest().String(), Classifier: c.Classifier(), Contents: entriesOf(c, t)}
			return e.emit(out, func(w io.Writer) { writeEntries(w, out.Contents) })
		},
	}
	c.Flags().StringVar(&names, "names", "", "the name table `FILE` (default: the .names file beside it, if there is one)")
	return c
}

// entriesOf lists a catalogue; t may be nil.
func entriesOf(c *codesign.Catalogue, t *codesign.NameTable) []catalogueEntry {
	out := make([]catalogueEntry, 0, c.Len())
	for i, r := range c.All() {
		entry := catalogueEntry{SHA256: r.Digest.String(), Kinds: splitWords(r.Kinds.String()), Flags: splitWords(flagNames(r.Flags)), Names: []string{}}
		if !r.Verity.IsZero() {
			entry.Verity = r.Verity.String()
		}
		if t != nil {
			for _, n := range t.Names[i] {
				entry.Names = append(entry.Names, n.Location())
			}
		}
		out = append(out, entry)
	}
	return out
}

func writeEntries(w io.Writer, entries []catalogueEntry) {
	for _, c := range entries {
		fmt.Fprintf(w, "%s  %s", c.SHA256, strings.Join(append(c.Kinds, c.Flags...), ","))
		for _, n := range c.Names {
			fmt.Fprintf(w, "  %s", shown(n))
		}
		fmt.Fprintln(w)
	}
}

// madeCatalogue is what `ringwall catalogue make` found.
type madeCatalogue struct {
	Artefact   string           `json:"artefact"`
	Format     string           `json:"format"`
	SHA256     string           `json:"sha256,omitempty"` // of the file, or of an image's manifest
	Package    string           `json:"package,omitempty"`
	Version    string           `json:"version,omitempty"`
	Classifier int              `json:"classifier"`
	Catalogue  string           `json:"catalogue"` // its SHA-256
	Files      int              `json:"files"`
	Code       int              `json:"code"`
	Bytes      int64            `json:"bytes"`
	Kinds      map[string]int   `json:"kinds"`
	Unread     []unreadArchive  `json:"unread"`
	Saved      []string         `json:"saved,omitempty"`
	Contents   []catalogueEntry `json:"contents"`
}

type unreadArchive struct {
	Place  string `json:"place"`
	Reason string `json:"reason"`
}

func newCatalogueMakeCommand(e *env) *cobra.Command {
	var (
		o                  builds.Options
		all, keep, force   bool
		save               string
		summary, unpackOff bool
	)
	c := &cobra.Command{
		Use:   "make ARTEFACT",
		Short: "List what a build can run, without signing it",
		Long: `Reads a build to its end and lists each content that can run: programs, libraries,
scripts, kernel modules, firmware, kernels, and the scripts of its package. This
is the list that ringwall sign signs; nothing is signed here, and no key is needed.

ARTEFACT is told by its content, whatever it is called:
  a directory; a tar archive, also compressed; zip, jar, wheel
  a .deb or .rpm package, with its scripts (DEBIAN/postinst, RPM/post, …)
  an OCI image: a layout directory, a tar archive of one, docker save's file, or
  REGISTRY/NAME:TAG; as a container sees it, or with --layers each layer for itself
  a squashfs or erofs image, an initramfs, a unified kernel image; a single program

Archives within it are opened too, up to eight within each other (--no-archives:
none). What is found there is listed as ARCHIVE!/PATH. What cannot be read is an
error; --keep-going lists it instead and ends with exit code 1.

JSON: {"artefact", "format", "sha256", "package", "version", "classifier",
"catalogue", "files", "code", "bytes", "kinds": {KIND: COUNT}, "unread":
[{"place", "reason"}], "saved", "contents": [as catalogue show]}`,
		Example: `  ringwall catalogue make edged_4.7.0-1_amd64.deb
  ringwall catalogue make ./dist --summary
  ringwall catalogue make registry.example/team/edged:4.7.0 --platform linux/amd64
  ringwall catalogue make /boot/initrd.img-6.1.0-40-amd64 --output json
  ringwall catalogue make image.squashfs --save image.cat`,
		Args: exactly("ARTEFACT"),
		RunE: func(c *cobra.Command, args []string) error {
			m := &madeCatalogue{Artefact: args[0], Kinds: map[string]int{}, Unread: []unreadArchive{}}
			if keep {
				o.Unread = func(place string, err error) error {
					m.Unread = append(m.Unread, unreadArchive{place, err.Error()})
					return nil
				}
			}
			if unpackOff {
				o.Depth = -1
			}
			if err := m.make(c.Context(), e, o, codesign.Options{AllFiles: all}, save, force); err != nil {
				return err
			}
			if summary {
				m.Contents = []catalogueEntry{}
			}
			if err := e.emit(m, m.write); err != nil {
				return err
			}
			if n := len(m.Unread); n > 0 {
				return fmt.Errorf("%d archives within %s could not be read, the list is not complete: %w", n, args[0], errs.Denied)
			}
			return nil
		},
	}
	f := c.Flags()
	f.BoolVar(&all, "all-files", false, "list data files too")
	f.BoolVar(&unpackOff, "no-archives", false, "do not look into archives within the build")
	f.BoolVar(&keep, "keep-going", false, "go on past archives within the build that cannot be read")
	f.BoolVar(&o.Layers, "layers", false, "images: each layer for itself, also what upper layers hide")
	f.StringVar(&o.Platform, "platform", "", "images: only this `PLATFORM` (linux/amd64; default: all)")
	f.BoolVar(&summary, "summary", false, "print the counts only")
	f.StringVar(&save, "save", "", "write the catalogue to `FILE.cat` and its names beside it")
	f.BoolVar(&force, "force", false, "overwrite files that are there already")
	return c
}

func (m *madeCatalogue) make(ctx context.Context, e *env, o builds.Options, co codesign.Options, save string, force bool) error {
	a, err := openArtefactAs(ctx, e, m.Artefact, o)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := codesign.Build(a.Artefact, co)
	if err != nil {
		if _, within := errors.AsType[*builds.UnreadError](err); within {
			return hint(err, "--keep-going lists what can be read")
		}
		return err
	}
	c, err := codesign.ParseCatalogue(b.Catalogue)
	if err != nil {
		return err
	}
	t, err := codesign.ParseNames(b.Names, c)
	if err != nil {
		return err
	}
	m.Format, m.Classifier, m.Catalogue = string(a.Format), c.Classifier(), c.Digest().String()
	m.Files, m.Code, m.Bytes, m.Contents = b.Files, b.Code, b.Bytes, entriesOf(c, t)
	if !a.Digest.IsZero() {
		m.SHA256 = a.Digest.String()
	}
	if p, ok := a.pkg(); ok {
		m.Package, m.Version = p.Name, p.Version
	}
	for k, n := range b.Kinds {
		m.Kinds[k.String()] = n
	}
	if save == "" {
		return nil
	}
	m.Saved = []string{save, strings.TrimSuffix(save, extCatalogue) + extNames}
	for i, blob := range [][]byte{b.Catalogue, b.Names} {
		if !force && exists(m.Saved[i]) {
			return hint(fmt.Errorf("%s is there already: %w", m.Saved[i], errs.Conflict), "--force overwrites it")
		}
		if err := host.WriteFile(m.Saved[i], blob, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (m *madeCatalogue) write(w io.Writer) {
	writeEntries(w, m.Contents)
	fmt.Fprintf(w, "%s, %s", shown(m.Artefact), m.Format)
	if m.Package != "" {
		fmt.Fprintf(w, ", %s %s", shown(m.Package), shown(m.Version))
	}
	fmt.Fprintf(w, ": %d files, %d MiB, %d of them code", m.Files, m.Bytes>>20, m.Code)
	sep := ":"
	for _, k := range integrity.Kinds() {
		if n := m.Kinds[k.String()]; n > 0 {
			fmt.Fprintf(w, "%s %s %d", sep, k, n)
			sep = ","
		}
	}
	fmt.Fprintf(w, "\ncatalogue %s\n", m.Catalogue)
	for _, u := range m.Unread {
		fmt.Fprintf(w, "NOT READ %s: %s\n", shown(u.Place), u.Reason)
	}
	for _, s := range m.Saved {
		fmt.Fprintf(w, "saved %s\n", shown(s))
	}
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
		{codesign.FlagData, "data"},
		{codesign.FlagInner, "inner"},
		{codesign.FlagSetID, "setid"},
		{codesign.FlagInstall, "install"},
		{codesign.FlagCaps, "caps"},
		{codesign.FlagNested, "nested"},
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
