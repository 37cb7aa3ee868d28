package gate

import (
	"bytes"
	_ "embed" // the schema
)

//go:embed release.schema.json
var releaseSchema []byte

// Schema returns the JSON Schema (2020-12) of release policies, for editors.
// The parser is stricter: it also looks at what the parts have to do with each
// other.
func Schema() []byte { return bytes.Clone(releaseSchema) }
