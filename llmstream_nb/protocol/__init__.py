"""The protocol: what an answer looks like in Redis, and what it means. No I/O happens here; see PROTOCOL.md."""

from llmstream_nb.moved import of_the_package as __getattr__  # noqa: F401 - names that stood here before
