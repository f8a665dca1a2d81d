"""The web page in a frame of a notebook: reached directly, and through jupyter-server-proxy, as on Binder."""

from __future__ import annotations

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect

from .lab import ROOT
from .lab import lab as start_lab

IMPORTS = "import os\nfrom llmstream_nb import Answer, WebServer\n"
SERVE = "server = WebServer().start(); server"
TOKEN = "print(server.token)"


def ask_in_frame(browser, lab, before: str = "") -> None:
    """Ask in the page, see the answer grow and complete; and look what the saved notebook holds."""
    path = lab.notebook(IMPORTS + before + SERVE, "server.frame()", TOKEN, "server.stop()")
    notebook = lab.open(browser, path)
    notebook.run(0)
    notebook.run(1)
    page = notebook.output(1).frame_locator("iframe")
    page.get_by_label("Question", exact=True).fill("What is a Redis stream?")
    page.get_by_role("button", name="Ask").click()
    text = page.get_by_label("Text of the answer")
    expect(text).to_contain_text("Redis")
    expect(page.locator("#state")).to_have_text("Streaming")  # it came in pieces, also through the proxy
    expect(page.locator("#state")).to_have_text("Complete")
    expect(text.locator("strong").first).to_be_visible()
    notebook.run(2)
    expect(notebook.output(2)).not_to_be_empty()
    token = notebook.text(2).strip()
    notebook.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets[2].model.clearExecution()")
    notebook.run(3)
    notebook.save()
    assert len(token) > 16
    assert token not in (ROOT / path).read_text("utf-8")
    notebook.page.context.close()


def test_in_a_frame(browser, lab) -> None:
    ask_in_frame(browser, lab)


def test_in_a_frame_behind_a_hub(browser) -> None:
    with start_lab("/user/me/") as elsewhere:
        ask_in_frame(browser, elsewhere, "os.environ['JUPYTERHUB_SERVICE_PREFIX'] = '/user/me/'\n")
