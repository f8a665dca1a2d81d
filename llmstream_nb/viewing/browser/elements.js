// Elements of a page, and words in them: always text, whatever they look like.

export function make(parent, tag, attributes = {}, text = "") {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return parent.appendChild(node);
}

// Show these words; without any, hide the element.
export function say(node, words = "") {
  if (node.textContent !== words) node.textContent = words; // else a screen reader says it again
  node.hidden = !words;
}
