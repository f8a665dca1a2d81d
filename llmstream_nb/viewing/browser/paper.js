// An answer as it is seen in a browser, in a notebook and on the web page: its text while it grows, and its figures.

import { make } from "./elements.js";

// What is known so far, as ["12 chunks", "first token 0.21 s", "total 1.4 s"]; times are in milliseconds.
export function figures({ chunks, first, ms, over, attempts }) {
  const seconds = (time, digits) => `${(time / 1000).toFixed(digits)} s`;
  const known = over && attempts > 1 ? [`${attempts} attempts`] : [];
  if (first !== null) known.push(`${chunks.toLocaleString("en")} chunk${chunks === 1 ? "" : "s"}`, `first token ${seconds(first, first < 1000 ? 2 : 1)}`);
  if (ms) known.push(`${over ? "total " : ""}${seconds(ms, 1)}`);
  return known;
}

const READABLE = 2000; // milliseconds that void words stay, as in text.css

// Writes what a model said into `root`: as text nodes, whatever it looks like, at most once a frame. Only HTML that
// Python has sanitised becomes elements.
export class Paper {
  parts = []; // texts, and between them { gap: words } where entries are missing
  html = ""; // what is shown in their place
  drawn = 0; // so many of the parts are in the page
  tail = null; // the text node that grows
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
    this.parts.push(part);
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
    Object.assign(voided, { className: "llmstream-voided", ariaHidden: "true" });
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
      if (!this.drawn) {
        this.root.innerHTML = this.html;
        this.root.classList.toggle("markdown", Boolean(this.html));
        this.tail = null;
      }
      if (!this.html) this.parts.slice(this.drawn).forEach((part) => this.write(part));
      this.drawn = this.parts.length;
      this.root.hidden = !this.drawn;
    });
  }

  write(part) {
    if (part.gap) {
      make(this.root, "mark", {}, part.gap);
      this.tail = null;
      return;
    }
    // Some lines per block: the browser lays out all of a block again when it grows.
    for (const line of part.match(/[^\n]*\n|[^\n]+/g) ?? []) {
      if (!this.tail || (this.tail.length > 2000 && this.tail.data.endsWith("\n"))) {
        this.tail = make(this.root, "div").appendChild(new Text());
      }
      this.tail.appendData(line);
    }
  }
}
