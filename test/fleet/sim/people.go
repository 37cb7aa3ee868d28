package sim

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/control/hosts"
	"ringwall/internal/rbac"
	"ringwall/internal/resource"
)

// life is how long what is made here lasts.
const life = time.Hour

func end() time.Time { return time.Now().Add(life).UTC().Truncate(time.Second) }

// Owner makes somebody beside the administrator who may do everything, and
// returns his token: who starts a rollout cannot approve it.
func (s *Server) Owner(ctx context.Context, name string) (token string, err error) {
	token = control.NewToken()
	return token, errors.Join(
		s.Put(ctx, control.TokenID(token).String(), control.Token{Principal: name, Name: name, Expires: end()}),
		s.Put(ctx, "/providers/"+control.TypeRoleAssignment+"/"+name, map[string]string{
			"roleDefinitionId": "/providers/" + control.TypeRoleDefinition + "/" + rbac.Owner, "principalId": name,
		}))
}

// JoinToken makes a token that lets one host in below a scope.
func (s *Server) JoinToken(ctx context.Context, scope resource.ID) (string, error) {
	token := hosts.NewJoinToken(scope)
	id, err := hosts.JoinTokenID(token)
	if err != nil {
		return "", err
	}
	return token, s.Put(ctx, id.String(), hosts.TokenProperties{Expires: end()})
}

// Listen is the webhook of whoever is on call: told gets what each event says,
// until ctx ends.
func Listen(ctx context.Context, told func(title, text string)) (url string, err error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var event struct {
			Data struct{ Title, Text string }
		}
		if json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&event) == nil {
			told(event.Data.Title, event.Data.Text)
		}
	})}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	go func() { _ = srv.Serve(l) }()
	return "http://" + l.Addr().String(), nil
}
