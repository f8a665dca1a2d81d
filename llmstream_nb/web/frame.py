"""The web page inside a notebook."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import anywidget
import traitlets as t


class WebFrame(anywidget.AnyWidget):
    """An inline frame with the page of a `WebServer`; made by `WebServer.frame`.

    The address holds the token, so it is no part of the widget's state, which JupyterLab may save: the frame asks for
    it once it is on a page, and the kernel sends it as a message.
    """

    _esm = pathlib.Path(__file__).with_name("frame.js").read_text("utf-8")

    height = t.Int().tag(sync=True)

    def __init__(self, port: int, link: Callable[[], str], height: int) -> None:
        super().__init__(height=height)
        self._port, self._link = port, link
        self.on_msg(self._asked)

    def __repr__(self) -> str:
        """The same at every run: saved outputs hold it, and strict nbval compares it."""
        return "<WebFrame: run the cell to see the page>"

    def _asked(self, *_: Any) -> None:
        hub, query = "JUPYTERHUB_SERVICE_PREFIX" in os.environ, self._link().partition("?")[2]
        self.send({"port": self._port, "query": query, "hub": hub})
