"""Log lines: the standard library's, made harmless for a terminal."""

import logging
from typing import Any

from llmstream_nb.protocol.wire import printable


class Log(logging.LoggerAdapter[logging.Logger]):
    """A module's logger; what fills in its messages may come from anybody who can write into Redis, or send a request.

    Neither secrets nor a model's words belong into a message. What a view, a return value or an exception tells is
    logged as INFO at most, so that notebooks stay quiet where nobody has set logging up.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name))

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        """As the standard library's, without control characters in what `args` brings."""
        super().log(level, msg, *[printable(str(one)) for one in args], stacklevel=2, **options)
