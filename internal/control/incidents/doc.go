// Package incidents keeps the fleet's incidents: it turns the blocks that hosts
// report into few documents that people work on, tells whoever is on call, and
// goes on telling until somebody answers.
//
// An incident is a document of the tree below the scope of its hosts, changed in
// one transaction with an audit record, like all others. Blocks are counted in
// the same transaction that stores the incident, before the host is told that
// its report is durable; what is to be told to people is stored with it and sent
// after: at least once, never nothing. Rules are package incident's.
package incidents
