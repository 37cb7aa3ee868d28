// Package agentpb is the protocol between agents and the server, generated from
// agent.proto, which documents it.
package agentpb

//go:generate go build -modfile=../../tools/go.mod -o ../../.cache/bin/protoc/ google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
//go:generate protoc --plugin=../../.cache/bin/protoc/protoc-gen-go --plugin=../../.cache/bin/protoc/protoc-gen-connect-go --go_out=. --go_opt=paths=source_relative --connect-go_out=. --connect-go_opt=paths=source_relative,package_suffix agent.proto
