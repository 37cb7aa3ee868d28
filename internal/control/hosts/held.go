package hosts

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"google.golang.org/protobuf/proto"

	"ringwall/internal/agentpb"
	"ringwall/internal/errs"
)

const protoType = "application/proto"

// plainWait reports whether a request is a Wait in the form that agents send it:
// Connect's unary call with a body of protobuf that is not compressed. What is not
// goes to Connect's own handler.
func plainWait(r *http.Request) bool {
	h := r.Header
	return r.URL.Path == agentpb.AgentWaitProcedure && r.Method == http.MethodPost && h.Get("Content-Type") == protoType &&
		(h.Get("Content-Encoding") == "" || h.Get("Content-Encoding") == "identity")
}

// serveWait answers such a request as Connect's handler would, without its
// buffers and its frames on the stack: ten thousand of these calls are held at
// once, and that is what a host costs while nothing happens.
func (s *Service) serveWait(w http.ResponseWriter, r *http.Request, id *identity) error {
	q, err := readWait(r)
	if err != nil {
		return err
	}
	out, err := s.wait(r.Context(), id, q)
	if err != nil {
		return err
	}
	b, err := proto.Marshal(out)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", protoType)
	h.Set("Content-Length", strconv.Itoa(len(b)))
	_, _ = w.Write(b) //nolint:gosec // protobuf, to an agent; it may be gone
	return nil
}

func readWait(r *http.Request) (*agentpb.WaitRequest, error) {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxSmall+1))
	if err != nil {
		return nil, errors.Join(err, r.Context().Err())
	}
	if len(b) > maxSmall {
		return nil, errTooLarge{}
	}
	q := &agentpb.WaitRequest{}
	if err := proto.Unmarshal(b, q); err != nil {
		return nil, fmt.Errorf("the message is no protobuf: %w: %w", err, errs.Invalid)
	}
	return q, nil
}

// errTooLarge is a message over its bound.
type errTooLarge struct{}

func (errTooLarge) Error() string { return fmt.Sprintf("a message of more than %d bytes", maxSmall) }
