"""What the exercises check, with hints for the mistake that was found, plainer where it comes again."""

from llmstream_nb.checks.nb00 import count_entries, stopped
from llmstream_nb.checks.nb01 import collect, get_last_id, pages
from llmstream_nb.checks.nb02 import produce, rebuild
from llmstream_nb.checks.nb03 import read, read_many
from llmstream_nb.checks.nb04 import claim, work
from llmstream_nb.checks.nb05 import poll, source
from llmstream_nb.checks.nb05b import capstone
from llmstream_nb.checks.nb06 import missing, resume, state
from llmstream_nb.checks.nb07 import budget, lag
from llmstream_nb.checks.nb08 import last_event_id, parse
from llmstream_nb.checks.nb09 import visible

__all__ = [
    "budget", "capstone", "claim", "collect", "count_entries", "get_last_id", "lag", "last_event_id", "missing",
    "pages", "parse", "poll", "produce", "read", "read_many", "rebuild", "resume", "source", "state", "stopped",
    "visible", "work",
]  # fmt: skip
