// Package kernelsig makes and checks the signatures that kernels and firmware
// themselves look at: CMS as the Linux kernel takes it (fs-verity, dm-verity
// root hashes, IPE policies, modules), IMA's extended attribute, and the
// Authenticode signatures of EFI images.
//
// Everything here works on bytes that the caller has read; nothing opens a file
// or runs a program. All of it may be hostile: every parser is bounded and has
// a fuzz target. Whatever cannot be parsed or is not understood is refused
// (fails closed): errs.Invalid for malformed bytes, errs.Untrusted for a
// signature that does not hold, errs.Unsupported for a form that is not read.
package kernelsig
