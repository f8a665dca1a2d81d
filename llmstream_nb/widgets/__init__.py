"""Widgets: an answer as it grows, a panel to ask from, a stream's key, and a monitor of all that goes on."""

from llmstream_nb.widgets.answer_view import AnswerView
from llmstream_nb.widgets.ask_panel import AskPanel
from llmstream_nb.widgets.monitor import Monitor
from llmstream_nb.widgets.stream_view import StreamView

__all__ = ["AnswerView", "AskPanel", "Monitor", "StreamView"]
