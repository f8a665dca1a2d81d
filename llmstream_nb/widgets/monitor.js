// Shows what the kernel has sampled; rows are updated in place.

import { make, say } from "../viewing/browser/elements.js";
import { watchKernel } from "./kernel.js";
import { bringIntoSight } from "./sight.js";

const COLUMNS = {
  worker: ["Worker", "Holds", "State"],
  answer: ["Answer", "Question", "State", "Worker", "Chunks", "Rate", "Age"],
};
const UNKNOWN = "–";
const NAMED = 3; // workers in the summary
const LATE = { silent: "Silent", gone: "Gone", quiet: "Quiet" }; // states that last for so long already

function figure(node, number, one, many = one) {
  say(node.firstChild, number === null ? "?" : number.toLocaleString("en"));
  say(node.lastChild, number === 1 ? one : many);
}

function span(seconds) {
  if (seconds < 100) return `${Math.floor(seconds)} s`;
  if (seconds < 6000) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}

// What is to be said of the workers of one state: "w1, w2 are gone".
function missed(workers, state) {
  const names = workers.filter((worker) => worker.state === state).map((worker) => worker.name);
  const more = names.length > NAMED ? ` and ${names.length - NAMED} more` : "";
  return names.length ? `${names.slice(0, NAMED).join(", ")}${more} ${names.length === 1 ? "is" : "are"} ${state}` : "";
}

function table(parent, kind) {
  // Wider than a small screen: then it scrolls by itself, with the keyboard too.
  const frame = make(parent, "div", { class: "llmstream-frame", role: "region", tabindex: 0 });
  const node = make(frame, "table", { class: `llmstream-${kind}s` });
  const caption = make(node, "caption");
  const head = make(make(node, "thead"), "tr");
  for (const title of COLUMNS[kind]) make(head, "th", { class: cellClass(title), scope: "col" }, title);
  const body = make(node, "tbody");
  return {
    frame,
    fill(rows, title, update) {
      say(caption, title);
      frame.setAttribute("aria-label", title);
      node.tHead.hidden = !rows.length;
      while (body.rows.length > rows.length) body.lastChild.remove();
      rows.forEach((row, at) => update(body.rows[at] ?? newRow(body, kind), row));
    },
  };
}

const cellClass = (title) => `llmstream-cell-${title.toLowerCase()}`;

function newRow(body, kind) {
  const row = make(body, "tr", { class: "llmstream-item" });
  COLUMNS[kind].forEach((title, at) => {
    const cell = make(row, at ? "td" : "th", { class: cellClass(title), ...(!at && { scope: "row" }) });
    // A foreign name in another direction of writing must not turn the row around.
    make(cell, "span", { class: title === "State" ? "llmstream-label" : "llmstream-text", dir: "auto" });
    make(cell, "span", { class: "llmstream-more", dir: "auto" });
  });
  return row;
}

// What the cells of a row say, and notes under it in some: [cell, note].
function fillRow(row, texts, ...notes) {
  texts.forEach((text, at) => show(row.cells[at].firstChild, text));
  notes.forEach(([at, note]) => show(row.cells[at].lastChild, note));
}

function show(node, text) {
  say(node, text);
  if (node.title !== text) node.title = text; // whole, where there is no room for it
}

function render({ model, el }) {
  el.classList.add("llmstream-monitor");
  bringIntoSight(el);
  const status = make(el, "p", { class: "llmstream-summary", role: "status" }); // read aloud when it changes, unlike the rows …
  const [waiting, answering, failures, pool] = [1, 2, 3, 4].map(() => {
    const node = make(status, "span", { class: "llmstream-figure", "aria-live": "off" }); // … and unlike these alone: a pool never rests
    make(node, "strong");
    node.append(" ");
    make(node, "span");
    return node;
  });
  const missing = make(status, "span", { class: "llmstream-missing", dir: "auto" });
  const note = make(status, "span", { class: "llmstream-trouble" });
  const kernel = watchKernel(model, status);
  const workers = table(el, "worker");
  const answers = table(el, "answer");
  let ahead = null; // milliseconds by which this browser's clock is ahead of the kernel's

  function update() {
    figure(waiting, model.get("waiting"), "question waiting", "questions waiting");
    figure(answering, model.get("answering"), "being answered");
    figure(failures, model.get("failures"), "given up");
    const all = model.get("consumers");
    figure(pool, all.filter((worker) => worker.state !== "gone").length, "worker", "workers");
    say(missing, [missed(all, "silent"), missed(all, "gone")].filter(Boolean).join("; "));
    say(note, model.get("note"));
    workers.frame.hidden = !all.length;
    tick();
  }

  function tick() {
    // Before the kernel was heard, time stands still: this may be a saved notebook.
    const now = ahead === null ? model.get("now") : (Date.now() - ahead) / 1000;
    const age = (since) => span(Math.max(0, now - since));
    workers.fill(model.get("consumers"), "Workers; an idle one waits for questions", (row, worker) => {
      const { name, pending, state, since } = worker;
      row.dataset.state = state;
      fillRow(row, [name, String(pending), LATE[state] ? `${LATE[state]} for ${age(since)}` : pending ? "At work" : "Idle"]);
    });
    const prefix = model.get("prefix");
    const items = model.get("answers");
    answers.fill(items, items.length ? `Answers under “${prefix}”, newest first` : `No answers under “${prefix}”`, (row, item) => {
      const { id, question, state, label, worker, chunks, rate, asked, note, attempt, first } = item;
      row.dataset.state = state;
      const counted = chunks === null ? UNKNOWN : chunks.toLocaleString("en");
      const pace = rate === null ? UNKNOWN : `${rate}/s`;
      const old = asked === null ? UNKNOWN : age(asked);
      const again = attempt > first ? `attempt ${attempt}` : "";
      fillRow(row, [id, question, label, worker || UNKNOWN, counted, pace, old], [1, note], [2, again]);
    });
  }

  const heard = () => (ahead = Date.now() - 1000 * model.get("now"));
  model.on("change:now", heard);
  model.on("change", update);
  update();
  model.send({ want: "all" }); // and so the time
  const clock = setInterval(() => kernel.lost || tick(), 1000);
  return () => {
    clearInterval(clock);
    kernel.close();
    model.off("change:now", heard);
    model.off("change", update);
  };
}

export default { render };
