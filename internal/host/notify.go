package host

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Notify tells the service manager a state in the format of sd_notify(3), as
// "READY=1". A process that no service manager waits for, which it knows by
// the environment variable NOTIFY_SOCKET, tells nobody: that is no error. It
// does not wait.
func Notify(state string) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	if err := sendUnix(name, []byte(state)); err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}

// sendUnix sends a datagram to a socket, an abstract one if it begins with @,
// without waiting: a reader that is behind is EAGAIN.
func sendUnix(name string, b []byte) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// x/sys turns a leading @ into the zero byte of an abstract address.
	return kindOf(unix.Sendto(fd, b, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, &unix.SockaddrUnix{Name: name}))
}
