package enforce

// The object is committed; `check` rebuilds it and compares. clang 14 and
// libbpf's headers are Debian 12's.
//go:generate go tool -modfile=../../tools/go.mod bpf2go -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 -go-package enforce -type event -type steering -type generation -type interpreter -type counts -type task -type adoption -type guarded -type key -type entry -type data_path -output-stem engine engine bpf/engine.bpf.c -- -O2 -g -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu
