// Package agent reaches into the server.
package agent

import (
	_ "ringwall/internal/control"
	_ "ringwall/internal/enforce"
	_ "ringwall/internal/httpapi"
	_ "ringwall/internal/store"
)
