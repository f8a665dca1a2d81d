// The page: asks a question, watches its answer, and stops it. What a model wrote goes into text nodes; only `html`,
// which the server has sanitised, becomes elements.

const LIVE = { waiting: "Waiting", streaming: "Streaming", interrupted: "Interrupted" };
const LABELS = { ...LIVE, ended: "Complete", stopped: "Stopped", failed: "Failed", missing: "Not found" };
const NOTES = {
  queued: "Nobody has begun to answer yet.",
  interrupted: "Its producer died. The text so far stands, and goes on if another producer takes over.",
  away: "Redis is away, trying again.",
  cancelled: "The text so far is kept.",
  length: "Cut off: the answer reached the model's limit on length.",
  whole: "Without stream: nothing is seen before all is there.",
  lost: "The connection is lost. The text so far stands.",
  offline: "This device is offline. The text so far stands, and goes on once it is online again.",
};
const HELP = {
  0: "The server can't be reached. If it was stopped, start it again.",
  401: "The token in this page's address is missing or wrong. Open the whole link that the server gave; after each start it is a new one.",
};
const PASSING = [0, 429, 502, 503, 504]; // HTTP statuses that are worth another try; 0: no reply
const OVER = ["ended", "failed"]; // an answer of this status does not go on
const SILENCE = 20_000; // milliseconds; a phone that slept for longer may hold a dead connection

const TITLE = document.title;
const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
const seconds = (ms, digits) => `${(ms / 1000).toFixed(digits)}\u00a0s`; // no line break within a figure
const areMissing = (count) => `${count.toLocaleString("en")} ${count === 1 ? "entry is" : "entries are"} missing`;
let answer = null; // the one that is shown

// ---------------------------------------------------------------------------------------------- the server

class Problem extends Error {
  constructor(status, { error, message } = {}, wait = 0) {
    super(HELP[status] ?? message ?? `The server's reply has the status ${status}.`);
    Object.assign(this, { status, error, wait }); // wait: seconds, from Retry-After
  }
}

// Relative, as behind a proxy the page lies in a folder; with the token, as an EventSource can't set headers.
function address(path, query) {
  const token = new URLSearchParams(location.search).get("token");
  const url = new URL(path, location.origin + location.pathname);
  url.search = new URLSearchParams({ ...(token && { token }), ...query });
  return url.href;
}

async function call(method, path, { query, body, signal } = {}) {
  const json = body && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let reply, data;
  try {
    reply = await fetch(address(path, query), { method, signal, ...json });
    if (reply.headers.get("Content-Type")?.includes("json")) data = await reply.json();
    else await reply.body?.cancel(); // a stream of events, or some proxy's page
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(0);
  }
  if (!reply.ok) throw new Problem(reply.status, data, Number(reply.headers.get("Retry-After")) || 0);
  return data;
}

// ------------------------------------------------------------------------------------------------ the text

const paper = {
  parts: [], // pieces of text, and between them numbers: so many entries are missing there
  drawn: 0, // so many of the parts are in the page
  tail: null, // the text node that grows
  frame: 0,

  get holed() {
    return this.parts.some((part) => typeof part === "number");
  },
  add(part) {
    this.parts.push(part);
    this.frame ||= requestAnimationFrame(() => this.draw());
  },
  show(parts, html = "") {
    ui.text.replaceChildren();
    Object.assign(this, { parts, drawn: 0, tail: null });
    ui.text.classList.toggle("markdown", Boolean(html));
    ui.text.hidden = !html;
    if (html) ui.text.innerHTML = html;
    else this.draw();
  },
  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    for (const part of this.parts.slice(this.drawn)) {
      if (typeof part === "number") {
        ui.text.appendChild(document.createElement("mark")).textContent = `[… ${areMissing(part)} here]`;
        this.tail = null;
      } else {
        for (const line of part.match(/[^\n]*\n|[^\n]+/g) ?? []) this.write(line);
      }
    }
    this.drawn = this.parts.length;
    ui.text.hidden = !this.drawn;
    if (following && answer?.running) scrollTo(0, document.documentElement.scrollHeight);
  },
  write(line) {
    // Some lines per block: the browser lays out all of a block again when it grows.
    if (!this.tail || (this.tail.length > 2000 && this.tail.data.endsWith("\n"))) {
      this.tail = ui.text.appendChild(document.createElement("div")).appendChild(new Text());
    }
    this.tail.appendData(line);
  },
};

