// What stands between the text of an answer: what was thought, refused, called and given back. All of it as text nodes.

import { make } from "./elements.js";

const BEGINNING = 300; // characters in sight of what is folded
const FEW = 4; // lines that are not yet folded

// How long reasoning took; or, `now` milliseconds after the attempt's start, that it goes on.
export function thought({ since, ms }, now) {
  const time = Math.max(0, (now ?? ms) - since);
  const seconds = `${(time / 1000).toFixed(time < 1000 ? 1 : 0)} s`;
  return now === null ? `Thought for ${seconds}` : `Thinking … ${seconds}`;
}

// The text; of a long one its beginning, and all of it where that is unfolded.
function fold(parent, text) {
  if (text.length <= BEGINNING && text.split("\n").length <= FEW) return make(parent, "code", {}, text);
  const whole = make(parent, "details");
  make(make(whole, "summary"), "code", {}, `${text.split("\n", 1)[0].slice(0, BEGINNING)} …`);
  return make(whole, "code", {}, text);
}

function sayRest(parent, { more, cut }) {
  if (more) make(parent, "p", { class: "llmstream-quiet" }, `[${more.toLocaleString("en")} more characters are not shown]`);
  if (cut) make(parent, "p", { class: "llmstream-quiet" }, `[${cut.toLocaleString("en")} more characters were left out of the stream]`);
}

// Puts a block into `parent`, and returns it; beside it what a growing text is written into, and a heading that tells time.
export function makeBlock(parent, part) {
  const block = make(parent, part.kind === "reasoning" ? "details" : "section", { class: `llmstream-${part.kind}` });
  if (part.kind === "reasoning") {
    return { block, heading: make(block, "summary", { class: "llmstream-thought" }), growing: make(block, "section") };
  }
  if (part.kind === "refusal") {
    make(block, "strong", {}, "Refused");
    return { block, growing: make(block, "section") };
  }
  if (part.kind === "call") {
    fold(block, part.line);
    if (part.broken) make(block, "em", {}, "not valid JSON");
    make(make(block, "em", { class: "llmstream-open" }, "no result"), "span", {}, " yet");
  } else if (part.kind === "result") {
    if (part.error) make(block, "strong", {}, "Failed");
    fold(block, part.error || part.content);
  } else {
    make(block, "p", { class: "llmstream-quiet" }, `[a part of kind ${part.name}, which this page doesn't know]`);
  }
  sayRest(block, part);
  return { block };
}
