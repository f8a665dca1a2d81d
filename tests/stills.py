"""For maintainers: a still picture of each widget in a notebook's outputs, for whoever shows them without a kernel."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
PNG = "image/png"
LIMIT = 60_000  # bytes of a picture
WIDTH = 900  # pixels
CAPTION = "A saved picture: run the cell, and it is live."
FINGERPRINT = "Fingerprint"  # the PNG's text that tells what it shows

# Draws one widget with the kit's own scripts over models that hold its saved state. What comes back tells two pictures
# apart; it leaves out what differs from run to run, such as times and ages.
DRAW = """async ([models, root, caption]) => {
  const find = (reference) => models[reference.replace("IPY_MODEL_", "")];
  async function draw(parent, { state }) {
    const el = parent.appendChild(document.createElement("div"));
    if (state._anywidget_id?.endsWith("WebFrame")) {
      el.className = "frame";
      el.textContent = "The kit's web page stands here, once the cell has run.";
    } else if (state._esm) {
      document.head.appendChild(document.createElement("style")).textContent = state._css;
      const script = URL.createObjectURL(new Blob([state._esm], { type: "text/javascript" }));
      const widget = (await import(script)).default;
      const form = state._anywidget_id.endsWith("AskForm"); // its buttons must not look alive
      const get = (name) => (name === "layout" ? { comm_live: !form } : state[name]);
      const model = { get, set() {}, on() {}, off() {}, send() {}, save_changes() {} };
      widget.initialize?.({ model });
      widget.render({ model, el });
    } else if (state.children) {
      const layout = find(state.layout).state;
      if (layout.grid_template_columns) el.style.display = "grid";
      for (const name of ["grid_template_columns", "grid_gap", "align_items"]) {
        if (layout[name]) el.style[name.replaceAll(/_(.)/g, (_, letter) => letter.toUpperCase())] = layout[name];
      }
      for (const child of state.children) await draw(el, find(child));
    } else if (state.description) {
      el.className = "button";
      el.textContent = state.description;
    } else {
      el.className = "html";
      el.innerHTML = state.value;
    }
  }
  await draw(document.body, find(root));
  const alive = !document.querySelector(".llmstream-form");
  const copy = document.body.cloneNode(true);
  const times = ".llmstream-figures, .llmstream-thought, .llmstream-cell-age span, .llmstream-cell-rate span, .llmstream-workers .llmstream-label";
  copy.querySelectorAll(times).forEach((node) => node.remove());
  // Which of several boxes got a word is chance: their characters in order are the same each time.
  const boxes = [...copy.querySelectorAll(".html")].map((node) => node.textContent).join("");
  copy.querySelectorAll(".html").forEach((node) => (node.innerHTML = ""));
  const styles = [...document.querySelectorAll("style")].map((node) => node.textContent);
  if (alive) document.body.appendChild(Object.assign(document.createElement("p"), { className: "caption", textContent: caption }));
  return [copy.innerHTML, [...boxes].sort().join(""), ...styles].join("\\n");
}"""
TEXT = """() => {
  document.querySelectorAll(".llmstream-figures, .caption").forEach((node) => node.remove());
  document.querySelectorAll(".llmstream-label").forEach((node) => node.append(". "));
  return document.body.innerText;
}"""
PAGE = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; padding: 10px; box-sizing: border-box; width: 900px; background: #fff; color: #000; font: 14px/1.5 sans-serif; }
.button { display: inline-block; padding: 4px 16px; border-radius: 2px; background: #d32f2f; color: #fff; font-size: 13px; }
.frame { padding: 24px; border: 1px solid #bbb; border-radius: 4px; }
.caption { margin: 6px 2px 0; color: #555; font-size: 13px; }
.llmstream-raw { display: none; }
*, ::before { animation: none !important; }
</style>"""


def add_stills(page: Any, notebook: Any, before: Any) -> list[str]:
    """Put a picture beside each widget's text; keep the one of `before` where only times differ.

    Only a panel stays a widget: its form says that its cell has to be run, and is the first thing that readers see.
    What other widgets would show in JupyterLab is "model not found".

    Args:
        page: Playwright's, of a browser.
        notebook: as nbclient has executed it, with the state of all its widgets.
        before: the same notebook as it was saved the last time.

    Returns:
        What went wrong, as phrases to show.
    """
    models = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    old, bad, kept = dict(_pictures(before)), [], set()
    for output in _outputs(notebook):
        if WIDGET_VIEW not in output.get("data", {}):
            continue
        root = output.data[WIDGET_VIEW]["model_id"]
        page.goto("about:blank")
        page.set_content(PAGE)
        tells = page.evaluate(DRAW, [models, root, CAPTION])
        told = hashlib.sha256(tells.encode() + Path(__file__).read_bytes()).hexdigest()
        if told not in old:
            shot = page.locator("body").screenshot()
            old[told] = _png(shot, told), _alternative(page.evaluate(TEXT))
        picture, alt = old[told]
        if len(picture) > LIMIT:
            bad.append(f"the picture of {output.data['text/plain']} has {len(picture):,} bytes")
        output.data[PNG] = base64.b64encode(picture).decode()
        output.metadata[PNG] = {"alt": alt}
        parts = _parts(models, root)
        if any(models[part]["state"].get("_anywidget_id", "").endswith("AskForm") for part in parts):
            kept |= parts
        else:
            del output.data[WIDGET_VIEW]
    for name in models.keys() - kept:
        del models[name]
    return bad


def _outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def _pictures(notebook: Any) -> Iterator[tuple[str, tuple[bytes, str]]]:
    """The stills of a saved notebook, and their alternative texts, by their fingerprints."""
    from PIL import Image

    for output in _outputs(notebook):
        if PNG in output.get("data", {}):
            picture = base64.b64decode(output.data[PNG])
            if told := Image.open(io.BytesIO(picture)).info.get(FINGERPRINT):
                yield told, (picture, output.metadata[PNG]["alt"])


def _parts(models: Any, root: str) -> set[str]:
    """The ids of a widget and of all that belongs to it."""
    found, open_ends = set[str](), [root]
    while open_ends:
        found.add(name := open_ends.pop())
        state = str(
            {key: value for key, value in models[name]["state"].items() if key in ("children", "layout", "style")}
        )
        open_ends += set(re.findall(r"IPY_MODEL_(\w+)", state)) - found
    return found


def _png(shot: bytes, told: str) -> bytes:
    """The screenshot with the few colours that such pages have."""
    from PIL import Image, PngImagePlugin

    told_in = PngImagePlugin.PngInfo()
    told_in.add_text(FINGERPRINT, told)
    small = (
        Image.open(io.BytesIO(shot)).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True, pnginfo=told_in)
    return out.getvalue()


def _alternative(text: str) -> str:
    """What the picture says, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"
