// Shows one answer. What a model wrote goes into text nodes; only `html`, which the kernel has sanitised, becomes
// elements.

const isRunning = (model) => ["waiting", "streaming"].includes(model.get("state"));
const seconds = (ms, digits) => `${(ms / 1000).toFixed(digits)} s`;
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

function make(parent, tag, name, attributes = {}) {
  const node = document.createElement(tag);
  node.className = `llmstream-${name}`;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return parent.appendChild(node);
}

function render({ model, el }) {
  el.classList.add("llmstream-answer");
  const head = make(el, "div", "head");
  const status = make(head, "span", "status", { role: "status" }); // read aloud when it changes, unlike each token
  const label = make(status, "strong", "label");
  const note = make(status, "span", "note");
  const figures = make(head, "span", "figures");
  const raw = make(head, "button", "raw", { type: "button", title: "Show the text exactly as the model wrote it" });
  const bar = make(el, "div", "bar", { role: "progressbar", "aria-label": "Waiting for the first token" });
  const body = make(el, "div", "body", { role: "region", "aria-label": "Answer", tabindex: 0 });

  let shown = null; // version, text, gaps and html that the body shows
  let tail = null; // the text node that grows
  let heard = 0; // when the last message came
  let asText = false; // the reader wants no Markdown
  let live = false; // text was seen while it grew: stay at its end, unless the reader has scrolled up

  function write(text) {
    // Some lines per block: the browser lays out all of a block again when it grows.
    for (const line of text.match(/[^\n]*\n|[^\n]+/g) ?? []) {
      if (!tail || (tail.length > 2000 && tail.data.endsWith("\n"))) {
        tail = make(body, "div", "block").appendChild(new Text());
      }
      tail.appendData(line);
    }
  }

  function fill(next) {
    body.replaceChildren();
    tail = null;
    body.classList.toggle("llmstream-markdown", Boolean(next.html));
    if (next.html) {
      body.innerHTML = next.html;
      return;
    }
    let from = 0;
    for (const [at, words] of next.gaps) {
      write(next.text.slice(from, at));
      make(body, "mark", "gap").textContent = words;
      tail = null;
      from = at;
    }
    write(next.text.slice(from));
  }

  function update() {
    const next = Object.fromEntries(["version", "text", "gaps", "html"].map((name) => [name, model.get(name)]));
    const atEnd = body.scrollTop + body.clientHeight > body.scrollHeight - 20;
    raw.hidden = !next.html;
    raw.textContent = asText ? "as Markdown" : "as text";
    if (asText) next.html = "";
    const same = shown && ["version", "html"].every((name) => next[name] === shown[name]) && next.gaps.length === shown.gaps.length;
    if (!same || !next.text.startsWith(shown.text)) fill(next);
    else if (!next.html) write(next.text.slice(shown.text.length));
    shown = next;
    el.dataset.state = model.get("state");
    if (label.textContent !== model.get("label")) label.textContent = model.get("label");
    if (note.textContent !== model.get("note")) note.textContent = model.get("note");
    bar.hidden = model.get("state") !== "waiting";
    body.hidden = !next.text;
    body.setAttribute("aria-busy", isRunning(model));
    live ||= isRunning(model) && Boolean(next.text);
    if (live && atEnd) body.scrollTop = body.scrollHeight;
    heard = performance.now();
    count();
  }

  function count() {
    const [chunks, first, ms] = ["chunks", "first_ms", "ms"].map((name) => model.get(name));
    const now = isRunning(model) ? ms + performance.now() - heard : ms;
    const parts = [];
    if (first !== null) parts.push(`${chunks.toLocaleString("en")} chunk${chunks === 1 ? "" : "s"}`, `first token ${seconds(first, 2)}`);
    if (now) parts.push(`${isSettled(model) ? "total " : ""}${seconds(now, 1)}`);
    figures.textContent = parts.join(" · ");
  }

  raw.addEventListener("click", () => {
    asText = !asText;
    update();
  });
  update();
  model.on("change", update);
  const clock = setInterval(() => isRunning(model) && count(), 100);
  return () => {
    clearInterval(clock);
    model.off("change", update);
  };
}

export default { initialize, render };
