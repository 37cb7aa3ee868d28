// Package resource is the tree that every managed thing is in: its ids, and the
// envelope that each document has, which are those of Azure Resource Manager,
// so that Azure's clients, roles and policies apply to it.
package resource