let following = true; // the end of a growing text stays in sight, unless its reader has scrolled up
let scrolled = 0;
addEventListener("scroll", () => {
  if (scrollY + innerHeight > document.documentElement.scrollHeight - 40) following = true;
  else if (scrollY < scrolled) following = false;
  scrolled = scrollY;
});

// ---------------------------------------------------------------------------------------------- one answer

// IDs are <attempt>-<seq>: two integers.
function compare(id, other) {
  const [a, b] = [id, other].map((each) => (each || "0-0").split("-").map(Number));
  return a[0] - b[0] || a[1] - b[1];
}

class Answer {
  state = "waiting"; // one of LABELS
  note = ""; // a sentence on it
  message = ""; // what went wrong
  html = ""; // the whole text as Markdown
  lost = false; // no connection at the moment
  tries = 0; // to connect, since something was last heard
  again = false; // whether people may try, too
  chunks = 0;
  first = null; // milliseconds to the first token
  ms = 0; // milliseconds from the start, when something was last heard
  heard = performance.now();
  seen = ""; // ID of the last entry
  anew = true; // no text has come since the start
  gapAfter = null; // ID of the entry before the last gap

  constructor(id, question = "") {
    Object.assign(this, { id, question, path: `answers/${encodeURIComponent(id)}` });
    following = true;
    paper.show([]);
  }

  get running() {
    return this.state in LIVE && this.state !== "interrupted";
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
  }

  // Look at the record: an ended answer is shown at once, and not as a film; any other is watched.
  async check() {
    this.close();
    try {
      const shown = await call("GET", this.path);
      if (this !== answer) return;
      this.question = shown.record.question ?? "";
      ui.question.value ||= this.question;
      ui.topic.value ||= shown.record.topic ?? "";
      // Its producer writes the record after the end: without a reason it lacks the figures.
      const { reason, error } = shown.record;
      if (OVER.includes(shown.status) && (reason || error || this.tries)) return this.settle(shown);
      // An EventSource keeps to itself why it was refused: ask again to learn it.
      if (this.tries) await call("GET", `${this.path}/events`, { query: { after: this.seen } });
      if (this === answer) this.watch();
    } catch (problem) {
      if (this === answer) this.fail(problem);
    }
  }

  watch() {
    this.close();
    this.source = new EventSource(address(`${this.path}/events`, this.seen && { after: this.seen }));
    for (const kind of ["start", "text", "gap", "state", "end", "failed"]) {
      this.source.addEventListener(kind, (event) => this.take(kind, event.lastEventId, JSON.parse(event.data)));
    }
    this.source.onerror = () => {
      this.lost = true; // the browser comes back by itself, with Last-Event-ID, unless it was refused
      if (this.source.readyState === EventSource.CLOSED) this.checkLater(this.tries && 2 ** this.tries);
      render();
    };
  }

  checkLater(wait) {
    this.close();
    this.tries += 1;
    this.timer = setTimeout(() => this.check(), Math.min(wait, 30) * 1000);
  }

  fail({ status, error, message, wait }) {
    if (["ForeignID", "BadEntryID"].includes(error)) return this.restart();
    Object.assign(this, { message, again: status !== 404, lost: PASSING.includes(status) });
    if (this.lost) this.checkLater(wait || 2 ** this.tries);
    else this.state = status === 404 ? "missing" : "failed";
    render();
  }

  restart() {
    Object.assign(this, { seen: "", anew: true, gapAfter: null });
    paper.show([]);
    this.watch();
  }

  // One event. Where several stand for one entry, only the last brings its ID, and the others that of the entry before.
  take(kind, id, data) {
    const news = id ? compare(id, this.seen) : 0;
    const known = { start: news < 0, text: news <= 0 && !this.anew, gap: this.gapAfter === this.seen && !this.anew };
    if (known[kind]) return;
    Object.assign(this, { message: "", lost: false, again: false, tries: 0, heard: performance.now() });
    if (kind !== "state") this.note = "";
    if (kind === "start") {
      Object.assign(this, { state: "waiting", anew: true, gapAfter: null, chunks: 0, first: null, ms: 0 });
      paper.show([]);
    } else if (kind === "text") {
      this.chunks += 1;
      Object.assign(this, { state: "streaming", anew: false, first: this.first ?? data.ms, ms: data.ms });
      paper.add(data.text);
    } else if (kind === "gap") {
      this.gapAfter = this.seen;
      paper.add(data.missing);
    } else if (kind === "state") {
      this.note = NOTES[data.state] ?? "";
      if (data.state === "interrupted") this.state = data.state;
      else if (data.state !== "away") this.state = this.chunks ? "streaming" : "waiting";
    } else if (data.error === "Ahead") {
      this.restart(); // Redis has lost what this page has seen
    } else if (data.error === "Interrupted") {
      this.close();
      Object.assign(this, { state: "interrupted", message: data.message, again: true });
    } else {
      this.end(data);
      this.complete();
    }
    if (news > 0) this.seen = id;
    render();
  }

