// Draws a stream as the kernel sees it: a box for each entry, and beneath them a lane for each reader and each group.

import { make, say } from "../viewing/browser/elements.js";
import { watchKernel } from "./kernel.js";
import { bringIntoSight } from "./sight.js";

const FEW = 4; // more new entries than this at once go by without a movement
const WIDE = 7; // with fewer boxes than this, long IDs are shown whole
const LONGEST = 16; // characters in a box
const GHOSTS = { trimmed: 1200, deleted: 3000 }; // milliseconds for which an entry that is gone is still drawn
const MOST = 8; // of those
const HUES = 6;

const numbers = (id) => id.split("-").map(BigInt); // 64 bits each: more than a number in JavaScript holds
function compare(one, other) {
  const [a, b] = [numbers(one), numbers(other)];
  const at = a[0] === b[0] ? 1 : 0;
  return a[at] < b[at] ? -1 : Number(a[at] > b[at]);
}
const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

function initialize({ model }) {
  let asked = false; // for the whole state, which is then on its way
  const ask = () => {
    if (!asked) model.send({ want: "all" });
    asked = true;
  };
  model.on("msg:custom", ({ version, added, gone, marks }) => {
    const known = model.get("version");
    if (version <= known) return;
    if (version > known + 1) return ask();
    const old = new Set([...gone, ...added.map(([id]) => id)]);
    const entries = [...model.get("entries").filter(([id]) => !old.has(id)), ...added];
    entries.sort(([one], [other]) => compare(one, other));
    model.set({ entries, marks: { ...model.get("marks"), ...marks }, version });
  });
  model.on("change:version", () => (asked = false));
  ask(); // for what was sent while this page was being loaded
}

// ---------------------------------------------------------------------------------------- what is to be drawn

// Only the kit's own entries tell by their IDs, <attempt>-<number>, what is missing and what counts no more.
const isKit = ({ id, kind }) => kind && id.indexOf("-") < 10;

function cellsOf(entries) {
  const cells = [];
  let newest = 0n;
  let valid = 0n; // attempts from this one on
  for (const [id, kind, text, by] of entries) {
    const cell = { id, kind, text, by };
    if (isKit(cell)) {
      const [attempt, seq] = numbers(id);
      const before = cells.at(-1);
      if (before && isKit(before)) {
        const [other, last] = numbers(before.id);
        const due = other === attempt ? last + 1n : 0n;
        if (due < seq) {
          const [from, to] = [`${attempt}-${due}`, `${attempt}-${seq - 1n}`];
          cells.push({ id: from, kind: "missing", text: "missing", until: to, by: "" });
        }
      }
      if (attempt > newest && kind !== "end" && kind !== "error") { // an end from outside voids nothing
        if (kind !== "start" || !/"continues"\s*:/.test(text)) valid = attempt; // else it goes on from the one before
        newest = attempt;
      }
    }
    cells.push(cell);
  }
  for (const cell of cells) cell.voided = isKit(cell) && numbers(cell.id)[0] < valid;
  return cells;
}

// An ID that is a time: its end is what differs.
const brief = (id, whole) => (whole || id.length < 11 ? id : `…${id.slice(id.indexOf("-") - 5)}`);

const SIGNS = { " ": "·", "\n": "↵", "\r": "␍", "\t": "⇥" };
// The text with its spaces and control characters visible; never anything but text.
function spell(node, text) {
  node.textContent = "";
  const start = [...text.slice(0, 4 * LONGEST)];
  const shown = start.slice(0, LONGEST).join("") + (start.length > LONGEST ? "…" : "");
  for (const part of shown.split(/([\0-\x20\x7f]+)/).filter(Boolean)) {
    const signs = part.replace(/[\0-\x20\x7f]/g, (sign) => SIGNS[sign] ?? (sign === "\x7f" ? "␡" : String.fromCharCode(0x2400 + sign.charCodeAt(0))));
    make(node, signs === part ? "span" : "i", {}, signs);
  }
}

