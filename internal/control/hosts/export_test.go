package hosts

// Inner doors for tests.
var (
	ReadEnrolment = readEnrolment
	ReadState     = readState
)
