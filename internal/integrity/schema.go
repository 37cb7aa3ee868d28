package integrity

import (
	"bytes"
	_ "embed" // the schema
)

//go:embed policy.schema.json
var policySchema []byte

// Schema returns the JSON Schema (2020-12) of the policy format, for editors.
// The parser is stricter: it also looks at what the parts have to do with each
// other.
func Schema() []byte { return bytes.Clone(policySchema) }
