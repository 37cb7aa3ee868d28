# Compiles Python sources for the Ringwall agent, which sends their text and
# files what comes back. It reads no file and writes none. Each source gets a
# process of its own, so that what comes back depends on that source alone.
#
# In:  name and text of a source, each after its length in four bytes.
# Out: a status (0: compiled) and the code, or why not, after its length. The
#      first answer is the magic number of the code, and the tag of its files.
import marshal
import posix
import sys

from _frozen_importlib_external import MAGIC_NUMBER


def take():
    left = int.from_bytes(read(4), "big")
    return read(left)


def read(n):
    data = bytearray()
    while len(data) < n:
        part = posix.read(0, n - len(data))
        if not part:
            posix._exit(0)
        data += part
    return bytes(data)


def answer(status, payload):
    data = memoryview(bytes([status]) + len(payload).to_bytes(4, "big") + payload)
    while data:
        data = data[posix.write(1, data) :]


def compiled(name, text):
    try:
        return 0, marshal.dumps(compile(text, name, "exec", dont_inherit=True))
    except (SyntaxError, ValueError, RecursionError, MemoryError, LookupError) as e:
        return 1, type(e).__name__.encode()


answer(0, MAGIC_NUMBER + sys.implementation.cache_tag.encode())
while True:
    name, text = take().decode(), take()
    pid = posix.fork()
    if pid == 0:
        answer(*compiled(name, text))
        posix._exit(0)
    if posix.waitpid(pid, 0)[1] != 0:
        answer(1, b"the compiler crashed")