  // The end, as its event or its record tells it.
  end({ reason = "stop", error, message, first_token_ms: first, total_ms: ms, chunks }) {
    this.close();
    this.state = error ? "failed" : reason === "cancelled" ? "stopped" : "ended";
    this.message = error ? message || error : "";
    this.note = error || reason === "stop" ? "" : NOTES[reason] ?? `The model gave the reason: ${reason}.`;
    Object.assign(this, { lost: false, chunks: chunks ?? this.chunks, first: first ?? this.first, ms: ms ?? this.ms });
    paper.draw();
  }

  // After the end, get the text as HTML, and what is missing here, once its producer has written the record.
  async complete() {
    for (let tries = 1; tries <= 6; tries++) {
      const shown = await call("GET", this.path).catch(() => ({}));
      if (this !== answer) return;
      if (OVER.includes(shown.status) && !(paper.holed && shown.missing && tries < 6)) return this.settle(shown, true);
      await new Promise((done) => setTimeout(done, 200 * tries));
    }
    this.again = true; // it was not the answer that failed
    render();
  }

  settle({ text, html, missing, record }, streamed = false) {
    if (!streamed) this.end(record);
    if (missing) this.note = `${areMissing(missing)}, lost or trimmed.`;
    this.html = html;
    paper.show(streamed && (missing || !paper.holed) ? paper.parts : [text], html);
    if (!streamed) ui.answer.scrollIntoView();
    render();
  }
}

// -------------------------------------------------------------------------------------- what is seen of it

let busy = false; // a question is on its way
let notBefore = 0; // when the server takes the next one

function say(node, words = "") {
  if (node.textContent !== words) node.textContent = words; // else a screen reader says it again
  node.hidden = !words;
}

function render() {
  const { running = false, state = "idle", lost, stopping, note, message, question, id, html } = answer ?? {};
  const label = lost ? "Reconnecting …" : (LABELS[state] ?? "");
  const focused = document.activeElement;
  document.title = answer ? `${label} · ${question || TITLE}` : TITLE;
  ui.answer.dataset.state = lost ? "lost" : state;
  say(ui.asked, answer ? question || id || TITLE : "The answer will stand here");
  ui.head.hidden = ui.anew.hidden = !answer;
  say(ui.state, label);
  say(ui.note, lost ? (navigator.onLine ? NOTES.lost : NOTES.offline) : note);
  say(ui.trouble, message);
  ui.again.hidden = !answer?.again;
  ui.bar.hidden = state !== "waiting";
  ui.text.ariaBusy = running;
  ui.copy.hidden = !id || state === "missing";
  ui.raw.hidden = !html;
  ui.raw.textContent = ui.text.classList.contains("markdown") ? "As text" : "As Markdown";
  ui.stop.hidden = !(state in LIVE);
  ui.stop.ariaDisabled = Boolean(stopping); // not `disabled`: that takes the keyboard away from it
  ui.stop.textContent = stopping ? "Stopping …" : "Stop";
  ui.ask.ariaDisabled = busy || running || performance.now() < notBefore;
  if (focused === ui.stop && ui.stop.hidden) ui.ask.focus({ preventScroll: true });
  count();
}

function count() {
  if (!answer) return;
  const { running, lost, state, note, chunks, first, ms, heard } = answer;
  const now = running && !lost && note !== NOTES.away ? ms + performance.now() - heard : ms;
  const parts = [];
  if (first !== null) parts.push(`${chunks.toLocaleString("en")} chunk${chunks === 1 ? "" : "s"}`, `first token\u00a0${seconds(first, 2)}`);
  if (now) parts.push(`${state in LIVE ? "" : "total\u00a0"}${seconds(now, 1)}`);
  say(ui.figures, parts.join(" · "));
}
setInterval(() => answer?.running && count(), 100);

