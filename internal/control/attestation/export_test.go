package attestation

// Zip is for tests.
func Zip(b []byte) ([]byte, error) { return zip(b) }
