// A JupyterLab extension as its build would make one, but written by hand, so that nothing has to be built.
// A link to the glossary says its term's meaning when it is pointed at, and opens the glossary beside the page.

const GLOSSARY = "glossary.ipynb";
const here = document.currentScript.src;

const plugin = {
  id: "llmstream-course:glossary",
  autoStart: true,
  activate(app) {
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL("course.css", here) });
    document.head.append(style);
    document.addEventListener("mouseover", (event) => explain(app, event));
    document.addEventListener("click", (event) => follow(app, event), true); // before JupyterLab's own answer
  },
};

// Where a link leads: { link, path, term }, or null for any link but one to a term of the glossary.
function aim(event) {
  const link = event.target.closest?.(".jp-RenderedMarkdown a");
  const [, path, term] = /\/files\/([^?#]*)[^#]*#(.+)/.exec(link?.href ?? "")?.map(decodeURIComponent) ?? [];
  return path?.split("/").pop() === GLOSSARY ? { link, path, term } : null;
}

const headingOf = (source) => /^#+ (.*)/.exec(source)?.[1].trim().replaceAll(" ", "-");

async function explain(app, event) {
  const aimed = aim(event);
  if (!aimed || aimed.link.title) return;
  const { content } = await app.serviceManager.contents.get(aimed.path).catch(() => ({ content: { cells: [] } }));
  const source = content.cells.map((cell) => [cell.source].flat().join("")).find((text) => headingOf(text) === aimed.term);
  const words = source?.split("\n").slice(1).join(" ") ?? "";
  aimed.link.title = words.replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").replace(/[`*]/g, "").trim();
}

async function follow(app, event) {
  const aimed = aim(event);
  if (!aimed || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const options = { mode: "split-right", ref: app.shell.currentWidget?.id };
  const panel = await app.commands.execute("docmanager:open", { path: aimed.path, factory: "Notebook", options });
  panel.sessionContext.kernelPreference = { ...panel.sessionContext.kernelPreference, shouldStart: false }; // all words
  await panel.context.ready;
  await panel.revealed;
  const index = panel.content.widgets.findIndex((cell) => headingOf(cell.model.sharedModel.source) === aimed.term);
  if (index < 0) return;
  panel.content.activeCellIndex = index;
  await panel.content.scrollToItem(index, "start");
}

(window._JUPYTERLAB ??= {})["llmstream-course"] = {
  init() {}, // it shares no modules
  get: async () => () => ({ __esModule: true, default: plugin }),
};
