"""The web page that streams, resumes and stops answers, and its server."""

from llmstream_nb.extras import needed

with needed("web", __name__):
    from llmstream_nb.web.app import create_app
    from llmstream_nb.web.desk import Limits
    from llmstream_nb.web.server import NotServed, WebServer

__all__ = ["Limits", "NotServed", "WebServer", "create_app"]
