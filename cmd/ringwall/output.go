package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/strictyaml"
)

// The exit codes; newExitCodesTopic explains them to people.
const (
	exitOK          = 0
	exitDenied      = 1
	exitUsage       = 2
	exitInvalid     = 3
	exitNotFound    = 4
	exitUntrusted   = 5
	exitConflict    = 6
	exitUnsupported = 7
	exitOther       = 10
)

func newExitCodesTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What exit codes mean",
		Long: `Every command ends with one of these:

   0  done, or: yes
   1  refused, or: would be refused; what was compared differs
   2  the command was typed wrongly
   3  a file or value is malformed or out of bounds
   4  something named does not exist
   5  a signature, certificate, timestamp or digest does not verify
   6  it is there already, or has changed meanwhile
   7  this kernel, machine or build cannot do it
  10  anything else, such as a full disk

Commands of ringwall csv have codes of their own: see ringwall csv --help.

Errors are one line on standard error that begins with "ringwall:".`,
	}
}

// usageError is a command that was typed wrongly.
type usageError struct{ err error }

func (u usageError) Error() string { return u.err.Error() }
func (u usageError) Unwrap() error { return u.err }

func usage(err error) error { return usageError{err} }

// hintError is an error with what to do next.
type hintError struct {
	err  error
	hint string
}

func (h hintError) Error() string { return h.err.Error() + " (" + h.hint + ")" }
func (h hintError) Unwrap() error { return h.err }

// hint says what to do about an error; nil stays nil.
func hint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return hintError{err, fmt.Sprintf(format, args...)}
}

// exitCode is the one place where a kind of failure becomes a number. The
// order matters where an error has several kinds: what says most comes first.
func exitCode(err error) int {
	var u usageError
	var coded codedError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &u):
		return exitUsage
	case errors.Is(err, errs.Untrusted):
		return exitUntrusted
	case errors.Is(err, errs.Denied), errors.Is(err, fs.ErrPermission):
		return exitDenied
	case errors.Is(err, errs.Conflict), errors.Is(err, fs.ErrExist):
		return exitConflict
	case errors.Is(err, errs.Unsupported), errors.Is(err, errors.ErrUnsupported):
		return exitUnsupported
	case errors.Is(err, errs.Invalid):
		return exitInvalid
	case errors.Is(err, errs.NotFound), errors.Is(err, fs.ErrNotExist):
		return exitNotFound
	}
	return exitOther
}

// fail prints an error in one line and returns its exit code.
func (e *env) fail(err error) int {
	if err != nil {
		if problems, ok := errors.AsType[*strictyaml.Error](err); ok {
			first := *problems
			first.Problems, first.More = problems.Problems[:1], 0
			if n := len(problems.Problems) + problems.More - 1; n > 0 {
				err = hint(&first, "and %d more; ringwall policy check and gate policy check list all of them", n)
			}
		}
		msg := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
		fmt.Fprintf(e.stderr, "ringwall: %s\n", printable(msg))
	}
	return exitCode(err)
}

// notef tells a person about progress or a next step; not with --quiet.
func (e *env) notef(format string, args ...any) {
	if !e.quiet {
		fmt.Fprintf(e.stderr, "%s\n", printable(fmt.Sprintf(format, args...)))
	}
}

// emit prints a result: v as indented JSON with --output json, else what text writes.
func (e *env) emit(v any, text func(w io.Writer)) error {
	out := bufio.NewWriter(e.stdout)
	if e.json {
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		if err := enc.Encode(v); err != nil {
			return fmt.Errorf("write result: %w", err)
		}
	} else {
		text(printableWriter{out})
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	return nil
}

// printableWriter keeps what comes from files and archives from steering the terminal.
type printableWriter struct{ w io.Writer }

func (p printableWriter) Write(b []byte) (int, error) {
	if _, err := io.WriteString(p.w, printable(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}

// printable spells out control and formatting characters, except line ends and tabs.
func printable(s string) string {
	ok := func(r rune) bool { return r == '\n' || r == '\t' || unicode.IsPrint(r) }
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !ok(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], string(utf8.RuneError)):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case ok(r):
			b.WriteRune(r)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// shown is a name for a line of text: quoted when it holds anything that could
// pass for the end of a line or of the column.
func shown(s string) string {
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) || r == '"' || r == ' ' || r == utf8.RuneError }) < 0 {
		return s
	}
	return strconv.Quote(s)
}
