// Package enforce knows another adapter and the command.
package enforce

import (
	_ "ringwall/cmd/ringwall"
	_ "ringwall/internal/host"
)

func init() {}
