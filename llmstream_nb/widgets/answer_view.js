// Shows one answer: what the kernel says of it, and the text as it grows.

import { make, say } from "../viewing/browser/elements.js";
import { Paper, figures } from "../viewing/browser/paper.js";
import { watchKernel } from "./kernel.js";
import { bringIntoSight } from "./sight.js";

const isRunning = (model) => ["waiting", "streaming"].includes(model.get("state"));
const isSettled = (model) => !isRunning(model) && model.get("state") !== "interrupted";

function initialize({ model }) {
  let asked = false; // for the whole state, which is then on its way
  const ask = () => {
    if (!asked) model.send({ want: "all" });
    asked = true;
  };
  model.on("msg:custom", ({ version, offset, added, ...figures }) => {
    const text = model.get("text");
    if (version !== model.get("version") || offset > text.length) ask();
    else if (offset + added.length > text.length) model.set({ ...figures, text: text.slice(0, offset) + added });
  });
  model.on("change:ms", () => (asked = false));
  if (!isSettled(model)) ask(); // for what was sent while this page was being loaded
}

// The text and its gaps as parts of a Paper.
function partsOf({ text, gaps }) {
  const parts = [];
  let from = 0;
  for (const [at, gap] of gaps) {
    parts.push(text.slice(from, at), { gap });
    from = at;
  }
  return [...parts, text.slice(from)].filter(Boolean);
}

function render({ model, el }) {
  el.classList.add("llmstream-answer");
  bringIntoSight(el);
  const head = make(el, "div", { class: "llmstream-head" });
  const status = make(head, "span", { class: "llmstream-status", role: "status" }); // read aloud when it changes, unlike each token
  const label = make(status, "strong", { class: "llmstream-label" });
  const note = make(status, "span");
  const kernel = watchKernel(model, status, () => update());
  const known = make(head, "span", { class: "llmstream-figures" });
  const raw = make(head, "button", { class: "llmstream-raw", type: "button", title: "Show the text exactly as the model wrote it" });
  const bar = make(el, "div", { class: "llmstream-bar", role: "progressbar", "aria-label": "Waiting for the first token" });
  const body = make(el, "div", { class: "llmstream-body", role: "region", "aria-label": "Answer", tabindex: 0 });
  const paper = new Paper(body, stay);

  let shown = {}; // what the body shows
  let heard = 0; // when the last message came
  let asText = false; // the reader wants no Markdown
  let live = false; // text was seen while it grew: stay at its end, unless the reader has scrolled up

  function stay(draw) {
    const atEnd = body.scrollTop + body.clientHeight > body.scrollHeight - 20;
    draw();
    if (live && atEnd) body.scrollTop = body.scrollHeight;
  }

  function update() {
    const next = Object.fromEntries(["version", "text", "gaps", "html", "attempts", "worker"].map((name) => [name, model.get(name)]));
    const running = isRunning(model) && !kernel.lost;
    raw.hidden = !next.html;
    raw.textContent = asText ? "as Markdown" : "as text";
    if (asText) next.html = "";
    live ||= running && Boolean(next.text);
    const same = next.version === shown.version && next.html === shown.html && next.gaps.length === shown.gaps.length;
    if (next.attempts > shown.attempts) paper.strike(shown.worker, partsOf(next), next.html);
    else if (!same || !next.text.startsWith(shown.text)) paper.show(partsOf(next), next.html);
    else if (next.text !== shown.text) paper.add(next.text.slice(shown.text.length));
    if (!running) paper.draw(); // a hidden page has no frames
    shown = next;
    const cut = kernel.lost && !isSettled(model); // how it went on is not known here
    el.dataset.state = cut ? "lost" : model.get("state");
    say(label, cut ? "Not live" : model.get("label"));
    say(note, model.get("note"));
    bar.hidden = model.get("state") !== "waiting" || kernel.lost;
    body.setAttribute("aria-busy", running);
    heard = performance.now();
    count();
  }

  function count() {
    const [chunks, first, ms, attempts] = ["chunks", "first_ms", "ms", "attempts"].map((name) => model.get(name));
    const now = isRunning(model) && !kernel.lost ? ms + performance.now() - heard : ms;
    known.textContent = figures({ chunks, first, attempts, ms: now, over: isSettled(model) }).join(" · ");
  }

  raw.addEventListener("click", () => {
    asText = !asText;
    update();
  });
  update();
  model.on("change", update);
  const clock = setInterval(() => isRunning(model) && count(), 100);
  return () => {
    kernel.close();
    clearInterval(clock);
    model.off("change", update);
  };
}

export default { initialize, render };
