"""What a running lab shares with the other terminals of its checkout: the environment that leads to its servers."""

import contextlib
import json
import os
from pathlib import Path

from llmstream_nb.setup.environment import STATE, say, try_lock

FILE = STATE / "shared.json"  # for its user's eyes alone: an address may hold a password
LOCK = STATE / "shared.lock"  # held by the lab whose settings these are


def share(stack: contextlib.ExitStack, settings: dict[str, str | None]) -> None:
    """Share these variables until `stack` closes or this process ends; of two labs in one checkout the first does."""
    try:
        make_private(STATE)
        if (lock := try_lock(LOCK)) is None:
            return
        stack.callback(os.close, lock)
        stack.callback(FILE.unlink, missing_ok=True)
        write_private(FILE, json.dumps({name: value for name, value in settings.items() if value}))
    except OSError as error:
        say(f"Commands in other terminals can't join: {FILE} can't be written ({error.strerror}).")


def shared() -> dict[str, str]:
    """The variables that a running lab of this checkout shares; none where no lab runs."""
    with contextlib.suppress(OSError, ValueError):
        if FILE.exists():
            if (lock := try_lock(LOCK)) is None:
                return dict(json.loads(FILE.read_text("utf-8")))
            os.close(lock)
    return {}


def make_private(folder: Path) -> None:
    """Make the folder, and let nobody but this user in; on Windows that is left to the folder around it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def write_private(file: Path, text: str) -> None:
    """Write a file that only this user can read, from its first moment on. Raises OSError, also where that fails."""
    file.unlink(missing_ok=True)  # whoever has an older one open reads no more
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as opened:
        if os.name != "nt" and os.fstat(descriptor).st_mode & 0o077:
            raise PermissionError(1, "other users could read it", str(file))
        opened.write(text)
