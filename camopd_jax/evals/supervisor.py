"""Runs the Python program on standard input, apart from the machine; exits with 0 if the program came to its end.

A script of the standard library alone, which `sandbox.passes` starts in an empty folder:

    python -I -S supervisor.py SECONDS MEMORY [user] [apart]

With `user`, which only root may ask for, the program runs as a user that owns nothing. With `apart` it gets namespaces
of its own, if the kernel lets the user: then it sees no network and no other process, all files but those of its folder
are read-only, and the kernel ends all its processes with the first. Without them this script finds and ends them.

The program and its tests share an interpreter, so nothing in its memory can prove that it came to its end. The proof is
a number that this script draws and tells when it is asked, which is what the interpreter does behind the program.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time

TASKS = 128  # processes and threads of a program
FILE = 2**20  # bytes of a file
FILES = b"size=64m,mode=700"  # of the folder's file system
INTERVAL = 0.01  # seconds between two looks at the processes, at least
USERS = range(61184, 65520)  # systemd's, for services that own no files

# linux/sched.h, sys/mount.h, linux/mount.h, linux/prctl.h
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
SET_DUMPABLE, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 4, 36, 38

PROGRAM = """
import os, sys
process = os.getpid()
exec(compile(sys.stdin.read(), "answer.py", "exec"), {"__name__": "__main__"})
if os.getpid() == process:  # and no child that it forked
    os.write(%(ask)d, b"?")
    os.write(%(ask)d, os.read(%(replies)d, 16))
