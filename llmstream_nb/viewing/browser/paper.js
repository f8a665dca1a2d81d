// An answer as it is seen in a browser, in a notebook and on the web page: its parts while they grow, and its figures.

import { makeBlock, thought } from "./blocks.js";
import { make } from "./elements.js";

// What is known so far, as ["12 chunks", "first token 0.21 s", "total 1.4 s"]; times are in milliseconds.
export function figures({ chunks, first, firstPart = first, ms, over, attempts }) {
  const seconds = (time, digits = time < 1000 ? 2 : 1) => `${(time / 1000).toFixed(digits)} s`;
  const again = over && attempts > 1; // figures are of the last one
  const known = again ? [`${attempts} attempts`] : [];
  if (firstPart !== null) known.push(`${again ? "the last: " : ""}${chunks.toLocaleString("en")} chunk${chunks === 1 ? "" : "s"}`);
  if (firstPart !== first) known.push(`first sign ${seconds(firstPart)}`);
  if (first !== null) known.push(`first token ${seconds(first)}`);
  if (ms) known.push(`${over ? "total " : ""}${seconds(ms, 1)}`);
  return known;
}

// A text, and what stands at these offsets in it, as parts of a Paper.
export function partsOf({ text, blocks }) {
  const parts = [];
  let from = 0;
  for (const [at, block] of blocks) {
    parts.push(text.slice(from, at), block);
    from = at;
  }
  return [...parts, text.slice(from)].filter((part) => part !== "");
}

const READABLE = 2000; // milliseconds that void words stay, as in text.css
const NEWEST = 300; // blocks that are drawn: the page stays quick, however many there are
const BETWEEN = "<!-- -->"; // as in markdown.py
const isText = (part) => typeof part === "string";
const same = (one, other, ...names) => names.every((name) => one?.[name] === other?.[name]);

// Shows HTML that is sanitised; its headings are said to stand beneath those of the page.
function format(node, html) {
  node.innerHTML = html;
  for (const title of node.querySelectorAll("h1, h2, h3, h4, h5, h6")) title.ariaLevel = Number(title.tagName[1]) + 2;
}

// Writes a text that grows into `root`, as text nodes.
class Lines {
  length = 0; // so much is written
  tail = null; // the text node that grows

  constructor(root) {
    this.root = root;
  }

  write(text) {
    // Some lines per block: the browser lays out all of a block again when it grows.
    for (const line of text.slice(this.length).match(/[^\n]*\n|[^\n]+/g) ?? []) {
      if (!this.tail || (this.tail.length > 2000 && this.tail.data.endsWith("\n"))) {
        this.tail = make(this.root, "div").appendChild(new Text());
      }
      this.tail.appendData(line);
    }
    this.length = text.length;
  }
}

// Writes what a model said into `root`: as text nodes, whatever it looks like, at most once a frame. Only HTML that
// Python has sanitised becomes elements. Only the last part grows.
export class Paper {
  parts = []; // runs of text, and between them blocks: { kind, … }, or { gap: words } where entries are missing
  html = ""; // what is shown in place of the text
  drawn = 0; // so many of the parts are in the page
  lines = null; // of the last part, if it can grow
  thinking = null; // its heading and its number, if it is reasoning
  now = null; // milliseconds since the attempt's start, while it goes on
  blocks = []; // the elements of those that are drawn, oldest first
  calls = new Map(); // the elements of calls by their ids
  earlier = null; // words on the blocks that are not drawn any more
  frame = 0;
  voided = null; // the words of a worker that fell silent, on their way out

  // `around` is given the function that draws, and must call it: what is in sight may have to stay there.
  constructor(root, around) {
    Object.assign(this, { root, around });
  }

  get holed() {
    return this.parts.some((part) => part.gap);
  }

  add(part) {
    const [n, last] = [this.parts.length - 1, this.parts.at(-1)];
    if (isText(part) && isText(last)) this.parts[n] += part;
    else if (!isText(part) && !("id" in part || part.gap) && same(part, last, "kind", "name")) {
      if ("text" in part) this.parts[n] = { ...last, text: last.text + part.text, ms: part.ms };
    } else this.parts.push(part);
    this.grow(this.parts);
  }

