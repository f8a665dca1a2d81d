"""Widgets: an answer as it grows, a panel to ask from, and a monitor of all that goes on."""

from __future__ import annotations

from llmstream_nb.widgets.answer_view import AnswerView
from llmstream_nb.widgets.ask_panel import AskPanel
from llmstream_nb.widgets.monitor import Monitor

__all__ = ["AnswerView", "AskPanel", "Monitor"]
