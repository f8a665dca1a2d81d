// One answer as the page follows it: over a connection that may break, from entry to entry, to its end and record.

import { partsOf } from "./paper.js";

export const LIVE = { waiting: "Waiting", streaming: "Streaming", interrupted: "Interrupted" };
export const LABELS = { ...LIVE, ended: "Complete", stopped: "Stopped", failed: "Failed", missing: "Not found" };
const NOTES = {
  queued: "Nobody has begun to answer yet.",
  interrupted: "Its producer died; the text so far stands.",
  silent: "Its worker {} is silent; another may take over.",
  takeover: "Attempt {}, by {}.",
  continued: "Attempt {}, by {}, goes on.",
  away: "Redis is away, trying again.",
  stopped: "The text so far is kept.",
  length: "Cut off: the answer reached the model's limit on length.",
  refusal: "The model refused.",
};
const HELP = {
  Unreachable: "The server can't be reached. If it was stopped, start it again.",
  NoToken: "The token in this page's address is missing or wrong. Open the whole link that the server gave; it may have a new one since it was started again.",
};
const isPassing = (status) => !status || status === 429 || status >= 500; // worth another try; 0: no reply
const PARTS = ["text", "reasoning", "refusal", "call", "result", "other"];
const KINDS = [...PARTS, "start", "continued", "gap", "state", "end", "failed", "alive"];
export const OVER = ["ended", "failed"]; // an answer of this status does not go on
const LONGEST = 30; // seconds between two tries
const SILENCE = 40_000; // milliseconds; the server says every 15 seconds that it is there

const areMissing = (count) => `${count.toLocaleString("en")} ${count === 1 ? "entry is" : "entries are"} missing`;
const fill = (words, ...values) => words.replace(/{}/g, () => values.shift());

// ---------------------------------------------------------------------------------------------- the server

class Problem extends Error {
  constructor(status, { error, message } = {}, wait = 0) {
    super(HELP[error] ?? message ?? `The server's reply has the status ${status}.`);
    Object.assign(this, { status, error, wait, passing: isPassing(status) }); // wait: seconds, from Retry-After
  }
}

// Relative, as behind a proxy the page lies in a folder; with the token, as an EventSource can't set headers.
export function address(path, query) {
  const token = new URLSearchParams(location.search).get("token");
  const url = new URL(path, location.origin + location.pathname);
  url.search = new URLSearchParams({ ...(token && { token }), ...query });
  return url.href;
}

export async function call(method, path, { query, body, signal } = {}) {
  const json = body && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let reply, data;
  try {
    reply = await fetch(address(path, query), { method, signal, ...json });
    if (reply.headers.get("Content-Type")?.includes("json")) data = await reply.json();
    else await reply.body?.cancel(); // a stream of events, or some proxy's page
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(0, { error: "Unreachable" });
  }
  if (!reply.ok) throw new Problem(reply.status, data, Number(reply.headers.get("Retry-After")) || 0);
  return data;
}

// -------------------------------------------------------------------------------------------- the answer

// IDs are <attempt>-<seq>: two integers of 64 bits.
function compare(id, other) {
  const [a, b] = [id, other].map((each) => (each || "0-0").split("-").map(BigInt));
  const order = a[0] - b[0] || a[1] - b[1];
  return order > 0n ? 1 : order < 0n ? -1 : 0;
}

export class Answer {
  state = "waiting"; // one of LABELS, or refused
  note = ""; // a sentence on it
  attempts = 1; // at this question, as far as was seen
  worker = ""; // who writes this one, if the pool does
  job = ""; // the entry in the pool's queue for which it is written
  takeover = ""; // words on it, where another worker began before
  current = false; // all that there was has come, so that what comes now is seen as it happens
  message = ""; // what went wrong
  html = ""; // the whole text as Markdown
  lost = false; // no connection at the moment
  tries = 0; // to get one, since something was last heard
  again = false; // whether people may try, too
  left = false; // nobody looks at it any more
  chunks = 0;
  firstPart = null; // milliseconds to the first part of any kind
  first = null; // and to the first token
  ms = 0; // milliseconds from the start, when something was last heard
  heard = performance.now();
  sign = performance.now(); // when anything came over the connection, or it was opened
  seen = ""; // ID of the last entry
  anew = true; // nothing with an ID of its own has come since the start
  gapAfter = null; // ID of the entry before the last gap

