"""What a running lab shares with the other terminals of its checkout: the environment that leads to its servers."""

import contextlib
import json
import os

from llmstream_nb.setup.environment import STATE, say, try_lock

FILE = STATE / "shared.json"  # for its user's eyes alone: an address may hold a password
LOCK = STATE / "shared.lock"  # held by the lab whose settings these are


def share(stack: contextlib.ExitStack, settings: dict[str, str | None]) -> None:
    """Share these variables until `stack` closes or this process ends; of two labs in one checkout the first does."""
    try:
        STATE.mkdir(exist_ok=True)
        if (lock := try_lock(LOCK)) is None:
            return
        stack.callback(os.close, lock)
        stack.callback(FILE.unlink, missing_ok=True)
        with open(os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump({name: value for name, value in settings.items() if value}, file)
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
