package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
)

// version is stamped by ./build; empty in any other build.
var version string

// buildVersion is what the go command stamped into the binary.
type buildVersion struct {
	Version    string `json:"version"`  // module version, or "devel"
	Revision   string `json:"revision"` // commit; "" when built outside a checkout
	Modified   bool   `json:"modified"` // the checkout had changes
	Go         string `json:"go"`
	Platform   string `json:"platform"`
	Classifier int    `json:"classifier"` // rules that catalogues are made by
}

func readBuildVersion() buildVersion {
	v := buildVersion{
		Version: "devel", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Classifier: codesign.ClassifierVersion,
	}
	b, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if b.Main.Version != "" && b.Main.Version != "(devel)" {
		v.Version = b.Main.Version
	}
	if version != "" {
		v.Version = version
	}
	for _, s := range b.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Revision = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

func newVersionCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this binary",
		Args:  exactly(),
		RunE: func(*cobra.Command, []string) error {
			v := readBuildVersion()
			return e.emit(v, func(w io.Writer) {
				fmt.Fprintf(w, "ringwall %s", v.Version)
				if v.Revision != "" {
					fmt.Fprintf(w, " (%.12s", v.Revision)
					if v.Modified {
						fmt.Fprint(w, ", modified")
					}
					fmt.Fprint(w, ")")
				}
				fmt.Fprintf(w, " %s %s\n", v.Go, v.Platform)
			})
		},
	}
}
