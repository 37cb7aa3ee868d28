package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ringwall/internal/host"
)

func newManCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "man DIR",
		Short:   "Write the manual pages into a directory",
		Long:    "Writes one manual page per command, in section 8, made from the same text as --help.",
		Example: "  ringwall man /usr/local/share/man/man8",
		Args:    exactly("DIR"),
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil { //nolint:gosec // pages for everyone
				return err
			}
			n := 0
			var walk func(*cobra.Command) error
			walk = func(c *cobra.Command) error {
				if c.Hidden {
					return nil
				}
				var page strings.Builder
				writeManual(&page, c)
				n++
				if err := host.WriteFile(filepath.Join(args[0], manualName(c)+".8"), []byte(page.String()), 0o644); err != nil {
					return err
				}
				for _, sub := range c.Commands() {
					if err := walk(sub); err != nil {
						return err
					}
				}
				return nil
			}
			if err := walk(c.Root()); err != nil {
				return err
			}
			e.notef("%d manual pages in %s", n, args[0])
			return nil
		},
	}
}

func manualName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// writeManual writes one page in roff's man macros.
func writeManual(w io.Writer, c *cobra.Command) {
	fmt.Fprintf(w, ".TH %s 8 \"\" ringwall \"Ringwall manual\"\n", roffWord(strings.ToUpper(manualName(c))))
	fmt.Fprintf(w, ".SH NAME\n%s \\- %s\n", roff(manualName(c)), roff(c.Short))
	if c.Runnable() {
		fmt.Fprintf(w, ".SH SYNOPSIS\n.B %s\n", roff(c.UseLine()))
	}
	text := c.Long
	if text == "" {
		text = c.Short
	}
	fmt.Fprint(w, ".SH DESCRIPTION\n")
	roffText(w, text)
	flags := func(title string, set *pflag.FlagSet) {
		if !set.HasAvailableFlags() {
			return
		}
		fmt.Fprintf(w, ".SH %s\n", title)
		set.VisitAll(func(f *pflag.Flag) {
			if f.Hidden {
				return
			}
			name := "--" + f.Name
			if f.Shorthand != "" {
				name = "-" + f.Shorthand + ", " + name
			}
			kind, text := pflag.UnquoteUsage(f)
			fmt.Fprintf(w, ".TP\n.B %s\n%s\n", roff(strings.TrimSpace(name+" "+kind)), roff(text))
		})
	}
	flags("OPTIONS", c.NonInheritedFlags())
	flags("OPTIONS OF EVERY COMMAND", c.InheritedFlags())
	if c.Example != "" {
		fmt.Fprintf(w, ".SH EXAMPLES\n.nf\n%s\n.fi\n", roff(c.Example))
	}
	var also []string
	if c.HasParent() {
		also = append(also, manualName(c.Parent()))
	}
	for _, sub := range c.Commands() {
		if !sub.Hidden {
			also = append(also, manualName(sub))
		}
	}
	for i, name := range also {
		if i == 0 {
			fmt.Fprint(w, ".SH SEE ALSO\n")
		}
		fmt.Fprintf(w, ".BR %s (8)\n", roff(name))
	}
}

// roffText writes paragraphs; indented lines keep their shape.
func roffText(w io.Writer, s string) {
	for i, paragraph := range strings.Split(strings.TrimSpace(s), "\n\n") {
		if i > 0 {
			fmt.Fprint(w, ".PP\n")
		}
		if strings.Contains("\n"+paragraph, "\n  ") {
			fmt.Fprintf(w, ".nf\n%s\n.fi\n", roff(paragraph))
			continue
		}
		fmt.Fprintf(w, "%s\n", roff(paragraph))
	}
}

// roff escapes text: backslashes, hyphens, and what would be a request at the
// start of a line.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}

func roffWord(s string) string { return `"` + roff(s) + `"` }
