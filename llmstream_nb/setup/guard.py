"""Run a command that ends when the process that wanted it ends, however that ends.

The parent holds the guard's standard input, a pipe. When the parent closes it, exits or is killed, the pipe
breaks; the guard sees that and ends the command. This needs no signal handler in the parent, and works alike
on Linux, macOS and Windows.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
GRACE = 8.0  # seconds a command has to end by itself before it is killed


def guarded(command: Sequence[str], *, hold: int | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """Start `command` under a guard, away from the terminal's Ctrl-C.

    Args:
        command: the program and its arguments.
        hold: descriptor of a lock that the guard keeps until the command is gone, even after this process is.
        options: those of `Popen`.
    """
    if sys.platform == "win32":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        options["start_new_session"] = True
        options["pass_fds"] = () if hold is None else (hold,)
    # As an isolated script the guard starts fast and needs no package: it also guards the set-up itself.
    return subprocess.Popen([sys.executable, "-I", __file__, *command], stdin=subprocess.PIPE, **options)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a guarded command and wait until it is gone."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(2 * GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input does; return its exit code."""
    group = None  # on Windows taskkill finds the children
    if sys.platform != "win32":
        group = 0
        # Under nohup the command would be born deaf to it, and what runs in JupyterLab's terminals outlive them.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=group)
    except OSError as error:
        print(f"{command[0]} does not start: {error.strerror}", file=sys.stderr)
        return 127

    def watch() -> None:
        while os.read(0, 64):  # sys.stdin would hold a lock that the interpreter's exit needs
            pass
        _signal(child, signal.SIGTERM)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal(child, KILL)

    signal.signal(signal.SIGTERM, lambda *_: _signal(child, signal.SIGTERM))
    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """Signal a command and the children it has in its process group; Windows knows only a hard end."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True, check=False)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
