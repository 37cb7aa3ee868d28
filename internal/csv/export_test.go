package csv

// ELF is what parsing a file that comes in pieces gives: what it needs, whether
// it is something that is started or loaded, and what is wrong with it.
func ELF(b []byte, piece int) (needed []string, is bool, err error) {
	f, err := scan(b, piece)
	if err != nil || f == nil {
		return nil, false, err
	}
	return f.needed, true, nil
}

// Len is the number of different uses.
func (u *Uses) Len() int { return len(u.order) }
