// Package vm runs programs, and whole Debian systems, in QEMU guests on
// Debian's own kernels.
//
// Run boots a kernel with an initramfs that holds one program, runs it as root
// and returns its exit code: what `go test -exec vmexec` does. RunDebian boots
// a disk image of a real Debian and runs a script in it.
//
// Everything that is fetched or built is kept in the directory that CacheDir
// names, under names that change with the content, and is put there by a
// rename under a lock: any number of processes may use it at once, and it may
// be deleted whenever no guest runs.
//
// What cannot be had here, such as a kernel that the package sources do not
// offer, is reported as errs.Unsupported, so that a test can skip loudly.
package vm
