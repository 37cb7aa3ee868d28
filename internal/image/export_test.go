package image

// For fuzzing.
var (
	Describe   = describe
	AppendTree = appendTree
)
