package hypervisor

// Args is the emulator's command line.
func (m *Machine) Args(kvm bool) []string { return m.args(kvm) }

// ModuleNeeds reads what a module depends on.
func ModuleNeeds(b []byte) ([]string, error) { return moduleNeeds(b) }

// ParseModinfo reads the same of a .modinfo section.
func ParseModinfo(b []byte) []string { return parseModinfo(b) }
