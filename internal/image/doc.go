// Package image makes and checks dm-verity images: a read-only file system
// (EROFS or squashfs) with the hash tree over it in the same file. Whoever
// knows the tree's root hash can have every block checked by the kernel when it
// is read, so one hash authorises all that is in the image.
//
// An image is the file system, padded to 4 KiB, then the superblock and tree
// that veritysetup would write with the same parameters. Nothing else is in it:
// signatures lie beside it.
package image
