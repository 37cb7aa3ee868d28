package codesign

// Unpair makes a Hasher do without the processor's instructions for two at once.
func Unpair(h *Hasher) { h.paired = false }

// Paired says whether a Hasher uses them.
func Paired(h *Hasher) bool { return h.paired }
