package rbac

import "ringwall/internal/resource"

// Ids of Azure's own roles, which are the same everywhere.
const (
	Owner                   = "8e3af657-a8ff-443c-a75c-2fe8c4bcb635"
	Contributor             = "b24988ac-6180-42a0-ab88-20f7382dd24c"
	Reader                  = "acdd72a7-3385-48ef-bd42-f606fba81ae7"
	UserAccessAdministrator = "18d7d88d-d35e-4fb5-a5c3-7773c20a72d9"
)

// BuiltIn returns the roles that are there without anybody making them.
func BuiltIn() []*Role {
	role := func(id, name, what string, p Permission) *Role {
		return &Role{ID: id, Name: name, Description: what, Permissions: []Permission{p}, Assignable: []resource.ID{{}}}
	}
	return []*Role{
		role(Owner, "Owner", "Manages everything, and who may.", Permission{Actions: []string{"*"}}),
		role(Contributor, "Contributor", "Manages everything, but not who may.", Permission{
			Actions:    []string{"*"},
			NotActions: []string{"Microsoft.Authorization/*/Delete", "Microsoft.Authorization/*/Write", "Microsoft.Authorization/elevateAccess/Action"},
		}),
		role(Reader, "Reader", "Sees everything and changes nothing.", Permission{Actions: []string{"*/read"}}),
		role(UserAccessAdministrator, "User Access Administrator", "Manages who may, and sees everything.", Permission{
			Actions: []string{"*/read", "Microsoft.Authorization/*"},
		}),
	}
}
