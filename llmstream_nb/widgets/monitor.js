// Shows what the kernel has sampled; rows are updated in place. All text goes into text nodes.

const COLUMNS = {
  worker: ["Worker", "Holds", "State"],
  answer: ["Answer", "Question", "State", "Worker", "Chunks", "Rate", "Age"],
};
const UNKNOWN = "–";

function make(parent, tag, name, attributes = {}) {
  const node = document.createElement(tag);
  node.className = `llmstream-${name}`;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return parent.appendChild(node);
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function figure(node, number, one, many = one) {
  write(node.firstChild, number === null ? "?" : number.toLocaleString("en"));
  write(node.lastChild, number === 1 ? one : many);
}

function span(seconds) {
  if (seconds < 100) return `${Math.floor(seconds)} s`;
  if (seconds < 6000) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}

function table(parent, kind) {
  // Wider than a small screen: then it scrolls by itself, with the keyboard too.
  const frame = make(parent, "div", "frame", { role: "region", tabindex: 0 });
  const node = make(frame, "table", `${kind}s`);
  const caption = make(node, "caption", "caption");
  const head = make(make(node, "thead", "columns"), "tr", "titles");
  for (const title of COLUMNS[kind]) {
    make(head, "th", `cell-${title.toLowerCase()}`, { scope: "col" }).textContent = title;
  }
  const body = make(node, "tbody", "rows");
  return {
    frame,
    fill(rows, title, update) {
      write(caption, title);
      frame.setAttribute("aria-label", title);
      node.tHead.hidden = !rows.length;
      while (body.rows.length > rows.length) body.lastChild.remove();
      rows.forEach((row, at) => update(body.rows[at] ?? newRow(body, kind), row));
    },
  };
}

function newRow(body, kind) {
  const row = make(body, "tr", "item");
  COLUMNS[kind].forEach((title, at) => {
    const cell = make(row, at ? "td" : "th", `cell-${title.toLowerCase()}`, at ? {} : { scope: "row" });
    // A foreign name in another direction of writing must not turn the row around.
    make(cell, "span", title === "State" ? "label" : "text", { dir: "auto" });
    make(cell, "span", "more", { dir: "auto" });
  });
  return row;
}

function fillCells(row, texts) {
  texts.forEach((text, at) => show(row.cells[at].firstChild, text));
}

function annotate(cell, text) {
  show(cell.lastChild, text);
}

function show(node, text) {
  write(node, text);
  if (node.title !== text) node.title = text; // whole, where there is no room for it
}

function render({ model, el }) {
  el.classList.add("llmstream-monitor");
  const status = make(el, "p", "summary", { role: "status" }); // read aloud when it changes, unlike the rows
  const figures = ["waiting", "answering", "failures", "workers"].map((name) => {
    const node = make(status, "span", "figure");
    make(node, "strong", name);
    node.append(" ", new Text());
    return node;
  });
  const note = make(status, "span", "trouble");
  const workers = table(el, "worker");
  const answers = table(el, "answer");
  let ahead = null; // milliseconds by which this browser's clock is ahead of the kernel's

  function update() {
    const [waiting, answering, failures] = ["waiting", "answering", "failures"].map((name) => model.get(name));
    figure(figures[0], waiting, "question waiting", "questions waiting");
    figure(figures[1], answering, "being answered");
    figure(figures[2], failures, "given up");
    figure(figures[3], model.get("consumers").length, "worker", "workers");
    write(note, model.get("note"));
    note.hidden = !model.get("note");
    workers.frame.hidden = !model.get("consumers").length;
    tick();
  }

  function tick() {
    // Before the kernel was heard, time stands still: this may be a saved notebook.
    const now = ahead === null ? model.get("now") : (Date.now() - ahead) / 1000;
    const age = (since) => span(Math.max(0, now - since));
    workers.fill(model.get("consumers"), "Workers; an idle one waits for questions, or is gone", (row, worker) => {
      const { name, pending, quiet } = worker;
      row.dataset.state = quiet ? "quiet" : pending ? "busy" : "idle";
      fillCells(row, [name, String(pending), quiet ? `Quiet for ${age(quiet)}` : pending ? "At work" : "Idle"]);
    });
    const prefix = model.get("prefix");
    const items = model.get("answers");
    answers.fill(items, items.length ? `Answers under “${prefix}”, newest first` : `No answers under “${prefix}”`, (row, item) => {
      const { asked, attempt, chunks, note, rate } = item;
      row.dataset.state = item.state;
      fillCells(row, [
        item.id,
        item.question,
        item.label,
        item.worker || UNKNOWN,
        chunks === null ? UNKNOWN : chunks.toLocaleString("en"),
        rate === null ? UNKNOWN : `${rate}/s`,
        asked === null ? UNKNOWN : age(asked),
      ]);
      annotate(row.cells[1], note);
      annotate(row.cells[2], attempt > 1 ? `attempt ${attempt}` : "");
    });
  }

  const heard = () => (ahead = Date.now() - 1000 * model.get("now"));
  model.on("change:now", heard);
  model.on("change", update);
  update();
  model.send({ want: "all" }); // and so the time
  const clock = setInterval(tick, 1000);
  return () => {
    clearInterval(clock);
    model.off("change:now", heard);
    model.off("change", update);
  };
}

export default { render };
