// Shows one answer. What a model wrote goes into text nodes; only `html`, which the kernel has sanitised, becomes
// elements.

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
  const bar = make(el, "div", "bar", { role: "progressbar", "aria-label": "Waiting for the first token" });
  const body = make(el, "div", "body", { role: "region", "aria-label": "Answer", tabindex: 0 });

  let shown = null; // version, text, gaps and html that the body shows
  let tail = null; // the text node that grows
  let heard = 0; // when the last message came
  let follow = false; // stay at the bottom: from the first text on, unless the reader scrolls up

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
    const grown =
      shown && !next.html && next.version === shown.version && next.gaps.length === shown.gaps.length && next.text.startsWith(shown.text);
    if (grown) write(next.text.slice(shown.text.length));
    else fill(next);
    shown = next;
    el.dataset.state = model.get("state");
    if (label.textContent !== model.get("label")) label.textContent = model.get("label");
    if (note.textContent !== model.get("note")) note.textContent = model.get("note");
    bar.hidden = model.get("state") !== "waiting";
    body.hidden = !next.text;
    body.setAttribute("aria-busy", isRunning(model));
    if (follow) body.scrollTop = body.scrollHeight;
    heard = performance.now();
    count();
  }

  function count() {
    const [chunks, first, ms] = ["chunks", "first_ms", "ms"].map((name) => model.get(name));
    const now = isRunning(model) ? ms + performance.now() - heard : ms;
    const parts = first === null ? [] : [`${chunks.toLocaleString("en")} chunk${chunks === 1 ? "" : "s"}`, `first token ${(first / 1000).toFixed(2)} s`];
    if (now || parts.length) parts.push(`${(now / 1000).toFixed(1)} s`);
    figures.textContent = parts.join(" · ");
  }

  body.addEventListener("scroll", () => (follow = body.scrollTop + body.clientHeight > body.scrollHeight - 20));
  follow = isRunning(model);
  update();
  model.on("change", update);
  const clock = setInterval(() => isRunning(model) && count(), 100);
  return () => {
    clearInterval(clock);
    model.off("change", update);
  };
}

export default { initialize, render };
