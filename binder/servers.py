"""Start the Redis and the local model's server that all notebooks and terminals of a Binder share.

It prints the shell commands that make both known, ended by a NUL, and runs until its standard input ends.
"""

from __future__ import annotations

import contextlib
import os
import shlex

from llmstream_nb.setup.environment import STATE, say
from llmstream_nb.setup.guard import end
from llmstream_nb.setup.lab import start_model
from llmstream_nb.setup.redis_server import StartError, start_redis


def main() -> None:
    """Start what can be started, say what can't, and end it all when the process that becomes Jupyter has ended."""
    settings: dict[str, str | None] = {}
    with contextlib.ExitStack() as stack:
        try:
            process, settings["REDIS_URL"] = start_redis(STATE / "redis")
            stack.callback(end, process)
        except StartError as reason:
            settings["LLMSTREAM_NOTICE"] = (
                f"This Binder has no Redis: {reason}. Each notebook has a fake one of its own instead, "
                "which terminals don't see. Launch the Binder again for the real one."
            )
            say(settings["LLMSTREAM_NOTICE"])
        settings |= start_model(stack)
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in settings.items() if value]
        print(*exports, "\0", sep="", end="", flush=True)
        while os.read(0, 64):
            pass


if __name__ == "__main__":
    main()