  constructor(id, paper, changed, about = {}) {
    Object.assign(this, { id, paper, changed, path: `answers/${encodeURIComponent(id)}`, ...about });
    paper.show([]);
  }

  get live() {
    return this.state in LIVE;
  }

  get running() {
    return this.live && this.state !== "interrupted";
  }

  // Milliseconds from the start to now, or to what was last heard.
  get clock() {
    const ticks = this.running && !this.lost && this.note !== NOTES.away;
    return ticks ? this.ms + performance.now() - this.heard : this.ms;
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
  }

  leave() {
    this.close();
    this.left = true;
  }

  // Look at the record: an ended answer is shown at once, and not as a film; any other is watched.
  async check(reply) {
    this.close();
    try {
      const shown = reply ?? (await call("GET", this.path));
      if (this.left) return;
      this.record = shown.record;
      // Its producer writes the record after the end: without a reason it lacks the figures.
      const written = shown.record.reason || shown.record.error || this.tries;
      if (OVER.includes(shown.status) && written) return this.settle(shown);
      // An EventSource keeps to itself why it was refused: ask again to learn it.
      if (this.tries) await call("GET", `${this.path}/events`, { query: { after: this.seen } });
      if (!this.left) this.watch();
    } catch (problem) {
      if (!this.left) this.fail(problem);
    }
  }

