"""Widgets: an answer as it grows, and a panel to ask from."""

from __future__ import annotations

from llmstream_nb.widgets.answer_view import AnswerView
from llmstream_nb.widgets.ask_panel import AskPanel

__all__ = ["AnswerView", "AskPanel"]
