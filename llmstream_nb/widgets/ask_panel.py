"""AskPanel: a form to ask a model from a notebook, and the answer live beneath it."""

import threading
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import anywidget
import ipywidgets
import traitlets as t

from llmstream_nb.answers.ask import Answer, ask
from llmstream_nb.llm.sources import default_source, prepared_questions, sources
from llmstream_nb.protocol.wire import LLMStreamError
from llmstream_nb.widgets.answer_view import AnswerView
from llmstream_nb.widgets.bundle import bundle


class AskForm(anywidget.AnyWidget):
    """The form alone: what is filled in, and what the panel has to say about it."""

    _esm = bundle("elements.js", "kernel.js", "sight.js", "ask_form.js")
    _css = bundle("kernel.css", "ask_form.css")

    question = t.Unicode().tag(sync=True)
    topic = t.Unicode().tag(sync=True)
    source = t.Unicode().tag(sync=True)
    without_stream = t.Bool(help="Ask for the whole answer in one piece.").tag(sync=True)
    sources: t.List[Any] = t.List(help="To choose from: [name, label, why it is not ready].").tag(sync=True)
    prepared = t.List(t.Unicode(), help="Questions that the scripted source can answer.").tag(sync=True)
    busy = t.Bool(help="An answer is being written: Stop is possible, Ask is not.").tag(sync=True)
    message = t.Unicode(help="What went wrong.").tag(sync=True)


class AskPanel(ipywidgets.VBox):  # type: ignore[misc]
    """Ask in a form, and watch the answer stream. One answer at a time: stop it before asking again.

    Args:
        question, topic: to begin with.
        source: as for `ask`; your own function is offered beside the others.
        options: passed on to `ask`: model, client, timing, timeout.
    """

    children: tuple[ipywidgets.Widget, ...]  # the form, and the view of the last answer

    def __init__(
        self,
        question: str = "",
        topic: str = "",
        source: str | Callable[[str, str | None], Iterable[str]] | None = None,
        **options: Any,
    ) -> None:
        self.answer: Answer | None = None  # the last one asked
        self._own = source if callable(source) else None
        self._options = options
        self._lock = threading.Lock()
        self._stop = False
        chosen = _name(source) if callable(source) else source or default_source()
        self.form = AskForm(question=question, topic=topic, source=chosen, prepared=prepared_questions())
        self._list_sources()
        self.form.on_msg(self._clicked)
        super().__init__([self.form])
        # While the question is read: importing this takes longer than the first token does.
        threading.Thread(target=import_module, args=("openai",), daemon=True).start()

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        return "<AskPanel: run the cell to use it>"

    def ask(self) -> Answer | None:
        """Ask what the form holds, and return at once; None if that is refused: the panel says why."""
        form = self.form
        with self._lock:
            if form.busy:
                form.message = "An answer is being written: stop it first, or wait for its end."
                return None
            form.busy, form.message, self._stop = True, "", False
        try:
            self._list_sources()
            answer = self._ask()
            self._show(answer)
        except Exception as error:  # noqa: BLE001 - shown to the one who asked, whatever it is
            form.message, form.busy = _words(error), False
            return None
        if self._stop:  # pressed while the question was on its way
            self.stop()
        return answer

    def stop(self) -> None:
        """Stop the answer and keep its text so far; returns when it has ended."""
        self._stop = True
        if self.answer is None or not self.form.busy:
            return
        try:
            self.answer.stop()
        except Exception as error:  # noqa: BLE001
            self.form.message, self.form.busy = _words(error), False

    def close(self) -> None:
        """Take the panel off the page. The answer goes on."""
        for child in self.children:
            child.close()
        super().close()

    def _ask(self) -> Answer:
        form = self.form
        source = self._own if self._own and form.source == _name(self._own) else form.source
        asked = {"topic": form.topic.strip() or None, "source": source, "stream": not form.without_stream}
        return ask(form.question, **asked | self._options)

    def _show(self, answer: Answer) -> None:
        self.answer, old = answer, self.children[1:]
        view = AnswerView(answer)
        self.children = (self.form, view)
        view.observe(self._heard, "live")
        if not view.live:  # it ended before it was observed
            self._ended()
        for child in old:
            child.close()

    def _heard(self, change: Any) -> None:
        if change.owner is not self.children[-1]:
            return
        self.form.busy = change.new
        if not change.new:
            self._ended()

    def _ended(self) -> None:
        """Whoever asked their own function learns all of what it raised; the view, as others see it, does not tell."""
        raised = self.answer.exception if self.answer and self._own else None
        if raised is not None:
            self.form.message = _words(raised)
        self.form.busy = False

    def _clicked(self, form: AskForm, content: dict[str, Any], _: Any) -> None:
        """Ask and Stop may wait for Redis, and the kernel must not: each click has a thread."""
        if content["do"] == "ask" and not form.busy:
            form.set_state(content["form"])

        def act() -> None:
            self.ask() if content["do"] == "ask" else self.stop()
            form.send({"done": content["do"]})

        threading.Thread(target=act, name=f"llmstream {content['do']}", daemon=True).start()

    def _list_sources(self) -> None:
        own = [[_name(self._own), f"{_name(self._own)}: your own function", ""]] if self._own else []
        self.form.sources = own + [[source.name, source.label, source.note] for source in sources()]


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "own")


def _words(error: BaseException) -> str:
    try:
        return str(error) if isinstance(error, LLMStreamError) else f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - its text is anybody's code
        return type(error).__name__
