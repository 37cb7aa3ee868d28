package hosts_test

import (
	"crypto/tls"
	"testing"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/control/hosts"
)

func testJoin(t *testing.T, url string) {
	t.Helper()
	l := newLab(t, url, newCA(t))
	token, key := l.token(hosts.TokenProperties{}), newKey(t)
	first, err := l.enrol(&agentpb.EnrolRequest{JoinToken: token, Name: "web-1", Csr: csr(t, key)})
	if err != nil {
		t.Fatal(err)
	}
	// The same key asks again, since the answer was lost.
	again, err := l.enrol(&agentpb.EnrolRequest{JoinToken: token, Name: "web-1", Csr: csr(t, key)})
	if err != nil || again.GetHostId() != first.GetHostId() || string(again.GetCertificates()[0]) != string(first.GetCertificates()[0]) {
		t.Errorf("the same key with the same token: %v, %v", again, err)
	}
	for name, tc := range map[string]struct {
		r    *agentpb.EnrolRequest
		want connect.Code
	}{
		"another key with a used token": {&agentpb.EnrolRequest{JoinToken: token, Name: "web-1", Csr: csr(t, newKey(t))}, connect.CodeUnauthenticated},
		"another name, used token":      {&agentpb.EnrolRequest{JoinToken: token, Name: "web-2", Csr: csr(t, key)}, connect.CodeUnauthenticated},
		"a name that is taken":          {&agentpb.EnrolRequest{JoinToken: l.token(hosts.TokenProperties{}), Name: "WEB-1", Csr: csr(t, newKey(t))}, connect.CodeAlreadyExists},
		"no token":                      {&agentpb.EnrolRequest{JoinToken: hosts.NewJoinToken(id(group)), Name: "web-3", Csr: csr(t, newKey(t))}, connect.CodeUnauthenticated},
		"no name":                       {&agentpb.EnrolRequest{JoinToken: l.token(hosts.TokenProperties{}), Name: "../x", Csr: csr(t, newKey(t))}, connect.CodeInvalidArgument},
		"no request":                    {&agentpb.EnrolRequest{JoinToken: l.token(hosts.TokenProperties{}), Name: "web-4", Csr: []byte("x")}, connect.CodeInvalidArgument},
		"a token for another name":      {&agentpb.EnrolRequest{JoinToken: l.token(hosts.TokenProperties{Name: "db-1"}), Name: "web-5", Csr: csr(t, newKey(t))}, connect.CodePermissionDenied},
	} {
		if _, err := l.enrol(tc.r); connect.CodeOf(err) != tc.want {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	a := agent{AgentClient: l.client(tls.Certificate{Certificate: first.GetCertificates(), PrivateKey: key})}
	got, err := a.wait(t.Context(), &agentpb.WaitRequest{State: &agentpb.State{AgentVersion: "1"}})
	if err != nil || got.GetDirectives().GetRevision() == 0 {
		t.Fatalf("%v, %v", got, err)
	}
	all, err := l.svc.Hosts(t.Context(), id(group))
	if err != nil || len(all) != 1 || all[0].ID != first.GetHostId() || !all[0].Online || all[0].Report.Agent != "1" {
		t.Errorf("%+v, %v", all, err)
	}
}
