package guest

import (
	"errors"

	"ringwall/internal/errs"
)

func switchRoot(Config) error { return errors.Join(errs.Unsupported) }