  watch() {
    this.close();
    const source = new EventSource(address(`${this.path}/events`, this.seen && { after: this.seen }));
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        this.sign = performance.now();
        if (kind !== "alive") this.take(kind, event.lastEventId, JSON.parse(event.data));
      });
    }
    source.onerror = () => {
      this.lost = true; // the browser comes back by itself, with Last-Event-ID, unless it was refused
      if (source.readyState === EventSource.CLOSED) this.checkAfter(this.tries && 2 ** this.tries);
      this.changed();
    };
    this.source = source;
    this.sign = performance.now();
  }

  // A connection may be dead without anybody having noticed.
  listen() {
    const open = this.live && this.source && this.source.readyState !== EventSource.CLOSED;
    if (!open || performance.now() - this.sign < SILENCE) return;
    this.lost = true;
    this.watch();
    this.changed();
  }

  checkAfter(seconds) {
    this.close();
    this.tries += 1;
    this.timer = setTimeout(() => this.check(), Math.min(seconds, LONGEST) * 1000);
  }

  fail({ status, error, message, wait, passing }) {
    if (["ForeignID", "BadEntryID"].includes(error)) return this.restart();
    Object.assign(this, { message, lost: passing, again: status !== 404 });
    if (passing) this.checkAfter(wait || 2 ** this.tries);
    else this.state = { 401: "refused", 403: "refused", 404: "missing" }[status] ?? "failed";
    this.changed();
  }

  restart() {
    Object.assign(this, { seen: "", anew: true, gapAfter: null, job: "", takeover: "", current: false });
    this.paper.show([]);
    this.watch();
  }

  // One event. Where several stand for one entry, only the last brings its ID, and the others that of the entry before.
  take(kind, id, data) {
    const news = id ? compare(id, this.seen) : 0;
    const part = PARTS.includes(kind);
    const known = { start: news < 0, continued: news <= 0, gap: this.gapAfter === this.seen };
    if (part) known[kind] = news <= 0 && !this.anew;
    if (known[kind]) return;
    Object.assign(this, { message: "", lost: false, again: false, tries: 0, heard: performance.now() });
    if (kind === "start" || kind === "continued") this.begin(kind, data);
    if (kind !== "state") this.note = this.takeover;
    if (kind === "start") {
      Object.assign(this, { state: "waiting", anew: true, gapAfter: null, chunks: 0 });
    } else if (kind === "continued") {
      Object.assign(this, { state: "streaming", chunks: 1 });
    } else if (part) {
      if (kind === "text") this.paper.add(data.text);
      else this.paper.add({ since: this.ms, name: data.kind, ...data, kind });
      if (kind === "text") this.first ??= data.ms;
      Object.assign(this, { state: "streaming", chunks: this.chunks + 1, firstPart: this.firstPart ?? data.ms, ms: data.ms });
      this.anew &&= news <= 0; // several parts of a record, in one piece each, have the ID of its end
    } else if (kind === "gap") {
      this.gapAfter = this.seen;
      this.paper.add({ gap: `[… ${areMissing(data.missing)} here]` });
    } else if (kind === "state") {
      this.note = NOTES[data.state] ?? this.takeover;
      if (data.state === "interrupted" && this.worker) this.note = fill(NOTES.silent, this.worker);
      if (data.state !== "away") this.current = true;
      if (data.state === "interrupted") this.state = data.state;
      else if (data.state !== "away") this.state = this.chunks ? "streaming" : "waiting";
    } else if (data.server && data.error === "Ahead") {
      this.restart(); // Redis has lost what this page has seen
    } else if (data.server && data.error === "Interrupted") {
      this.close();
      Object.assign(this, { state: "interrupted", message: data.message, again: true });
    } else {
      this.end(data);
      this.complete();
    }
    if (news > 0) this.seen = id;
    this.changed();
  }

  // An attempt. Its number alone tells no takeover: numbers count on where an id is used again.
  begin(kind, { attempt, worker = "", job = "" }) {
    const over = job && job === this.job;
    const words = kind === "start" ? NOTES.takeover : NOTES.continued;
    if (kind === "start" && over && this.current) this.paper.strike(this.worker);
    else if (kind === "start") this.paper.show([]);
    const takeover = over ? fill(words, attempt, worker || "another worker") : "";
    Object.assign(this, { worker, job, takeover, attempts: over ? this.attempts + 1 : 1, firstPart: null, first: null, ms: 0 });
  }

  // The end, as its event or its record tells it.
  end({ reason = "stop", error, message, first_part_ms: firstPart, first_token_ms: first, total_ms: ms, chunks }) {
    this.close();
    this.state = error ? "failed" : reason === "cancelled" ? "stopped" : "ended";
    this.message = error ? message || error : "";
    this.note = error || reason === "stop" ? "" : (NOTES[this.state] ?? NOTES[reason] ?? `The model gave the reason: ${reason}.`);
    Object.assign(this, { lost: false, chunks: chunks ?? this.chunks, first: first ?? this.first, ms: ms ?? this.ms });
    this.firstPart = firstPart ?? this.first;
    this.paper.draw();
  }

  // After the end, get the text as HTML, and what is missing here, once its producer has written the record.
  async complete() {
    for (let tries = 1; tries <= 6; tries++) {
      const shown = await call("GET", this.path).catch(() => ({}));
      if (this.left) return;
      const last = tries === 6 || !(this.paper.holed && shown.missing);
      if (OVER.includes(shown.status) && last) return this.settle(shown, true);
      await new Promise((done) => setTimeout(done, 200 * tries));
    }
    this.again = true; // it was not the answer that failed
    this.changed();
  }

  settle({ text, html, blocks, missing, record }, streamed = false) {
    if (!streamed) this.end(record);
    if (missing) this.note = `${areMissing(missing)}, lost or trimmed.`;
    Object.assign(this, { html, record, again: false });
    this.paper.show(streamed && (missing || !this.paper.holed) ? this.paper.parts : partsOf({ text, blocks }), html);
    this.changed();
  }
}
