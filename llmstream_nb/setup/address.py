"""An extension of JupyterLab that says its address where that does not: with a password or token of the user's."""

from typing import Any

from llmstream_nb.setup.environment import say


def _load_jupyter_server_extension(server: Any) -> None:
    def tell() -> None:
        if not server.identity_provider.token_generated:
            say(f"JupyterLab: {server.local_url.partition('?')[0]} (it asks for your token or password)")

    # In the event loop's second round: in the first one it begins to listen.
    server.io_loop.add_callback(server.io_loop.add_callback, tell)