// A name in so much room; its end is what tells worker-1 from worker-2.
function squeeze(name, room) {
  return name.length <= room ? name : `${name.slice(0, Math.max(1, room - 4))}…${name.slice(-2)}`;
}

// ------------------------------------------------------------------------------------------------------- the view

function render({ model, el }) {
  el.classList.add("llmstream-stream");
  bringIntoSight(el);
  const kernel = watchKernel(model, make(el, "p", { class: "llmstream-lost", role: "status" }));
  const head = make(el, "div", { class: "llmstream-stream-head" });
  const name = make(head, "code");
  const figures = make(head, "span", { class: "llmstream-stream-figures" });
  const note = make(el, "p", { class: "llmstream-stream-note", role: "status" }); // read aloud, unlike each entry
  const frame = make(el, "div", { class: "llmstream-stream-frame" });
  const sight = make(frame, "div", { class: "llmstream-stream-sight", role: "img", tabindex: 0 });
  const track = make(sight, "div", { class: "llmstream-stream-track" });
  const row = make(track, "div", { class: "llmstream-stream-row" });
  const under = make(track, "div", { class: "llmstream-stream-lanes" });
  const earlier = make(frame, "span", { class: "llmstream-stream-earlier" });
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  const boxes = new Map(); // ID -> its box
  const lanes = new Map(); // what it is of, and its name -> the lane
  const hues = new Map(); // consumer, or value of the field that colours -> number of the colour
  let drawn = []; // the cells of the last drawing, those of entries that are gone among them
  let last = "0-0"; // the stream's last ID then
  let known = false; // something was drawn before, if only that there is nothing
  let due = 0; // the frame in which the next drawing is
  let later = 0; // the timer that ends a ghost
  let follows = true; // it stays at the end, unless the reader has scrolled away
  let placed = 0; // how far it was scrolled by the last drawing

  const hue = (value) => hues.get(value) ?? hues.set(value, hues.size % HUES).get(value);
  const soon = () => (due ||= requestAnimationFrame(draw));

  // What was drawn and is gone, for a moment: trimmed from the beginning, or deleted.
  function ghosts(cells, { first, length, last: now }) {
    const there = new Set(cells.map(({ id }) => id));
    const time = performance.now();
    const found = [];
    if (now && compare(now, last) < 0) return found; // the key was made anew
    for (const cell of drawn) {
      if (there.has(cell.id) || cell.kind === "missing") continue;
      const trimmed = !length || (first && compare(cell.id, first) < 0);
      if (!trimmed && (!cells.length || compare(cell.id, cells[0].id) < 0)) continue; // it has only gone by
      const covered = cells.some(({ id, until }) => until && compare(id, cell.id) <= 0 && compare(cell.id, until) <= 0);
      const gone = trimmed ? "trimmed" : "deleted";
      const ends = cell.ends ?? time + GHOSTS[gone];
      if (!covered && ends > time) found.push({ ...cell, gone, ends });
    }
    return found.slice(-MOST);
  }

  function fill(box, cell, whole) {
    const signs = JSON.stringify([cell, whole]);
    if (box.signs === signs) return;
    box.signs = signs;
    const { id, kind, text, by, voided, gone, until } = cell;
    const ids = until && until !== id ? `${brief(id, whole)} … ${brief(until, whole)}` : brief(id, whole);
    say(box.children[0], ids);
    const label = kind && kind !== "text" && kind !== "missing" ? kind : text;
    spell(box.children[1], label);
    say(box.children[2], by.slice(0, 8));
    Object.assign(box.dataset, { kind: kind || "text", gone: gone ?? "", voided: Boolean(voided), hue: by ? hue(by) : "" });
    box.title = [...new Set([until ?? id, kind, by, text])].filter(Boolean).join("\n");
  }

  function draw() {
    due = 0;
    const [entries, marks] = [model.get("entries"), model.get("marks")];
    let cells = cellsOf(entries);
    const dead = ghosts(cells, marks);
    cells = [...cells, ...dead];
    if (dead.length) cells.sort((one, other) => compare(one.id, other.id));
    last = marks.last ?? "0-0";

    const anchor = boxes.get(drawn.at(-1)?.id);
    const before = anchor?.getBoundingClientRect().left;
    const fresh = cells.filter(({ id }) => !boxes.has(id)).length;
    const moves = known && fresh <= FEW && !calm.matches;
    const wanted = new Set(cells.map(({ id }) => id));
    for (const [id, box] of boxes) {
      if (!wanted.has(id)) {
        box.remove();
        boxes.delete(id);
      }
    }
    const whole = cells.length < WIDE;
    let next = row.firstChild;
    for (const cell of cells) {
      let box = boxes.get(cell.id);
      if (!box) {
        box = make(row, "span", { class: moves ? "llmstream-box llmstream-new" : "llmstream-box" });
        for (const part of ["id", "words", "by"]) make(box, "span", { class: `llmstream-box-${part}` });
        boxes.set(cell.id, box);
      }
      fill(box, cell, whole);
      if (box === next) next = box.nextSibling;
      else row.insertBefore(box, next);
    }
    drawn = cells;
    track.dataset.more = marks.length > entries.length;
    track.dataset.lanes = Boolean(marks.readers?.length || marks.groups?.length);
    known = "length" in marks;
    if (follows) sight.scrollLeft = track.offsetWidth - sight.clientWidth; // scrollWidth counts what moves, too
    placed = sight.scrollLeft;
    if (moves && anchor?.isConnected) {
      const by = before - anchor.getBoundingClientRect().left;
      if (by) track.animate([{ transform: `translateX(${by}px)` }, { transform: "none" }], { duration: 200, easing: "ease-out" });
    }

    clearTimeout(later);
    if (dead.length) later = setTimeout(soon, Math.min(...dead.map(({ ends }) => ends)) - performance.now());
    say(name, model.get("key"));
    say(note, marks.note);
    place();
    tell(entries, marks);
  }

  // ----------------------------------------------------------------------------------------- beneath the boxes

  // Where things are, which changes also while somebody scrolls.
  function place() {
    const { length = 0, readers = [], groups = [] } = model.get("marks");
    const spots = drawn.map((cell) => {
      const { offsetLeft, offsetWidth } = boxes.get(cell.id);
      return { ...cell, left: offsetLeft, right: offsetLeft + offsetWidth };
    });
    const alive = spots.filter(({ gone, kind }) => !gone && kind !== "missing");
    const hidden = alive.filter(({ left }) => left < sight.scrollLeft - 2).length;
    const before = length - alive.length + hidden;
    say(earlier, before > 0 ? `◂ ${before.toLocaleString("en")} earlier` : "");

    const used = new Set();
    for (const [who, at, skipped] of readers) {
      const parts = skipped.map(([from, to]) => {
        const over = spots.filter(({ id }) => compare(from, id) < 0 && compare(id, to) <= 0);
        return { ...span(over), key: to, text: "skipped", kind: "skipped", title: `${who} never asked for these` };
      });
      used.add(lane("reader", who, at, "", parts, spots));
    }
    for (const { name: who, at, pending, held } of groups) {
      used.add(lane("group", who, at, pending ? `${pending.toLocaleString("en")} pending` : "", runs(held, spots), spots));
    }
    for (const [key, node] of lanes) {
      if (!used.has(key)) {
        node.remove();
        lanes.delete(key);
      }
    }
  }

  const span = (over) => ({ left: over[0]?.left, right: over.at(-1)?.right });

  // Neighbours that are pending with the same consumer, as one part.
  function runs(held, spots) {
    const by = new Map(held.map(([id, consumer, times]) => [id, { consumer, times }]));
    const parts = [];
    const before = new Map(); // what was the same so often: a run keeps its part while it moves
    let open = null;
    for (const spot of spots) {
      const with_ = by.get(spot.id);
      if (!with_) open = null;
      else if (open?.consumer === with_.consumer && open.times === with_.times) open.right = spot.right;
      else {
        const { consumer, times } = with_;
        const often = times > 1 ? ` ×${times}` : "";
        const same = consumer + often;
        before.set(same, (before.get(same) ?? 0) + 1);
        const title = `pending with ${consumer}, delivered ${count(times, "time", "times")}`;
        parts.push((open = { ...with_, ...span([spot]), key: `${before.get(same)} ${same}`, text: same, title, kind: "held", hue: hue(consumer) }));
      }
    }
    return parts;
  }

  function lane(kind, who, at, more, parts, spots) {
    const key = `${kind} ${who}`;
    let node = lanes.get(key);
    if (!node) {
      node = make(under, "div", { class: "llmstream-lane" });
      node.dataset.kind = kind;
      make(node, "span", { class: "llmstream-lane-read" });
      const mark = make(node, "span", { class: "llmstream-lane-mark" });
      make(mark, "strong");
      make(mark, "span");
      node.parts = new Map();
      lanes.set(key, node);
    }
    const [read, mark] = node.children;
    const passed = spots.filter(({ id, gone }) => !gone && compare(id, at) <= 0);
    const edge = passed.length ? passed.at(-1).right + 3 : (spots[0]?.left ?? 12) - 3; // the gap behind it
    const x = Math.max(edge, sight.scrollLeft + 14);
    mark.style.transform = `translateX(${x}px)`;
    mark.style.maxWidth = `${track.clientWidth - x}px`;
    read.style.width = `${Math.max(0, x - 8)}px`;
    say(mark.children[0], who);
    const far = passed.length || at === "0-0" ? "" : `after ${brief(at)}`; // out of sight
    say(mark.children[1], [far, more].filter(Boolean).join(" · "));
    mark.title = `${kind} ${who}: ${kind === "group" ? "was given" : "has read"} up to ${at}`;
    const seen = parts.filter(({ left }) => left !== undefined);
    const keys = new Set(seen.map((part) => part.key));
    for (const [part, chip] of node.parts) {
      if (!keys.has(part)) {
        chip.remove();
        node.parts.delete(part);
      }
    }
    for (const { key: part, left, right, text, title, kind: what, hue: tint } of seen) {
      const chip = node.parts.get(part) ?? make(node, "span", { class: "llmstream-lane-part", "data-kind": what, "data-hue": tint ?? "" });
      node.parts.set(part, chip);
      Object.assign(chip.style, { left: `${left}px`, width: `${right - left}px` });
      say(chip, what === "held" ? squeeze(text, (right - left - 10) / 8) : text); // the narrowest box has room for `skipped`
      chip.title = title;
    }
    return key;
  }

  // The same in words.
  function tell(entries, { length = 0, last: newest, gone, readers = [], groups = [] }) {
    const words = [count(length, "entry", "entries")];
    if (gone) words.push(`${gone.toLocaleString("en")} trimmed or deleted`);
    if (newest && compare(newest, entries.at(-1)?.[0] ?? "0-0") > 0) words.push(`last ID ${newest}`);
    say(figures, words.join(" · "));
    const all = [`Stream ${model.get("key")}: ${words.join(", ")}`];
    if (entries.length) all.push(`newest ${entries.at(-1)[0]}: ${entries.at(-1)[2].slice(0, 80)}`);
    for (const [who, at] of readers) all.push(`reader ${who} after ${at}`);
    for (const { name: who, at, pending } of groups) all.push(`group ${who} after ${at}, ${pending} pending`);
    sight.setAttribute("aria-label", all.join("; "));
  }

  draw();
  model.on("change", soon);
  sight.addEventListener("scroll", () => {
    if (Math.abs(sight.scrollLeft - placed) > 1) follows = sight.scrollLeft + sight.clientWidth > track.offsetWidth - 20;
    place();
  });
  const resized = new ResizeObserver(soon);
  resized.observe(sight);
  return () => {
    kernel.close();
    cancelAnimationFrame(due);
    clearTimeout(later);
    resized.disconnect();
    model.off("change", soon);
  };
}

export default { initialize, render };
