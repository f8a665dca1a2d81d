"""The protocol: what an answer looks like in Redis, and what it means. No I/O happens here; see PROTOCOL.md."""
