"""Commands that are killed just before one of their writes or removals, or are refused some: the kernel hands over each such
system call before it is made (seccomp's user notification), so that no delay has to be guessed.

    done = positions.run(["qmpin", "attach", "100", "--once"], name_of)        # unharmed; done.made has the calls
    done = positions.run(["qmpin", "attach", "100", "--once"], name_of, at=3)  # killed instead of the third
    done.returncode, done.killed_at                                            # -9, "fdatasync 100.journal"

    done = positions.run(["qmpin", "detach", "100"], name_of, refuse=errno.EBUSY)  # and done.refused has what was refused
"""

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

# How long a command may go without any such call.
LIMIT_S = 120

# arch/x86/entry/syscalls/syscall_64.tbl: the calls, by what tells their file.
WRITE = 1
BY_FD = {WRITE: "write", 74: "fsync", 75: "fdatasync", 77: "ftruncate"}
BY_PATH = {82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink"}
# The same below a folder that is open: the descriptor first, then the path.
UNLINKAT = 263
BELOW = {258: "mkdir", UNLINKAT: "unlink", 264: "rename", 316: "rename"}
AT_FDCWD, AT_REMOVEDIR = -100, 0x200
SECCOMP = 317
PATH_BYTES_MAX = 4096

# include/uapi/linux: audit.h, seccomp.h
AUDIT_ARCH_X86_64 = 0xC000003E
SET_MODE_FILTER = 1
# With the second, a signal that does not kill leaves a call that was handed over in peace: none is counted twice.
NEW_LISTENER, WAIT_KILLABLE_RECV = 1 << 3, 1 << 5
RET_ALLOW, RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101
NOTIF = struct.Struct("=QII iIQ6Q")  # id, thread, flags; call, arch, instruction, arguments
RESPONSE = struct.Struct("=QqiI")  # id, value, error, flags
CONTINUE = 1
# bpf_common.h, filter.h, and where seccomp_data has what.
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
CALL_OFFSET, ARCH_OFFSET = 0, 4

Name = Callable[[str, str], str | None]  # (call, path) -> name


@dataclass
class Done:
    """How it ended, as subprocess.CompletedProcess has it, with all that was said in one."""

    returncode: int = 0
    stdout: str = ""
    stderr: str = ""
    made: list[str] = field(default_factory=list)  # the positions it came through, in order
    killed_at: str | None = None
    refused: list[str] = field(default_factory=list)


def run(
    command: list[str],
    name_of: Name,
    at: int | None = None,
    since: str | None = None,
    passed: Callable[[int, str], None] | None = None,
    refuse: int = 0,
) -> Done:
    """Runs a command and kills it just before its AT-th position. They are counted from 1, the first that is SINCE being 1
    where that is given.

    NAME_OF returns the name for the file of a call, or None: it is no position. PASSED is called for each position that was
    let through, with the command's pid. With an errno to REFUSE with, none is.
    """
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as said, ours:
        pid = os.fork()
        if pid == 0:
            _become(command, theirs, said.fileno())
        theirs.close()
        done = Done()
        try:
            _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
            assert listeners, "there is no filter"
            with os.fdopen(listeners[0]) as listener:
                _follow(pid, listener.fileno(), done, name_of, at, since, passed, refuse)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            done.returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        done.stdout = said.read().decode(errors="replace")
    return done


def _become(command: list[str], theirs: socket.socket, said: int) -> None:
    """In the child: becomes the command, with a filter of which the parent has the other end."""
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        socket.send_fds(theirs, [b"."], [_install()])
        os.execvp(command[0], command)
    finally:
        os._exit(127)


def _install() -> int:
    """Has the calls of this process, and of what it becomes, handed over: a descriptor to take them from."""
    calls = [*BY_FD, *BY_PATH, *BELOW]
    # Jumps say how many instructions to skip.
    program = [(LOAD_WORD, 0, 0, ARCH_OFFSET), (JUMP_EQUAL, 0, len(calls) + 1, AUDIT_ARCH_X86_64)]
    program += [(LOAD_WORD, 0, 0, CALL_OFFSET)]
    program += [(JUMP_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    program += [(RETURN, 0, 0, RET_ALLOW), (RETURN, 0, 0, RET_USER_NOTIF)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    listener = libc.syscall(SECCOMP, SET_MODE_FILTER, NEW_LISTENER | WAIT_KILLABLE_RECV, fprog)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _follow(pid, listener, done, name_of, at, since, passed, refuse) -> None:
    """Answers each call until the command has ended, or kills it."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    counts = since is None
    while True:
        events = poll.poll(LIMIT_S * 1000)
        assert events, f"no call in {LIMIT_S} s after {done.made[-1:]}"
        if not events[0][1] & select.POLLIN:
            return
        buffer = bytearray(NOTIF.size)
        try:
            fcntl.ioctl(listener, NOTIF_RECV, buffer)
        except FileNotFoundError:
            continue  # Its thread has died meanwhile.
        notified, tid, _, call, _, _, *arguments = NOTIF.unpack(buffer)
        position = _position(tid, call, arguments, name_of)
        counts = counts or position == since
        if counts and position is not None and len(done.made) + 1 == at:
            done.killed_at = position
            os.kill(pid, signal.SIGKILL)
            return
        if refuse and position is not None:
            fcntl.ioctl(listener, NOTIF_SEND, bytearray(RESPONSE.pack(notified, 0, -refuse, 0)))
            done.refused.append(position)
            continue
        fcntl.ioctl(listener, NOTIF_SEND, bytearray(RESPONSE.pack(notified, 0, 0, CONTINUE)))
        if position is None:
            continue
        if counts:
            done.made.append(position)
        if passed is not None:
            passed(pid, position)


def _position(tid: int, call: int, arguments: list[int], name_of: Name) -> str | None:
    """`write 100.journal intent`; None where it is none."""
    if call in BY_PATH:
        path = _memory(tid, arguments[0], PATH_BYTES_MAX).split(b"\0", 1)[0].decode()
        name = name_of(BY_PATH[call], path)
        return name and f"{BY_PATH[call]} {name}"
    if call in BELOW:
        kind = "rmdir" if call == UNLINKAT and arguments[2] & AT_REMOVEDIR else BELOW[call]
        path = os.path.join(_folder(tid, arguments[0]), _memory(tid, arguments[1], PATH_BYTES_MAX).split(b"\0", 1)[0].decode())
        name = name_of(kind, path)
        return name and f"{kind} {name}"
    try:
        path = os.readlink(f"/proc/{tid}/fd/{arguments[0]}")
    except FileNotFoundError:
        return None
    name = name_of(BY_FD[call], path)
    if name and call == WRITE:
        name += _record(_memory(tid, arguments[1], arguments[2]))
    return name and f"{BY_FD[call]} {name}"


def _folder(tid: int, fd: int) -> str:
    """The folder that a descriptor of a thread's stands for; its working directory for none."""
    # The kernel hands over 64 bits of an int.
    fd = ctypes.c_int(fd & 0xFFFFFFFF).value
    try:
        return os.readlink(f"/proc/{tid}/cwd" if fd == AT_FDCWD else f"/proc/{tid}/fd/{fd}")
    except FileNotFoundError:
        return ""


def _memory(tid: int, address: int, length: int) -> bytes:
    """What a thread has there; less where its memory ends before."""
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(length) or b""


def _record(data: bytes) -> str:
    """What the first of the lines of JSON is about."""
    try:
        return f" {next(iter(json.loads(data.splitlines()[0])))}"
    except (ValueError, TypeError, IndexError, StopIteration):
        return ""
