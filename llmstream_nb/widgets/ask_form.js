// The form of an AskPanel. The kernel decides what happens; here is only what people see and press.

import { make, say } from "../viewing/browser/elements.js";
import { watchKernel } from "./kernel.js";
import { bringIntoSight } from "./sight.js";

function field(parent, name, label, tag, attributes = {}) {
  const box = make(parent, "label", { class: `llmstream-field llmstream-${name}` });
  make(box, "span", {}, label);
  return make(box, tag, attributes);
}

function render({ model, el }) {
  el.classList.add("llmstream-form");
  bringIntoSight(el);
  el.tabIndex = -1; // so that it can have the keyboard while no button can; then it is read by its name
  Object.assign(el, { role: "group", ariaLabel: "Ask a model" });
  const kernel = watchKernel(model, make(el, "p", { class: "llmstream-lost", role: "status" }), () => update());
  const question = field(el, "question", "Question", "textarea", { rows: 2, spellcheck: "false" });
  const topic = field(el, "topic", "Topic (optional)", "input", { type: "text", placeholder: "such as Redis Streams" });
  const source = field(el, "source", "Model", "select");
  const prepared = field(el, "prepared", "Questions with a prepared answer", "select");
  const note = make(el, "p", { class: "llmstream-unready", role: "status" });

  const row = make(el, "div", { class: "llmstream-row" });
  const mac = /Mac|iP/.test(navigator.platform);
  const ask = make(row, "button", { type: "button", class: "llmstream-ask", "aria-keyshortcuts": "Control+Enter Meta+Enter" }, "Ask");
  make(ask, "kbd", { "aria-hidden": "true" }, mac ? "⌘ ⏎" : "Ctrl ⏎");
  const stop = make(row, "button", { type: "button" }, "Stop");
  stop.title = "End the answer and keep its text so far";
  const whole = make(row, "label", { class: "llmstream-whole" });
  const withoutStream = make(whole, "input", { type: "checkbox" });
  whole.append("Without stream");
  const message = make(el, "p", { class: "llmstream-message", role: "alert" });

  const pending = new Set(); // clicks that the kernel has not dealt with yet

  function update() {
    const busy = model.get("busy");
    question.value = model.get("question");
    topic.value = model.get("topic");
    withoutStream.checked = model.get("without_stream");
    source.replaceChildren();
    for (const [name, label, why] of model.get("sources")) {
      make(source, "option", { value: name }, why ? `${label} (not ready)` : label);
    }
    source.value = model.get("source");
    choose();
    const focused = document.activeElement;
    for (const control of el.querySelectorAll("textarea, input, select")) control.disabled = Boolean(kernel.lost);
    ask.disabled = busy || pending.has("ask") || kernel.lost;
    stop.disabled = !busy || pending.has("stop") || kernel.lost;
    if (focused === el || (el.contains(focused) && focused.disabled)) moveFocus(); // what is disabled loses the keyboard
    stop.textContent = busy && pending.has("stop") ? "Stopping…" : "Stop";
    say(message, model.get("message"));
  }

  function moveFocus() {
    ([stop, ask].find((button) => !button.disabled) ?? el).focus({ preventScroll: true });
  }

  function choose() {
    const why = model.get("sources").find(([name]) => name === source.value)?.[2] ?? "";
    note.textContent = why;
    note.hidden = !why || why === model.get("message");
    prepared.replaceChildren();
    make(prepared, "option", { value: "" }, "choose one …");
    for (const text of model.get("prepared")) make(prepared, "option", { value: text }, text);
    prepared.parentElement.hidden = source.value !== "scripted";
  }

  const values = () => ({ question: question.value, topic: topic.value, source: source.value, without_stream: withoutStream.checked });

  function press(what) {
    if (what === "ask" ? ask.disabled : stop.disabled) return;
    pending.add(what);
    model.set(values());
    model.send({ do: what, form: values() });
    el.focus({ preventScroll: true }); // and from there to the other button, once it can be pressed
    update();
  }

  const keep = () => {
    model.set(values());
    model.save_changes();
  };
  const handled = ({ done }) => {
    pending.delete(done);
    update();
  };
  el.addEventListener("change", (event) => {
    if (event.target === prepared && prepared.value) question.value = prepared.value;
    keep();
    choose();
  });
  el.addEventListener("keydown", (event) => {
    const plain = !event.ctrlKey && !event.metaKey;
    const asks = event.key === "Enter" && !plain;
    if (asks) press("ask");
    if (asks || (event.repeat && event.target.matches("button"))) event.preventDefault(); // held down, Enter would stop what it asked
    // JupyterLab must not take what is typed here, nor a letter that was meant to be. From a button it may have the
    // rest, such as Shift+Enter and the arrows.
    if (asks || event.target.matches("textarea, select, [type=text]") || (plain && event.key.length === 1)) event.stopPropagation();
  });
  ask.addEventListener("click", () => press("ask"));
  stop.addEventListener("click", () => press("stop"));
  model.on("change", update);
  model.on("msg:custom", handled);
  update();
  return () => {
    kernel.close();
    model.off("change", update);
    model.off("msg:custom", handled);
  };
}

export default { render };
