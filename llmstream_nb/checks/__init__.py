"""What the exercises check, with hints that grow more concrete from try to try."""

from __future__ import annotations

from llmstream_nb.checks.answers import produce, read, read_many, rebuild
from llmstream_nb.checks.bounds import budget, lag
from llmstream_nb.checks.events import last_event_id, parse
from llmstream_nb.checks.groups import claim, work
from llmstream_nb.checks.resuming import missing, resume, state
from llmstream_nb.checks.streams import collect, count_entries, get_last_id, pages, stopped
from llmstream_nb.checks.take_home import poll, source

__all__ = [
    "budget",
    "claim",
    "collect",
    "count_entries",
    "get_last_id",
    "lag",
    "last_event_id",
    "missing",
    "pages",
    "parse",
    "poll",
    "produce",
    "read",
    "read_many",
    "rebuild",
    "resume",
    "source",
    "state",
    "stopped",
    "work",
]