// ---------------------------------------------------------------------------------------- what people do

function refuse({ message = "", wait = 0 } = {}) {
  notBefore = performance.now() + wait * 1000;
  setTimeout(render, wait * 1000 + 10);
  say(ui.refusal, message);
}

function open(next) {
  answer?.close();
  answer?.asking?.abort();
  answer = next;
  ui.link.hidden = true;
  if (!answer) paper.show([]);
  render();
  if (answer) ui.answer.scrollIntoView({ block: "nearest" });
  return answer;
}

function openFromAddress() {
  const id = new URLSearchParams(location.search).get("answer");
  open(id ? new Answer(id) : null)?.check();
}

async function ask() {
  const question = ui.question.value.trim();
  const stream = !ui.whole.checked;
  if (ui.ask.ariaDisabled === "true") return;
  if (!question) return refuse({ message: "The question is empty: type one." });
  const body = { question, topic: ui.topic.value.trim() || null, source: ui.source.value || null, stream };
  const asking = new AbortController(); // once it is dropped, the server stops an answer without stream
  refuse();
  busy = true;
  if (!stream) Object.assign(open(new Answer("", question)), { asking, note: NOTES.whole });
  render();
  try {
    const asked = await call("POST", "answers", { body, signal: asking.signal });
    history.pushState(null, "", address("", { answer: asked.id }));
    const made = open(new Answer(asked.id, question));
    if (stream) made.watch();
    else made.settle(asked);
  } catch (problem) {
    if (problem.name !== "AbortError") refuse(problem);
    if (!stream) openFromAddress();
  } finally {
    busy = false;
    render();
  }
}

async function stop() {
  const stopped = answer;
  if (stopped.stopping) return;
  if (stopped.asking) return stopped.asking.abort();
  stopped.stopping = true;
  refuse();
  render();
  try {
    const { status } = await call("DELETE", stopped.path);
    if (!OVER.includes(status)) refuse({ message: "It could not be stopped yet: try again." });
    else if (stopped === answer && stopped.source?.readyState !== EventSource.OPEN) stopped.check();
  } catch (problem) {
    refuse(problem);
  }
  stopped.stopping = false;
  render();
}

async function copy() {
  try {
    await navigator.clipboard.writeText(location.href);
    ui.copy.textContent = "Copied";
    setTimeout(() => (ui.copy.textContent = "Copy link"), 2000);
  } catch {
    ui.link.hidden = false; // forbidden here, as in some frames: let people copy it by hand
    ui.link.value = location.href;
    ui.link.select();
  }
}

const offer = () => (ui.choice.hidden = ui.source.value !== "scripted");

async function loadSources() {
  try {
    const { sources, default: usual, prepared } = await call("GET", "sources");
    for (const { name, label, ready, note } of sources) {
      const option = new Option(ready ? label : `${label} (not ready)`, name, false, ready && name === usual);
      option.disabled = !ready;
      ui.source.append(option);
      if (!ready) ui.needs.appendChild(document.createElement("p")).textContent = note;
      ui.needs.hidden &&= ready;
    }
    ui.prepared.append(...prepared.map((question) => new Option(question)));
    offer();
  } catch (problem) {
    refuse(problem);
    if (PASSING.includes(problem.status)) setTimeout(loadSources, 2000);
  }
}

ui.form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
ui.form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
ui.prepared.addEventListener("change", () => (ui.question.value = ui.prepared.value || ui.question.value));
ui.source.addEventListener("change", offer);
ui.stop.addEventListener("click", stop);
ui.copy.addEventListener("click", copy);
ui.again.addEventListener("click", () => answer.check());
ui.raw.addEventListener("click", () => {
  paper.show(paper.parts, ui.text.classList.contains("markdown") ? "" : answer.html);
  render();
});

// Whoever was away goes on at once, on a new connection: the old one may be dead without anybody having noticed.
const goOn = () => answer?.source && answer.state in LIVE && answer.watch();
addEventListener("popstate", openFromAddress);
addEventListener("offline", render);
addEventListener("online", goOn);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && answer && performance.now() - answer.heard > SILENCE) goOn();
});

if (/Mac|iP/.test(navigator.platform)) ui.keys.textContent = "⌘ ⏎";
ui.anew.href = address("");
loadSources();
openFromAddress();
