// Package rbac decides what a principal may do to a resource, by Azure's rules
// and Azure's documents: role definitions with actions, notActions, dataActions
// and notDataActions, assignments of them at a scope, and deny assignments.
//
// The order of evaluation is Azure's ("How Azure RBAC determines if a user has
// access to a resource"): what applies at the scope and above is collected, a
// deny assignment blocks, and then one role that grants the action is enough.
// Whatever is missing, malformed or not understood grants nothing: this fails
// closed.
package rbac
