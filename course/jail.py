"""Give a student's process a world of its own: what `make grade` starts through ``unshare``.

``python jail.py SPEC``, as the first process of fresh namespaces (mount, network, processes, IPC).  It builds
a root folder that holds, read-only, the system's programs, this Python, and what SPEC lists, and an empty
/tmp; goes there; starts the command without any privilege; and waits.  When it dies, the kernel ends all the
rest.  It never runs a line of a student's code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime")
SYSTEM += ("/sys/devices/system/cpu", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def show(root, path, read_only=True):
    """Make `path` visible below `root`, at the same place."""
    path = Path(path)
    there = root / path.relative_to("/")
    if path.is_symlink():  # /bin -> usr/bin
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(os.readlink(path))
        return
    if path.is_dir():
        there.mkdir(parents=True, exist_ok=True)
    else:
        there.parent.mkdir(parents=True, exist_ok=True)
        there.touch()
    mount("--bind", path, there)
    if read_only:
        mount("-o", "remount,bind,ro", there)


def furnish(spec):
    """Build the new root and go there."""
    root = Path(spec["root"])
    mount("-t", "tmpfs", "-o", "size=4m,mode=755", "tmpfs", root)
    for path, size in (("tmp", spec["scratch"]), ("dev/shm", 1)):
        (root / path).mkdir(parents=True)
        mount("-t", "tmpfs", "-o", f"size={size}m,mode=1777,nosuid,nodev", "tmpfs", root / path)
    for path in (*SYSTEM, *spec["show"]):  # after /tmp, below which the project may lie
        if os.path.lexists(path):
            show(root, path, read_only=not path.startswith("/dev/"))
    (root / "proc").mkdir()
    mount("-t", "proc", "proc", root / "proc")
    mount("-o", "remount,bind,ro", root)
    os.chroot(root)
    os.chdir("/tmp")


def main(spec):
    furnish(spec)
    command = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    if spec["user"] is not None:
        command += [f"--reuid={spec['user']}", f"--regid={spec['user']}", "--clear-groups"]
    first = subprocess.Popen([*command, *spec["command"]], pass_fds=[spec["fd"]], env=spec["env"])
    os.close(spec["fd"])
    while True:  # the first process of a namespace inherits orphans: reap them too
        pid, status = os.wait()
        if pid == first.pid:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])) != 0)
