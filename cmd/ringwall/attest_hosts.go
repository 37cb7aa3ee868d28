package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control/attestation"
	"ringwall/internal/host"
)

func newAttestHostsCommand(e *env) *cobra.Command {
	var standing string
	c := &cobra.Command{
		Use:   "hosts",
		Short: "Show what the fleet's hosts proved of themselves",
		Long: `Lists the hosts that have shown their TPM to the server, as far as you may read
them. STATE is trusted, stale (silent for two intervals), quarantined (refused, until
ringwall attest readmit), or pending (a person must approve its TPM: ringwall attest
approve).

JSON: {"hosts": [{"host", "tpm", "state", "why", "basis", "last_good", "last_seen",
"passed", "announced"}]}`,
		Example: `  ringwall attest hosts
  ringwall attest hosts --standing quarantined --output json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			out := attestationList{Hosts: []attestation.Status{}}
			q := url.Values{"standing": {standing}}
			for {
				var page attestationList
				if err := ask(c.Context(), client, api.Request{Method: http.MethodGet, Path: attestationPath + "?" + q.Encode()}, &page); err != nil {
					return err
				}
				out.Hosts = append(out.Hosts, page.Hosts...)
				if page.Next == "" {
					break
				}
				q.Set("after", page.Next)
			}
			return e.emit(out, func(w io.Writer) {
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "HOST\tSTATE\tTPM\tBASIS\tLAST GOOD\tWHY")
				for _, h := range out.Hosts {
					good := "never"
					if !h.LastGood.IsZero() {
						good = h.LastGood.UTC().Format(time.RFC3339)
					}
					fmt.Fprintf(t, "%s\t%s\t%.16s\t%s\t%s\t%s\n", shown(h.Host), h.State, h.TPM, h.Basis, good, printable(h.Why))
				}
				_ = t.Flush()
			})
		},
	}
	c.Flags().StringVar(&standing, "standing", "", "only these: pending, trusted or quarantined")
	complete(c, "standing", "pending", "trusted", "quarantined")
	return c
}

func newAttestArchiveCommand(e *env) *cobra.Command {
	var to, until string
	c := &cobra.Command{
		Use:   "archive HOST -o FILE",
		Short: "Fetch a host's evidence with its signed result",
		Long: `Fetches what the server kept of a host's last round that it kept, or of the last one
before a time. Kept are refusals (for good) and, for 90 days, the first round of each
boot and one a day. Verify it with ringwall attest verify-archive, anywhere.

JSON: {"file", "bytes"}`,
		Example: `  ringwall attest archive web-1 -o web-1.json.gz
  ringwall attest archive web-1 --until 2031-05-01T03:00:00Z -o incident.json.gz`,
		Args: exactly("HOST"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			h, err := oneHost(c.Context(), client, args[0])
			if err != nil {
				return err
			}
			q := url.Values{"host": {h.ID}}
			if until != "" {
				q.Set("until", until)
			}
			b, _, err := client.Do(c.Context(), api.Request{Method: http.MethodGet, Path: attestationPath + "/archive?" + q.Encode()})
			if err != nil {
				return err
			}
			if err := host.WriteFile(to, b, 0o600); err != nil {
				return err
			}
			out := struct {
				File  string `json:"file"`
				Bytes int    `json:"bytes"`
			}{to, len(b)}
			return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "%s: %d bytes\n", shown(out.File), out.Bytes) })
		},
	}
	c.Flags().StringVarP(&to, "out", "o", "", "write to this `FILE`")
	c.Flags().StringVar(&until, "until", "", "the newest that is not later than this `TIME` (RFC 3339)")
	require(c, "out")
	return c
}

// newAttestOrderCommand makes a command that gives an order about a host.
func newAttestOrderCommand(e *env, use, order, short, long string) *cobra.Command {
	var body attestation.OrderBody
	c := &cobra.Command{
		Use:   use + " HOST --reason TEXT",
		Short: short,
		Long: long + `

HOST is as in ringwall fleet hosts. It takes the permission
Ringwall.Fleet/hosts/` + order + `/action; the reason stands in the audit log.

JSON: the host as in attest hosts`,
		Example: `  ringwall attest ` + use + ` web-1 --reason "ticket 4711: new kernel was not in the catalogue"`,
		Args:    exactly("HOST"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			st, err := giveOrder(c.Context(), client, args[0], order, &body)
			if err != nil {
				return err
			}
			return e.emit(st, func(w io.Writer) { fmt.Fprintf(w, "%s is %s\n", shown(args[0]), st.State) })
		},
	}
	c.Flags().StringVar(&body.Reason, "reason", "", "why, for the audit log")
	require(c, "reason")
	if order == attestation.OrderApprove {
		c.Flags().StringVar((*string)(&body.TPM), "tpm", "", "`ID` of the TPM that you looked at, as in attest hosts --output json")
		require(c, "tpm")
	}
	return c
}

func giveOrder(ctx context.Context, client *api.Client, name, order string, body *attestation.OrderBody) (*attestation.Status, error) {
	h, err := oneHost(ctx, client, name)
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	var st attestation.Status
	if err := ask(ctx, client, api.Request{Method: http.MethodPost, Path: (&url.URL{Path: h.Resource.String() + "/" + order}).EscapedPath(), Body: raw}, &st); err != nil {
		return nil, err
	}
	return &st, nil
}

func attestOrderCommands(e *env) []*cobra.Command {
	return []*cobra.Command{
		newAttestOrderCommand(e, "readmit", attestation.OrderReadmit, "End the quarantine of a host",
			`Lets a quarantined host in again, once you know why it was refused and have put it
right. It is trusted with its next round, which has to explain everything from the
start of the boot; TPM resets up to its last round are taken as explained.`),
		newAttestOrderCommand(e, "quarantine", attestation.OrderQuarantine, "Refuse a host until you readmit it",
			`The host gets no certificate, no key and no work, whatever it proves.`),
		newAttestOrderCommand(e, "approve", attestation.OrderApprove, "Let a TPM enrol that nobody else vouches for",
			`Compare the TPM's id with what the host itself says (ringwall attest evidence prints
it), over a way that you trust.`),
		newAttestOrderCommand(e, "replace", attestation.OrderReplace, "Let a host enrol with another TPM",
			`After a repair. The TPM that it had is forgotten; the enrolment policy judges the new
one like that of a new host.`),
		newAttestOrderCommand(e, "announce", attestation.OrderAnnounce, "Say that a host is about to reboot",
			`One TPM reset since the last round is then expected, and no more than one. A reboot
that was not announced is refused: somebody may have booted something else.`),
	}
}
