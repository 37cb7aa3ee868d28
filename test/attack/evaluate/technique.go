package main

// who a technique is tried as.
type who int

const (
	asRoot who = 1 << iota
	asUser
	asBoth = asRoot | asUser
)

func (w who) includes(other who) bool { return w&other != 0 }

func (w who) String() string {
	switch w {
	case asRoot:
		return "root"
	case asUser:
		return "user"
	}
	return "root,user"
}

// technique is one way to run code that nobody authorised.
type technique struct {
	ID    string // stable: results of different runs are joined by it
	Group int    // number of the family, see README.md
	Title string
	As    who
	Stop  string // what is expected to stop it
	Run   func(*attempt) error

	Ran    string  // what counts as ran; empty: the payload left its token in the marker
	Mounts bool    // mounts something: the user tries it in a user namespace
	Userns bool    // tried in a user namespace by root, too
	Host   bool    // needs the host's own mount namespace
	Agent  bool    // an attack on Ringwall itself: means nothing on a host without it
	Limit  seconds // time that it may take; 0: the run's limit
}

type seconds int

// What stops techniques; the words of the summary.
const (
	byExec        = "program check at execve"
	byMap         = "library check at mmap"
	byMemory      = "no memory both written and executed"
	byPersonality = "no READ_IMPLIES_EXEC"
	byDebug       = "no writing into processes"
	byWrite       = "no writing to code that is mapped"
	byVersion     = "content looked at again after a change"
	byStable      = "no trust in file systems that can change their answer"
	byScript      = "script check at execve"
	byRead        = "interpreters read authorised code only"
	byArgument    = "no code in an interpreter's arguments"
	byStdin       = "no code on an interpreter's standard input"
	byModule      = "module check"
	byKexec       = "kexec check"
	byBPF         = "BPF programs from the agent only"
	byBlock       = "no writing to mounted disks and physical memory"
	byGuard       = "Ringwall guards itself"
	byDecision    = "the decision needs no process and no allocation"
)

// catalogue lists every technique, the harmless first and the attacks on
// Ringwall itself last: if one of those works, what follows means nothing.
func catalogue() []technique {
	var all []technique
	for _, part := range [][]technique{
		programs(), mounts(), changes(), scripts(), libraries(), loaders(), memory(), debugging(), writers(), interpreters(),
		environments(), shells(), inline(), evasions(), spawners(), kernelCode(), services(), buildTools(), agentAttacks(),
	} {
		all = append(all, part...)
	}
	return all
}
