// What a cell shows comes into sight, and stays there. After Shift+Enter JupyterLab puts the next cell into the middle of
// the page, and the browser holds that one still, so that whatever grows above it goes out of the page at the top.

const ROOM = 240; // pixels into which what is shown may grow
const SETTLED = 250; // milliseconds after which JupyterLab has scrolled

export function bringIntoSight(el) {
  setTimeout(() => {
    const cell = el.closest(".jp-CodeCell");
    const next = cell?.nextElementSibling;
    const page = cell?.closest(".jp-WindowedPanel-outer")?.getBoundingClientRect();
    // Only what was run just now, by Shift+Enter or Ctrl+Enter: not where a page is loaded again.
    if (!page || ![cell, next].some((each) => each?.classList.contains("jp-mod-active"))) return;
    next?.style.setProperty("overflow-anchor", "none");
    const { top, bottom } = cell.getBoundingClientRect();
    if (top < page.top || bottom + ROOM > page.bottom) cell.scrollIntoView({ block: "start" });
  }, SETTLED);
}
