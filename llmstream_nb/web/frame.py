"""The web page inside a notebook."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets as t

if TYPE_CHECKING:
    from llmstream_nb.answers.ask import Answer
    from llmstream_nb.web.server import WebServer


class WebFrame(anywidget.AnyWidget):
    """An inline frame with the page of a `WebServer`; made by `WebServer.frame`.

    The address holds the token, so it is no part of the widget's state, which JupyterLab may save: the frame asks for
    it once it is on a page, and the kernel sends it as a message.
    """

    _esm = pathlib.Path(__file__).with_name("frame.js").read_text("utf-8")

    height = t.Int().tag(sync=True)

    def __init__(self, server: WebServer, answer: Answer | str, height: int) -> None:
        super().__init__(height=height)
        self._server, self._answer = server, answer
        self.on_msg(self._asked)

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        return "<WebFrame: run the cell to see the page>"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data:
            data["text/plain"] = repr(self)
        return bundle

    def _asked(self, *_: Any) -> None:
        link = self._server.link(self._answer)
        self.send(
            {
                "port": self._server.port,
                "query": link.partition("?")[2],
                "hub": "JUPYTERHUB_SERVICE_PREFIX" in os.environ,
            }
        )
