// Whether a view's kernel is there: without it nothing moves, and no button does anything.

import { make, say } from "../viewing/browser/elements.js";

const BEFORE = "Run the cell above first.";
const RESTARTED = "The kernel was restarted: run the cells from the first one on again.";
const GONE = "The kernel is gone: start one, and run the cells from the first one on again.";
const AWAY = "The kernel can't be reached at the moment.";

// Says in `status` what keeps the kernel away, and calls `heard` when that changes; `lost` of what it returns is these
// words, or "". Jupyter documents nothing of what is asked here: what is not there counts as well.
export function watchKernel(model, status, heard = () => {}) {
  const words = make(status, "strong", { class: "llmstream-kernel" });
  const kernel = model.widget_manager?.kernel;
  const layout = model.get("layout"); // every widget has one, and it has a comm as the widget itself has
  const signals = [kernel?.statusChanged, kernel?.connectionStatusChanged, kernel?.disposed].filter((signal) => signal?.connect);
  const watch = { lost: layout?.comm_live === false ? BEFORE : "", close };
  let over = watch.lost; // what a kernel that comes back does not mend

  function look() {
    if (over !== BEFORE && (kernel?.isDisposed || kernel?.status === "dead")) over = GONE;
    else if (layout?.comm_live === false || /restarting/.test(kernel?.status)) over ||= RESTARTED;
    const away = ["connecting", "disconnected"].includes(kernel?.connectionStatus);
    const lost = over || (away ? AWAY : "");
    if (lost === watch.lost) return;
    watch.lost = lost;
    say(words, lost);
    heard();
  }

  function close() {
    signals.forEach((signal) => signal.disconnect(look));
    layout?.off?.("comm_live_update", look);
  }

  signals.forEach((signal) => signal.connect(look));
  layout?.on?.("comm_live_update", look);
  say(words, watch.lost);
  return watch;
}
