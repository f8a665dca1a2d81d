// The page: what people see of an answer, and what they do: ask, stop, go back, send the link to others.

import { Answer, LABELS, OVER, address, call } from "./answer.js";
import { make, say } from "./elements.js";
import { Paper, figures } from "./paper.js";

const WITHOUT_STREAM = "Without stream: nothing is seen before all is there.";
const LOST = "The connection is lost. The text so far stands.";
const OFFLINE = "This device is offline. The text so far stands, and goes on once it is online again.";
const REFUSED = "No access";
const SILENCE = 20_000; // milliseconds; a phone that slept for longer may hold a dead connection
const LOOK = 5_000; // milliseconds between two looks at the answers that one has left

const TITLE = document.title;
const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
const paper = new Paper(ui.text, follow);
let answer = null; // the one that is shown
let busy = false; // a question is on its way
let notBefore = 0; // when the server takes the next one
let barred = ""; // why one may only read here
const others = new Map(); // answers that one has left while they ran: name and state by id

// -------------------------------------------------------------------------------------------- what is seen

function render() {
  const { id, question, state = "idle", live, running = false, lost, stopping = false, note, message, html } = answer ?? {};
  const label = lost ? "Reconnecting …" : state === "refused" ? REFUSED : (LABELS[state] ?? "");
  const name = question ?? answer?.record?.question ?? id;
  const stopFocused = document.activeElement === ui.stop;
  document.title = answer ? `${label} · ${name || TITLE}` : TITLE;
  say(ui.asked, answer ? name || TITLE : "The answer will stand here");
  ui.answer.dataset.state = lost ? "lost" : state;
  ui.head.hidden = !answer;
  ui.form.hidden = !!barred;
  ui.anew.hidden = !answer || !!barred;
  say(ui.state, label);
  say(ui.note, lost ? (navigator.onLine ? LOST : OFFLINE) : note);
  say(ui.trouble, answer ? message : barred);
  ui.again.hidden = !answer?.again;
  ui.bar.hidden = state !== "waiting";
  ui.text.ariaBusy = running;
  ui.copy.hidden = !id || state === "missing";
  ui.raw.hidden = !html;
  ui.raw.textContent = paper.html ? "As text" : "As Markdown";
  ui.stop.hidden = !live || !!barred;
  ui.stop.textContent = stopping ? "Stopping …" : "Stop";
  // Not `disabled`: that takes the keyboard away from a button.
  ui.stop.ariaDisabled = stopping;
  ui.ask.ariaDisabled = busy || running || performance.now() < notBefore;
  if (stopFocused && ui.stop.hidden) ui.ask.focus({ preventScroll: true });
  count();
}

function count() {
  if (!answer) return;
  const known = figures({ ...answer, ms: answer.clock, over: !answer.live });
  paper.tick(answer.running ? answer.clock : null);
  say(ui.figures, known.map((figure) => figure.replaceAll(" ", "\u00a0")).join(" · ")); // lines break between figures only
}

// The end of a growing text stays in sight, unless its reader has scrolled up.
let following = true;
let scrolled = 0;

function follow(draw) {
  draw();
  if (following && answer?.running) scrollTo(0, document.documentElement.scrollHeight);
}

function scrolling() {
  if (scrollY + innerHeight > document.documentElement.scrollHeight - 40) following = true;
  else if (scrollY < scrolled) following = false;
  scrolled = scrollY;
}

// ---------------------------------------------------------------------------------------- which answer

// Show another answer, or none.
function open(id, about) {
  answer?.leave();
  answer?.asking?.abort();
  if (answer?.live && answer.id) others.set(answer.id, { name: answer.question ?? answer.record?.question ?? answer.id });
  others.delete(id);
  list();
  answer = id === null ? null : new Answer(id, paper, render, about);
  if (!answer) paper.show([]);
  following = true;
  ui.link.hidden = true;
  render();
  if (answer) ui.answer.scrollIntoView();
  return answer;
}

async function openFromAddress() {
  const opened = open(new URLSearchParams(location.search).get("answer") || null);
  await opened?.check();
  if (opened !== answer || !opened?.record) return;
  ui.question.value ||= opened.record.question ?? "";
  ui.topic.value ||= opened.record.topic ?? "";
}

