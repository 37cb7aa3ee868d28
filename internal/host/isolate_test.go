package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// inNetwork runs fn in a network of its own, linked to another one in which
// listen says what answers. Their threads are thrown away.
func inNetwork(t *testing.T, listen []string, fn func(t *testing.T)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root makes networks")
	}
	setUp := func(commands ...[]string) string {
		for _, args := range commands {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				return "ip: " + string(out)
			}
		}
		return ""
	}
	network := func(fn func() string) <-chan string {
		done := make(chan string, 1)
		go func() {
			runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				done <- "no network of its own: " + err.Error()
				return
			}
			done <- fn()
		}()
		return done
	}
	peer, up, over := make(chan int, 1), make(chan string, 1), make(chan struct{})
	linked := make(chan struct{})
	other := network(func() string {
		peer <- unix.Gettid()
		<-linked
		why := setUp([]string{"link", "set", "lo", "up"},
			[]string{"addr", "add", "10.9.0.5/24", "dev", "d1"}, []string{"addr", "add", "10.9.0.6/24", "dev", "d1"},
			[]string{"addr", "add", "fd09::5/64", "dev", "d1", "nodad"}, []string{"addr", "add", "fd09::6/64", "dev", "d1", "nodad"}, []string{"link", "set", "d1", "up"})
		for _, addr := range listen {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				why += err.Error()
				continue
			}
			defer l.Close()
		}
		up <- why
		<-over
		return ""
	})
	mine := network(func() string {
		why := setUp([]string{"link", "set", "lo", "up"}, []string{"link", "add", "d0", "type", "veth", "peer", "name", "d1", "netns", strconv.Itoa(<-peer)},
			[]string{"addr", "add", "10.9.0.1/24", "dev", "d0"}, []string{"addr", "add", "fd09::1/64", "dev", "d0", "nodad"}, []string{"link", "set", "d0", "up"})
		close(linked)
		if why += <-up; why == "" {
			fn(t)
		}
		return why
	})
	why := <-mine
	close(over)
	<-other
	if why != "" {
		t.Skip(why)
	}
}

// sends says whether the kernel lets a packet to an address out.
func sends(t *testing.T, addr string) bool {
	t.Helper()
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Error(err) // in another goroutine than the test's
		return false
	}
	defer c.Close()
	_, err = c.Write([]byte("x"))
	return !errors.Is(err, unix.EPERM)
}

func connects(addr string) bool {
	c, err := net.DialTimeout("tcp", addr, 500*time.Millisecond)
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}

func TestIsolate(t *testing.T) {
	inNetwork(t, []string{"10.9.0.5:7443", "10.9.0.5:22", "10.9.0.6:7443", "[fd09::5]:7443", "[fd09::6]:7443"}, func(t *testing.T) {
		reach := func() string {
			return fmt.Sprint(connects("10.9.0.5:7443"), connects("[fd09::5]:7443"), connects("10.9.0.5:22"), connects("10.9.0.6:7443"), connects("[fd09::6]:7443"),
				sends(t, "10.9.0.6:53"), sends(t, "10.9.0.5:7443"), sends(t, "10.9.0.6:67"), sends(t, "127.0.0.1:9"))
		}
		const everyone, server = "true true true true true true true true true", "true true false false false false false false true"
		for end := time.Now().Add(5 * time.Second); !connects("[fd09::5]:7443") && time.Now().Before(end); { // the link comes up
		}
		if got := reach(); got != everyone {
			t.Errorf("before: %s", got)
			return
		}
		to := []netip.AddrPort{netip.MustParseAddrPort("10.9.0.5:7443"), netip.MustParseAddrPort("[fd09::5]:7443")}
		err := Isolate(t.Context(), to)
		if errors.Is(err, errs.Unsupported) {
			t.Log("skipped: ", err)
			return
		}
		for range 2 { // again, as the agent does
			if err != nil {
				t.Error(err)
				return
			}
			if got := reach(); got != server {
				t.Errorf("isolated: %s\nwant      %s", got, server)
			}
			err = Isolate(t.Context(), to)
		}
		for range 2 { // also what is not isolated
			if err := Isolate(t.Context(), nil); err != nil {
				t.Error(err)
			}
		}
		if got := reach(); got != everyone {
			t.Errorf("released: %s", got)
		}
	})
}
