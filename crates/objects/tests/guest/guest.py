# Makes the system calls that the test writes to its standard input, one a line, and answers each
# with the result or the negative errno. Words: numbers; "path:..." for a string; "event:E:D" for a
# struct epoll_event; "timer:V:I" for a struct itimerspec in nanoseconds; "pair" for two ints;
# "bytes:N" for a buffer of N bytes. "fork IN OUT" makes a child that reads from IN and answers to
# OUT, and answers with its pid.
import ctypes
import os
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def argument(word, keep):
    name, _, rest = word.partition(":")
    if name == "path":
        value = ctypes.create_string_buffer(rest.encode())
    elif name == "event":
        events, data = rest.split(":")
        value = ctypes.create_string_buffer(struct.pack("=IQ", int(events), int(data)))
    elif name == "timer":
        first, interval = (divmod(int(part), 10**9) for part in rest.split(":"))
        value = ctypes.create_string_buffer(struct.pack("=qqqq", *interval, *first))
    elif name == "pair":
        value = ctypes.create_string_buffer(8)
    elif name == "bytes":
        value = ctypes.create_string_buffer(int(rest))
    else:
        return ctypes.c_long(int(word))
    keep.append(value)
    return value


def read_line(fd):
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            os._exit(0)
        line += byte
    return line.decode().split()


# What the shell of whoever runs the test left open is no part of it.
os.closerange(3, 1024)
source, sink = 0, 1
while True:
    words = read_line(source)
    if words[0] == "fork":
        # The test opens its ends first, so that neither open waits for long.
        child = os.fork()
        if child == 0:
            source = os.open(words[1], os.O_RDONLY)
            sink = os.open(words[2], os.O_WRONLY)
            continue
        os.write(sink, b"%d\n" % child)
        continue
    keep = []
    result = libc.syscall(*[argument(word, keep) for word in words])
    if result == -1:
        result = -ctypes.get_errno()
    os.write(sink, b"%d\n" % result)
