// What a cell shows comes into sight. After Shift+Enter JupyterLab puts the next cell into the middle of the page, and so
// pushes whatever is higher than half a page out of it at the top.

const ROOM = 240; // pixels into which what is shown may grow
const SETTLED = 250; // milliseconds after which JupyterLab has scrolled

export function bringIntoSight(el) {
  setTimeout(() => {
    const cell = el.closest(".jp-CodeCell");
    const page = cell?.closest(".jp-WindowedPanel-outer")?.getBoundingClientRect();
    // Only what was run just now, by Shift+Enter or Ctrl+Enter: not where a page is loaded again.
    const active = [cell, cell?.nextElementSibling].some((each) => each?.classList.contains("jp-mod-active"));
    if (!page || !active) return;
    const { top, bottom } = cell.getBoundingClientRect();
    if (top < page.top || bottom + ROOM > page.bottom) cell.scrollIntoView({ block: "start" });
  }, SETTLED);
}
