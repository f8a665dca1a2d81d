// Shows one answer: what the kernel says of it, and the text as it grows.

import { make, say } from "../viewing/browser/elements.js";
import { Paper, figures, partsOf } from "../viewing/browser/paper.js";
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
  model.on("msg:custom", ({ version, offset, added, kept, skip = 0, blocks = [], ...figures }) => {
    const [text, old] = [model.get("text"), model.get("blocks")];
    const before = skip ? textOf(old[kept]) : "";
    if (version !== model.get("version") || offset > text.length || kept > old.length || skip > before.length) return ask();
    const [first, ...rest] = blocks;
    const all = first ? [...old.slice(0, kept), [first[0], grown(first[1], before.slice(0, skip))], ...rest] : old;
    const more = all.length > old.length || (all.length === old.length && textOf(all.at(-1)).length > textOf(old.at(-1)).length);
    if (offset + added.length > text.length) model.set({ ...figures, text: text.slice(0, offset) + added, blocks: more ? all : old });
    else if (more) model.set({ ...figures, blocks: all });
  });
  model.on("change:ms", () => (asked = false));
  if (!isSettled(model)) ask(); // for what was sent while this page was being loaded
}

const textOf = (found) => found?.[1].text ?? "";
const grown = (block, before) => (before ? { ...block, text: before + block.text } : block);

function render({ model, el }) {
  el.classList.add("llmstream-answer");
  bringIntoSight(el);
  const head = make(el, "div", { class: "llmstream-head" });
  const status = make(head, "span", { class: "llmstream-status", role: "status" }); // read aloud when it changes, unlike each token
  const label = make(status, "strong", { class: "llmstream-label" });
  status.append(" "); // else the two are read as one word
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
    const next = Object.fromEntries(["version", "text", "blocks", "html", "attempts", "worker"].map((name) => [name, model.get(name)]));
    const running = isRunning(model) && !kernel.lost;
    raw.hidden = !next.html;
    raw.textContent = asText ? "as Markdown" : "as text";
    if (asText) next.html = "";
    live ||= running && Boolean(next.text || next.blocks.length);
    const same = next.version === shown.version && next.html === shown.html;
    if (next.version !== shown.version && next.attempts > shown.attempts) paper.strike(shown.worker, partsOf(next), next.html);
    else if (!same || !next.text.startsWith(shown.text)) paper.show(partsOf(next), next.html);
    else if (next.text !== shown.text || next.blocks !== shown.blocks) paper.grow(partsOf(next));
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
    const names = ["chunks", "first_part_ms", "first_ms", "ms", "attempts"];
    const [chunks, firstPart, first, ms, attempts] = names.map((name) => model.get(name));
    const running = isRunning(model) && !kernel.lost;
    const now = running ? ms + performance.now() - heard : ms;
    known.textContent = figures({ chunks, firstPart, first, attempts, ms: now, over: isSettled(model) }).join(" · ");
    paper.tick(running ? now : null);
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
