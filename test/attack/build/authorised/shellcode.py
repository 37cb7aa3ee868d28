# Machine code that returns the token's first half; the marker is written only if it did.
import ctypes, mmap, struct, sys
token, marker = sys.argv[1], sys.argv[2]
want = int(token[:8], 16)
m = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
m.write(b"\xb8" + struct.pack("<I", want) + b"\xc3")
f = ctypes.CFUNCTYPE(ctypes.c_uint32)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
if f() == want:
    open(marker, "w").write(token)
