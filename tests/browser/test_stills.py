"""The still pictures that save-outputs puts beside widgets: small, legible anywhere, and the same for the same state."""

from __future__ import annotations

import base64
import io
from typing import Any

import ipywidgets
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from llmstream_nb import AnswerView, AskPanel, ask, connect
from tests import stills
from tests.model import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def saved(widget: Any) -> Any:
    """A notebook that shows this widget, as nbclient leaves it."""
    view = {stills.WIDGET_VIEW: {"model_id": widget.model_id}, "text/plain": repr(widget)}
    notebook = new_notebook(cells=[new_code_cell("", outputs=[new_output("display_data", data=view)])])
    notebook.metadata["widgets"] = {stills.WIDGET_STATE: ipywidgets.Widget.get_manager_state()}
    return notebook


def still(browser, notebook: Any, before: Any = None) -> Any:
    """The output with its picture."""
    page = browser.new_page(viewport={"width": stills.WIDTH, "height": 720})
    assert stills.add_stills(page, notebook, before or new_notebook()) == []
    page.close()
    return notebook.cells[0].outputs[0]


def test_a_still_is_small_and_changes_only_with_what_it_shows(browser) -> None:
    with connect(prefix="stills") as client:
        view = AnswerView(ask("?", source=lambda *_: ["**Yes**"], client=client))
        wait_for(lambda: view.html)
        first = saved(view)
        output = still(browser, first)
        picture = output.data[stills.PNG]
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert len(base64.b64decode(picture)) < 10_000 < stills.LIMIT
        assert image.width == stills.WIDTH
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert output.metadata[stills.PNG]["alt"].startswith("Complete. Yes")
        assert set(output.data) == {stills.PNG, "text/plain"}
        assert not first.metadata["widgets"][stills.WIDGET_STATE]["state"]
        view.ms += 1200
        assert still(browser, saved(view), first).data[stills.PNG] == picture, "only times differ"
        view.html = "<p>No</p>"
        assert still(browser, saved(view), first).data[stills.PNG] != picture


def test_boxes_that_share_words_keep_their_picture_whichever_got_which(browser) -> None:
    first = saved(ipywidgets.HBox([ipywidgets.HTML("one "), ipywidgets.HTML("two")]))
    picture = still(browser, first).data[stills.PNG]
    shared = saved(ipywidgets.HBox([ipywidgets.HTML("two"), ipywidgets.HTML("one ")]))
    assert still(browser, shared, first).data[stills.PNG] == picture


def test_a_panel_stays_a_widget_with_no_more_than_its_own_state(browser) -> None:
    other = ipywidgets.HTML("of another cell")
    notebook = saved(AskPanel("What is Redis?"))
    output = still(browser, notebook)
    assert stills.WIDGET_VIEW in output.data
    assert output.metadata[stills.PNG]["alt"].startswith("Run the cell above first.")
    models = notebook.metadata["widgets"][stills.WIDGET_STATE]["state"]
    assert {model["model_name"] for model in models.values()} == {"VBoxModel", "AnyModel", "LayoutModel"}
    assert other.model_id not in models and len(models) == 4
