"""Refuse every attempt to reach another machine, and write it down; for the kernels and the tests of the book.

Python imports a module of this name when it starts, so every process below one whose PYTHONPATH begins with this folder
is watched.  Libraries swallow exceptions, hence the file that KDLIB_ASKED names: one line for each attempt, the address
and, in a notebook, the line of the cell that led there.  What a library does without Python's sockets is not seen.
"""

import linecache
import os
import sys

ADDRESS_AT = {
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
    "socket.getnameinfo": 0,
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
}
"""Where among an event's arguments the address stands."""
HERE = ("", "localhost", "::1", "::", "0.0.0.0", "None")


def other_machine(event: str, arguments: tuple) -> str | None:
    """The address of another machine that an event asks for, as `host` or `host:port`; None for all other events."""
    if event not in ADDRESS_AT:
        return None
    address = arguments[ADDRESS_AT[event]]
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getnameinfo"):
        if not isinstance(address, tuple) or not isinstance(address[0], str | bytes):
            return None  # a path of this machine, or the kernel's own interfaces
        host, port = address[:2]
    else:
        host, port = address, arguments[1] if event == "socket.getaddrinfo" else None
    host = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    if host in HERE or host.removeprefix("::ffff:").startswith("127."):
        return None
    return host if port is None else f"{host}:{port}"


def cell_line() -> str:
    """The line of a notebook's cell that is being executed, if there is one."""
    frame = sys._getframe()
    while frame is not None:
        if "ipykernel_" in frame.f_code.co_filename:
            return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        frame = frame.f_back
    return ""


def refuse(event: str, arguments: tuple) -> None:
    """The audit hook: writes the attempt down, then raises RuntimeError."""
    address = other_machine(event, arguments)
    if address is None:
        return
    line = cell_line()
    if record := os.environ.get("KDLIB_ASKED"):
        with open(record, "a") as file:
            file.write(f"{address} in the line {line!r}\n" if line else f"{address}\n")
    raise RuntimeError(f"no network while the book is made or tested, but {address} was asked for")


sys.addaudithook(refuse)
