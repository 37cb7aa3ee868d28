// Package rollout decides how a change reaches a fleet: which host belongs to
// which ring, when a ring has shown enough, when the change has done harm, and
// what to do next.
//
// All of it is pure: a reconciler hands in what is stored and what hosts
// report, and gets the next state and the actions that lead there. Every
// decision is made anew from that, so a process that was killed in the middle
// comes to the same one. No evidence is never success: without data a ring
// holds.
package rollout
