#include "textflag.h"

// FIPS 180-4 by the processor's SHA extensions (Intel 64 and IA-32 manual,
// volume 2, SHA256RNDS2). Two hashes take in the same data: the schedule of the
// message is made once, and while one hash waits for the result of its rounds
// the other has its turn.
//
// X0 message and constants of four rounds, X1 X2 the first hash (ABEF, CDGH),
// X3 X4 the second, X5 to X8 the schedule, X9 scratch, X10 the byte order,
// X11 to X14 both hashes as they were before the block.

DATA order<>+0(SB)/8, $0x0405060700010203
DATA order<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL order<>(SB), RODATA|NOPTR, $16

DATA rounds<>+0(SB)/8, $0x71374491428a2f98
DATA rounds<>+8(SB)/8, $0xe9b5dba5b5c0fbcf
DATA rounds<>+16(SB)/8, $0x59f111f13956c25b
DATA rounds<>+24(SB)/8, $0xab1c5ed5923f82a4
DATA rounds<>+32(SB)/8, $0x12835b01d807aa98
DATA rounds<>+40(SB)/8, $0x550c7dc3243185be
DATA rounds<>+48(SB)/8, $0x80deb1fe72be5d74
DATA rounds<>+56(SB)/8, $0xc19bf1749bdc06a7
DATA rounds<>+64(SB)/8, $0xefbe4786e49b69c1
DATA rounds<>+72(SB)/8, $0x240ca1cc0fc19dc6
DATA rounds<>+80(SB)/8, $0x4a7484aa2de92c6f
DATA rounds<>+88(SB)/8, $0x76f988da5cb0a9dc
DATA rounds<>+96(SB)/8, $0xa831c66d983e5152
DATA rounds<>+104(SB)/8, $0xbf597fc7b00327c8
DATA rounds<>+112(SB)/8, $0xd5a79147c6e00bf3
DATA rounds<>+120(SB)/8, $0x1429296706ca6351
DATA rounds<>+128(SB)/8, $0x2e1b213827b70a85
DATA rounds<>+136(SB)/8, $0x53380d134d2c6dfc
DATA rounds<>+144(SB)/8, $0x766a0abb650a7354
DATA rounds<>+152(SB)/8, $0x92722c8581c2c92e
DATA rounds<>+160(SB)/8, $0xa81a664ba2bfe8a1
DATA rounds<>+168(SB)/8, $0xc76c51a3c24b8b70
DATA rounds<>+176(SB)/8, $0xd6990624d192e819
DATA rounds<>+184(SB)/8, $0x106aa070f40e3585
DATA rounds<>+192(SB)/8, $0x1e376c0819a4c116
DATA rounds<>+200(SB)/8, $0x34b0bcb52748774c
DATA rounds<>+208(SB)/8, $0x4ed8aa4a391c0cb3
DATA rounds<>+216(SB)/8, $0x682e6ff35b9cca4f
DATA rounds<>+224(SB)/8, $0x78a5636f748f82ee
DATA rounds<>+232(SB)/8, $0x8cc7020884c87814
DATA rounds<>+240(SB)/8, $0xa4506ceb90befffa
DATA rounds<>+248(SB)/8, $0xc67178f2bef9a3f7
GLOBL rounds<>(SB), RODATA|NOPTR, $256

// FOUR does four rounds of both hashes with the schedule in m.
#define FOUR(m, at) \
	MOVOA m, X0            \
	PADDD at(AX), X0       \
	SHA256RNDS2 X0, X1, X2 \
	SHA256RNDS2 X0, X3, X4 \
	PSHUFD $0x0e, X0, X0   \
	SHA256RNDS2 X0, X2, X1 \
	SHA256RNDS2 X0, X4, X3

// NEXT makes the schedule's next four words in m0, of m0 to m3.
#define NEXT(m0, m1, m2, m3) \
	SHA256MSG1 m1, m0  \
	MOVOA m3, X9       \
	PALIGNR $4, m2, X9 \
	PADDD X9, m0       \
	SHA256MSG2 m3, m0

