# What `llmstream_nb` offers, for editors and type checkers; __init__.py loads it on first use.

from llmstream_nb import checks as checks
from llmstream_nb import faults as faults
from llmstream_nb import plots as plots
from llmstream_nb import tables as tables
from llmstream_nb import tutorial as tutorial
from llmstream_nb.answers.ask import Answer as Answer
from llmstream_nb.answers.ask import ask as ask
from llmstream_nb.answers.ask import ask_without_stream as ask_without_stream
from llmstream_nb.answers.ask import clear as clear
from llmstream_nb.answers.ask import stop_answer as stop_answer
from llmstream_nb.answers.connection import connect as connect
from llmstream_nb.answers.connection import environment_of as environment_of
from llmstream_nb.answers.produce import Writing as Writing
from llmstream_nb.answers.read import aread_answer as aread_answer
from llmstream_nb.answers.read import read_answer as read_answer
from llmstream_nb.llm.sources import complete as complete
from llmstream_nb.llm.sources import prepared_questions as prepared_questions
from llmstream_nb.pool.groups import claim as claim
from llmstream_nb.pool.groups import read_answer_group as read_answer_group
from llmstream_nb.pool.process import start_process as start_process
from llmstream_nb.pool.queue import enqueue as enqueue
from llmstream_nb.pool.worker import Worker as Worker
from llmstream_nb.protocol.events import Continued as Continued
from llmstream_nb.protocol.events import Ended as Ended
from llmstream_nb.protocol.events import Failed as Failed
from llmstream_nb.protocol.events import Gap as Gap
from llmstream_nb.protocol.events import Interrupted as Interrupted
from llmstream_nb.protocol.events import Restarted as Restarted
from llmstream_nb.protocol.events import Started as Started
from llmstream_nb.protocol.events import text_of as text_of
from llmstream_nb.protocol.parts import Reasoning as Reasoning
from llmstream_nb.protocol.parts import Refusal as Refusal
from llmstream_nb.protocol.parts import Text as Text
from llmstream_nb.protocol.parts import ToolCall as ToolCall
from llmstream_nb.protocol.parts import ToolResult as ToolResult
from llmstream_nb.protocol.parts import Unknown as Unknown
from llmstream_nb.protocol.wire import LLMStreamError as LLMStreamError
from llmstream_nb.protocol.wire import Timing as Timing
from llmstream_nb.web.app import create_app as create_app
from llmstream_nb.web.server import WebServer as WebServer
from llmstream_nb.widgets.answer_view import AnswerView as AnswerView
from llmstream_nb.widgets.ask_panel import AskPanel as AskPanel
from llmstream_nb.widgets.monitor import Monitor as Monitor
from llmstream_nb.widgets.stream_view import StreamView as StreamView

__version__: str