function list() {
  ui.others.replaceChildren();
  ui.others.hidden = !others.size;
  for (const [id, { name, state }] of others) {
    const row = make(ui.others, "p", {}, `${LABELS[state] ?? "Still running"}: `);
    make(row, "a", { href: address("", { answer: id }) }, name);
  }
}

// What has become of those that one has left: another stream for each would be too many for a browser.
async function look() {
  for (const [id, other] of others) {
    if (other.state) continue;
    const { status, record } = await call("GET", `answers/${encodeURIComponent(id)}`).catch((problem) => problem);
    if (status === 404) others.delete(id);
    if (OVER.includes(status)) other.state = record.reason === "cancelled" ? "stopped" : status;
    if (status === 404 || other.state) list();
  }
}

// To load the page anew would forget them.
function go(event) {
  const link = event.target.closest("#anew, #others a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  if (link === ui.anew) {
    ui.question.value = ui.prepared.value = "";
    ui.question.focus();
  }
  openFromAddress();
}

// Whoever was away goes on at once, on a new connection: the old one may be dead without anybody having noticed.
function goOn() {
  if (answer?.source && answer.live) answer.watch();
}

// ------------------------------------------------------------------------------------- what people do

function refuse({ message = "", wait = 0 } = {}) {
  notBefore = performance.now() + wait * 1000;
  setTimeout(render, wait * 1000 + 10);
  say(ui.refusal, message);
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
  if (!stream) open("", { question, asking, note: WITHOUT_STREAM });
  render();
  try {
    const asked = await call("POST", "answers", { body, signal: asking.signal });
    history.pushState(null, "", address("", { answer: asked.id }));
    const opened = open(asked.id, { question });
    if (stream) opened.watch();
    else opened.check(asked);
  } catch (problem) {
    if (problem.name !== "AbortError") refuse(problem);
    if (!stream) openFromAddress();
  }
  busy = false;
  render();
}

async function stop() {
  const stopped = answer;
  if (stopped.asking) return stopped.asking.abort();
  if (stopped.stopping) return;
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

function changeView() {
  paper.show(paper.parts, paper.html ? "" : answer.html);
  render();
}

async function loadSources() {
  try {
    const { sources, default: usual, prepared } = await call("GET", "sources");
    for (const { name, label, ready, note } of sources) {
      const option = new Option(ready ? label : `${label} (not ready)`, name, false, ready && name === usual);
      option.disabled = !ready;
      ui.source.append(option);
      if (!ready) make(ui.needs, "p", {}, note);
      ui.needs.hidden &&= ready;
    }
    ui.prepared.append(...prepared.map((question) => new Option(question)));
    offer();
  } catch (problem) {
    if (problem.status === 403) barred = problem.message;
    refuse(problem);
    if (problem.passing) setTimeout(loadSources, 2000);
  }
}

// Prepared answers are the scripted source's.
function offer() {
  ui.choice.hidden = ui.source.value !== "scripted";
}

// ------------------------------------------------------------------------------------------------------

ui.form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
ui.ask.disabled = false; // a click before now would send the form itself, and end the loading of this page
ui.form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
ui.prepared.addEventListener("change", () => (ui.question.value = ui.prepared.value || ui.question.value));
ui.source.addEventListener("change", offer);
ui.stop.addEventListener("click", stop);
ui.copy.addEventListener("click", copy);
ui.raw.addEventListener("click", changeView);
ui.again.addEventListener("click", () => answer.check());
addEventListener("click", go);
addEventListener("scroll", scrolling);
addEventListener("popstate", openFromAddress);
addEventListener("offline", render);
addEventListener("online", goOn);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && answer && performance.now() - answer.sign > SILENCE) goOn();
});
setInterval(() => answer?.running && count(), 100);
setInterval(() => answer?.listen(), 1000);
setInterval(look, LOOK);

if (/Mac|iP/.test(navigator.platform)) ui.keys.textContent = "⌘ ⏎";
ui.anew.href = address("");
loadSources();
openFromAddress();