  // The same parts, and more.
  grow(parts) {
    this.parts = parts;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  show(parts, html = "") {
    if (!parts.length) this.voided?.remove(); // of another answer, perhaps
    Object.assign(this, { parts, html, drawn: 0 });
    this.draw();
  }

  // Another worker begins anew: what stands here is void. It goes once people had time to see that, and stands outside of
  // the text meanwhile, so that nobody who selects, copies or listens takes it for the answer.
  strike(worker, parts = [], html = "") {
    this.voided?.remove();
    const voided = document.createElement("div");
    Object.assign(voided, { className: "llmstream-voided", ariaHidden: "true", inert: true });
    this.head(null);
    const why = make(voided, "p");
    make(why, "strong", {}, "Interrupted");
    why.append(` Its worker ${worker || "before"} is silent.`);
    make(voided, "del").append(...this.root.childNodes);
    this.show(parts, html);
    this.around(() => this.root.before(voided));
    setTimeout(() => this.around(() => voided.remove()), READABLE);
    this.voided = voided;
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.around(() => {
      if (this.drawn) this.write();
      else this.keepingFolds(() => this.write());
      this.root.hidden = !this.drawn;
    });
  }

  // Write all anew; what the reader had unfolded stays so.
  keepingFolds(write) {
    const folds = () => [...this.root.querySelectorAll("details")];
    const open = folds().map((fold) => fold.open);
    const focused = folds().findIndex((fold) => fold.contains(document.activeElement));
    this.root.replaceChildren();
    Object.assign(this, { lines: null, thinking: null, blocks: [], calls: new Map(), earlier: null });
    write();
    folds().forEach((fold, n) => (fold.open = open[n] ?? false));
    folds()[focused]?.firstChild.focus({ preventScroll: true });
  }

  write() {
    let runs = this.html ? this.html.split(BETWEEN) : [];
    if (runs.length !== this.parts.filter(isText).length) runs = [];
    const alone = runs.length === 1 && this.parts.length === 1;
    this.root.classList.toggle("markdown", alone);
    for (let n = Math.max(0, this.drawn - 1); n < this.parts.length; n++) {
      const part = this.parts[n];
      if (n >= this.drawn) {
        this.head(null);
        Object.assign(this, { lines: null, thinking: null });
        if (isText(part) && runs.length) format(alone ? this.root : make(this.root, "div", { class: "markdown" }), runs.shift());
        else if (isText(part)) this.lines = new Lines(this.root);
        else if (part.gap) make(this.root, "mark", {}, part.gap);
        else this.place(part, n);
      }
      this.lines?.write(part.text ?? part);
    }
    this.drawn = this.parts.length;
    this.head(this.now);
  }

  place(part, n) {
    if (!part.kind) return this.drop(); // one of the oldest, of which no more is told
    const call = part.kind === "result" ? this.calls.get(part.id) : null;
    const { block, heading, growing } = makeBlock(this.root.contains(call) ? call : this.root, part);
    this.lines = growing && new Lines(growing);
    this.thinking = heading && { heading, n };
    if (part.kind === "call") this.calls.set(part.id, block);
    if (this.blocks.push(block) > NEWEST) this.drop(this.blocks.shift());
  }

  // In place of the oldest blocks there are words.
  drop(block = make(this.root, "p")) {
    this.earlier ??= Object.assign(document.createElement("p"), { className: "llmstream-quiet", count: 0 });
    this.earlier.count += 1;
    this.earlier.textContent = `[${this.earlier.count.toLocaleString("en")} earlier parts are not shown]`;
    if (block.parentNode === this.root) block.replaceWith(this.earlier);
    else block.remove(); // a result, beneath its call
  }

  // While the answer goes on, `now` says for how long, in milliseconds; then it is null.
  tick(now) {
    this.now = now;
    this.head(now);
  }

  head(now) {
    if (this.thinking) this.thinking.heading.textContent = thought(this.parts[this.thinking.n], now);
  }
}
