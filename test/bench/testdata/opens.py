# Opens, reads and closes a file that is not code, as often as it is told, and
# prints the nanoseconds that took.
import os
import sys
import time

name, n = sys.argv[1], int(sys.argv[2])
start = 0
for i in range(-5, n):
    if i == 0:
        start = time.monotonic_ns()
    fd = os.open(name, os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)
print(time.monotonic_ns() - start)
