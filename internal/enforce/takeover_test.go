package enforce

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// agentRole is a second agent: it takes over the pins and proves itself. With
// "stay" it then waits to be killed.
func agentRole() int {
	e, err := Open(Options{PinDir: testPins, ScopeCgroup: "/sys/fs/cgroup/rw-lab"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 20
	}
	if !e.TookOver || len(e.links) < 30 {
		return 21
	}
	if err := e.Protect(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 22
	}
	t := strictTable()
	t.Epoch = 70
	if err := e.Apply(&t); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 23
	}
	if os.Args[len(os.Args)-1] == "stay" {
		fmt.Print("x")
		time.Sleep(time.Hour)
	}
	return 0
}

// The agent dies and another takes over; half of the pins are lost; two agents
// start at once; everything is removed. This test ends the shared engine, so it
// has to be the last one.
func TestTakeover(t *testing.T) {
	l, _ := guarded(t)
	evil := l.file("evil", append(tinyELF(), "unlisted"...))
	mustRefuse := func(when string) {
		t.Helper()
		if err := l.run(evil); err == nil {
			t.Errorf("%s: an unlisted program ran", when)
		}
	}
	if err := l.e.Close(); err != nil {
		t.Fatal(err)
	}
	mustRefuse("without an agent")

	agent := exec.Command("/proc/self/exe", "agent", "stay")
	agent.Env = append(os.Environ(), "ENFORCE_TEST_ROLE=agent")
	agent.Stderr = os.Stderr
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the second agent: %v: %v", err, agent.Wait())
	}
	if s, err := Inspect(testPins); err != nil || s.Epoch != 70 || !s.Protected {
		t.Errorf("after the second agent: %+v %v", s, err)
	}
	mustRefuse("with the second agent")
	if err := agent.Process.Kill(); err != nil { // this process has the role itself
		t.Fatal(err)
	}
	_ = agent.Wait()
	mustRefuse("after the second agent was killed")

	// an agent that died while it attached: a pin is missing, another half-made
	if err := os.Remove(testPins + "/link_rw_exec"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(testPins+"/link_rw_mmap", testPins+"/link_rw_mmap_new"); err != nil {
		t.Fatal(err)
	}
	opts := Options{PinDir: testPins, ScopeCgroup: l.cgroup}
	e, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	if !e.TookOver {
		t.Error("the maps were made anew")
	}
	mustRefuse("after half of the pins was lost")
	second, err := Open(opts)
	if err != nil {
		t.Fatalf("a second engine: %v", err)
	}
	if err := e.Apply(&l.table); err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	mustRefuse("with two engines")
	if err := e.Canary(t.Context()); err != nil {
		t.Error(err)
	}
	if err := e.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(testPins); err == nil {
		t.Error("pins are left")
	}
	for range 200 { // the kernel detaches in its own time
		if l.run(evil) == nil {
			if err := unix.Kill(os.Getpid(), 0); err != nil {
				t.Error(err)
			}
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error("still enforcing after removal")
}

func TestRole_names(t *testing.T) {
	// the numbers of bpf/ringwall.h
	if integrity.RoleAgent != 1 || integrity.RoleModules != 1<<7 || Userfault != 21 {
		t.Error("numbers shared with the kernel programs have changed")
	}
}
