package control

import (
	"context"
	"fmt"

	"ringwall/internal/audit"
	"ringwall/internal/resource"
)

// Act is a change that is no document of the tree, such as the release of a
// quarantined host: authorised as the action "KIND/VERB" on the target, made and
// recorded in one transaction like every other. fn may add to the record's
// detail; what else it needs of the store it finds by asserting an interface of
// its own on the transaction.
func (d *Door) Act(ctx context.Context, by Actor, kind, verb string, target resource.ID, fn func(Tx, *audit.Record) error) error {
	if err := d.change(ctx, by, &Kind{Type: kind}, verb, target, false, fn); err != nil {
		return fmt.Errorf("%s %s: %w", verb, target, err)
	}
	return nil
}