os._exit(0)
"""


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    if "user" in sys.argv:
        become_another_user()
    tasks = TASKS + tasks_of(os.getuid())
    apart = "apart" in sys.argv and enter_namespaces()
    if apart:
        first = os.fork()  # the first process of the new process namespace: all others end with it
        if first:
            os._exit(int(os.waitpid(first, 0)[1] != 0))
        mount_read_only(os.getcwd())
    system("prctl", SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    system("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    system("prctl", SET_DUMPABLE, 0, 0, 0, 0)  # the program may neither read this process nor write to it
    ended = False
    try:
        ended = supervise(seconds, memory, tasks)
    finally:
        if not apart:
            end_descendants()
        os._exit(int(not ended))


def system(name: str, *arguments: object) -> bool:
    """Calls a function of the C library; False if there is none, or if it fails."""
    values = (ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)
    function = getattr(ctypes.CDLL(None), name, None)
    return function is not None and function(*values) == 0


def become_another_user() -> None:
    """Gives up root's rights for those of a user that owns nothing; the kernel limits only such a user's processes."""
    folder, user = os.getcwd(), USERS[int.from_bytes(os.urandom(4), "big") % len(USERS)]
    needed = [os.path.realpath(sys.base_prefix), os.path.dirname(os.path.realpath(sys.executable)), folder]
    os.chown(folder, user, user)
    if any(map(closed_ancestor, needed)):
        uncover(needed)
        os.chdir(folder)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    system("prctl", SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self stays root's


def closed_ancestor(path: str) -> str | None:
    """The first folder above a path that not everyone may enter."""
    parts = path.split(os.sep)
    above = (os.sep.join(parts[:n]) for n in range(2, len(parts)))
    return next((folder for folder in above if os.path.exists(folder) and not os.stat(folder).st_mode & 1), None)


def uncover(paths: list[str]) -> None:
    """Puts empty folders in place of those that not everyone may enter, with nothing but these paths below them."""
    if not (system("unshare", NEWNS) and system("mount", None, b"/", None, RECURSIVE | PRIVATE, None)):
        raise OSError("mounts")
    descriptors = {path: os.open(path, os.O_PATH) for path in sorted(paths, key=len)}
    for path, descriptor in descriptors.items():
        if closed := closed_ancestor(path):
            system("mount", b"tmpfs", closed.encode(), b"tmpfs", NOSUID | NODEV, b"mode=755")
        if not os.path.exists(path):
            os.makedirs(path)
            system("mount", f"/proc/self/fd/{descriptor}".encode(), path.encode(), None, BIND | RECURSIVE, None)


def tasks_of(user: int) -> int:
    """The number of processes and threads of a user, as far as they are in sight."""
    total = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                total += len(os.listdir(f"/proc/{name}/task"))
    return total


def enter_namespaces() -> bool:
    """Enters new namespaces of users, processes, mounts, IPC and network; False if not of processes."""
    user, group = os.getuid(), os.getgid()
    apart = system("unshare", NEWUSER | NEWPID | NEWNS | NEWIPC | NEWNET)
    if apart or system("unshare", NEWUSER | NEWNET):
        # Not as 0: the program must not have the capabilities that undo a mount.
        for file, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with contextlib.suppress(OSError), open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
    return apart


def mount_read_only(folder: str) -> None:
    """Makes all mounts read-only, with an empty file system at the folder and for shared memory."""
    system("mount", b"proc", b"/proc", b"proc", NOSUID | NODEV | NOEXEC, None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    system("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    for path in (folder, "/dev/shm"):
        system("mount", b"tmpfs", path.encode(), b"tmpfs", NOSUID | NODEV, FILES)
    os.chdir(folder)


def supervise(seconds: float, memory: int, tasks: int) -> bool:
    """Runs the program; whether it came to its end within the limits."""
    (requests, ask), (replies, reply) = os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        try:
            become_program(ask, replies, int(seconds) + 1, memory, tasks)
        finally:
            os._exit(1)
    os.close(ask)
    os.close(replies)
    deadline, proof = time.monotonic() + seconds, os.urandom(16)
    if receive(requests, program, deadline, memory) != b"?":
        return False
    os.write(reply, proof)
    return receive(requests, program, deadline, memory) == proof


def become_program(ask: int, replies: int, seconds: int, memory: int, tasks: int) -> None:
    """Replaces this process by an interpreter with limits, that runs the program and asks for the proof."""
    os.setsid()
    os.set_inheritable(ask, True)
    os.set_inheritable(replies, True)
    for name, limit in (("CPU", seconds), ("AS", memory), ("NPROC", tasks), ("FSIZE", FILE), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{name}")
        present = resource.getrlimit(number)[1]
        limit = limit if present == resource.RLIM_INFINITY else min(limit, present)
        resource.setrlimit(number, (limit, limit))
    interpreter = os.path.realpath(sys.executable)
    command = [interpreter, "-B", "-P", "-S", "-s", "-c", PROGRAM % {"ask": ask, "replies": replies}]
    os.execve(interpreter, command, {"PYTHONHASHSEED": "0", "TMPDIR": os.getcwd()})


def receive(requests: int, program: int, deadline: float, memory: int) -> bytes:
    """The program's next message; empty if it ended, took too long, or has too many processes or too much memory."""
    pause = INTERVAL
    while time.monotonic() < deadline:
        ended = reap(program)
        if select.select([requests], [], [], 0 if ended else pause)[0]:
            return os.read(requests, 64)
        started = time.monotonic()
        sizes = descendants().values()
        if ended or sum(tasks for tasks, _ in sizes) > TASKS or sum(resident for _, resident in sizes) > memory:
            break
        pause = max(INTERVAL, 4 * (time.monotonic() - started))
    return b""


def reap(program: int) -> bool:
    """Collects children that have ended; whether the program is among them, or none is left."""
    with contextlib.suppress(ChildProcessError):
        while child := os.waitpid(-1, os.WNOHANG)[0]:
            if child == program:
                return True
        return False
    return True


def descendants() -> dict[int, tuple[int, int]]:
    """The processes that came of this one, each with its number of threads and its bytes in memory."""
    children: dict[int, list[int]] = {}
    sizes = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:  # it may have ended meanwhile
                fields = file.read().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(name))
                sizes[int(name)] = int(fields[17]), int(fields[21]) * resource.getpagesize()
    below, parents = {}, [int(os.readlink("/proc/self"))]
    while parents:
        for child in children.get(parents.pop(), ()):
            below[child] = sizes[child]
            parents.append(child)
    return below


def end_descendants() -> None:
    """Ends all processes that came of this one: stops them until there is no new one, then kills them."""
    stopped: set[int] = set()
    while processes := set(descendants()):
        new = processes - stopped
        for process in new or processes:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGSTOP if new else signal.SIGKILL)
        stopped |= new
        reap(0)


if __name__ == "__main__":
    main()
