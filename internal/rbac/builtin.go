package rbac

import "ringwall/internal/resource"

// Ids of Azure's own roles, which are the same everywhere.
const (
	Owner                   = "8e3af657-a8ff-443c-a75c-2fe8c4bcb635"
	Contributor             = "b24988ac-6180-42a0-ab88-20f7382dd24c"
	Reader                  = "acdd72a7-3385-48ef-bd42-f606fba81ae7"
	UserAccessAdministrator = "18d7d88d-d35e-4fb5-a5c3-7773c20a72d9"
)

// Ids of Ringwall's own roles.
const (
	SecurityAdministrator = "627d3de0-6c1c-4464-8c60-2b3183b8800b"
	ReleaseManager        = "c5555053-3c4a-4c34-9556-4916f6a852be"
	OnCallEngineer        = "10fe9f15-5534-4186-a6df-164252804f80"
	Auditor               = "3c2bd2b1-3998-4297-9306-978c1e57ea3b"
	Host                  = "819e69a4-65fa-4f44-b90a-99598ff24ca6"
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
		role(SecurityAdministrator, "Security Administrator", "Manages what may run, attestation, hosts, rollouts, incidents and quarantine, but not who may.", Permission{
			Actions: []string{
				"*/read", "Ringwall.Integrity/*", "Ringwall.Attestation/*", "Ringwall.Fleet/*", "Ringwall.Incidents/*",
				"Microsoft.Authorization/denyAssignments/*",
			},
		}),
		role(ReleaseManager, "Release Manager", "Brings releases and policies to hosts, and stops them.", Permission{
			Actions: []string{
				"Microsoft.Resources/*/read", "Ringwall.*/read", "Ringwall.Fleet/manifests/*", "Ringwall.Fleet/rollouts/*", "Ringwall.Fleet/halts/*",
			},
			NotActions: []string{"Ringwall.Audit/*", "Ringwall.Identity/*"},
		}),
		role(OnCallEngineer, "On-Call Engineer", "Handles incidents: sees everything, stops and undoes, isolates hosts.", Permission{
			Actions: []string{
				"*/read", "Ringwall.Incidents/*", "Ringwall.Fleet/halts/*",
				"Ringwall.Fleet/rollouts/pause/action", "Ringwall.Fleet/rollouts/rollback/action",
				"Ringwall.Fleet/hosts/isolate/action", "Ringwall.Fleet/hosts/release/action", "Ringwall.Fleet/hosts/quarantine/action",
			},
		}),
		role(Auditor, "Auditor", "Sees everything, the audit log too, and changes nothing.", Permission{
			Actions: []string{"*/read", "Ringwall.Audit/*/read"},
		}),
		role(Host, "Host", "What a host may see beside what it is given: itself and its manifests.", Permission{
			Actions: []string{"Ringwall.Fleet/hosts/read", "Ringwall.Fleet/manifests/read"},
		}),
	}
}