// LOAD brings a hash's eight words into the order that the rounds want.
#define LOAD(from, abef, cdgh) \
	MOVOU (from), X9          \
	MOVOU 16(from), cdgh      \
	PSHUFD $0xb1, X9, X9      \
	PSHUFD $0x1b, cdgh, cdgh  \
	MOVOA X9, abef            \
	PALIGNR $8, cdgh, abef    \
	PBLENDW $0xf0, X9, cdgh

// STORE is the way back.
#define STORE(to, abef, cdgh) \
	PSHUFD $0x1b, abef, X9    \
	PSHUFD $0xb1, cdgh, cdgh  \
	MOVOA X9, abef            \
	PBLENDW $0xf0, cdgh, abef \
	PALIGNR $8, X9, cdgh      \
	MOVOU abef, (to)          \
	MOVOU cdgh, 16(to)

// func absorb(a, b *[8]uint32, p []byte)
TEXT ·absorb(SB), NOSPLIT, $0-40
	MOVQ a+0(FP), DI
	MOVQ b+8(FP), SI
	MOVQ p_base+16(FP), DX
	MOVQ p_len+24(FP), CX
	SHRQ $6, CX
	JZ   done
	MOVOU order<>(SB), X10
	LEAQ rounds<>(SB), AX
	LOAD(DI, X1, X2)
	LOAD(SI, X3, X4)

block:
	MOVOA X1, X11
	MOVOA X2, X12
	MOVOA X3, X13
	MOVOA X4, X14
	MOVOU (DX), X5
	PSHUFB X10, X5
	MOVOU 16(DX), X6
	PSHUFB X10, X6
	MOVOU 32(DX), X7
	PSHUFB X10, X7
	MOVOU 48(DX), X8
	PSHUFB X10, X8
	FOUR(X5, 0)
	FOUR(X6, 16)
	FOUR(X7, 32)
	FOUR(X8, 48)
	NEXT(X5, X6, X7, X8)
	FOUR(X5, 64)
	NEXT(X6, X7, X8, X5)
	FOUR(X6, 80)
	NEXT(X7, X8, X5, X6)
	FOUR(X7, 96)
	NEXT(X8, X5, X6, X7)
	FOUR(X8, 112)
	NEXT(X5, X6, X7, X8)
	FOUR(X5, 128)
	NEXT(X6, X7, X8, X5)
	FOUR(X6, 144)
	NEXT(X7, X8, X5, X6)
	FOUR(X7, 160)
	NEXT(X8, X5, X6, X7)
	FOUR(X8, 176)
	NEXT(X5, X6, X7, X8)
	FOUR(X5, 192)
	NEXT(X6, X7, X8, X5)
	FOUR(X6, 208)
	NEXT(X7, X8, X5, X6)
	FOUR(X7, 224)
	NEXT(X8, X5, X6, X7)
	FOUR(X8, 240)
	PADDD X11, X1
	PADDD X12, X2
	PADDD X13, X3
	PADDD X14, X4
	ADDQ $64, DX
	DECQ CX
	JNZ block
	STORE(DI, X1, X2)
	STORE(SI, X3, X4)

done:
	RET

// func hasExtensions() bool
TEXT ·hasExtensions(SB), NOSPLIT, $0-1
	MOVB $0, ret+0(FP)
	MOVL $0, AX
	CPUID
	CMPL AX, $7
	JLT  no
	MOVL $1, AX
	MOVL $0, CX
	CPUID
	ANDL $0x00080200, CX // SSE4.1 and SSSE3
	CMPL CX, $0x00080200
	JNE  no
	MOVL $7, AX
	MOVL $0, CX
	CPUID
	BTL  $29, BX // SHA
	JCC  no
	MOVB $1, ret+0(FP)

no:
	RET
