// The page in a frame. Its address comes as a message, and is kept nowhere.

// Where JupyterLab is reached through a hub, only jupyter-server-proxy leads to the kernel's machine.
function address({ port, query, hub }) {
  if (!hub) return `http://127.0.0.1:${port}/?${query}`;
  const config = JSON.parse(document.getElementById("jupyter-config-data")?.textContent || "{}");
  return new URL(`${config.baseUrl || "/"}proxy/${port}/?${query}`, location.origin).href;
}

function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "The kit's web page: ask, and watch answers";
  frame.style.cssText = "width: 100%; border: 1px solid var(--jp-border-color1, #ccc); border-radius: 4px;";
  frame.style.boxSizing = "border-box"; // else the right border lies outside of the cell
  frame.style.height = `${model.get("height")}px`;
  const light = document.body.dataset.jpThemeLight; // the page follows the notebook's theme, not the system's
  if (light) frame.style.colorScheme = light === "true" ? "light" : "dark";
  frame.referrerPolicy = "no-referrer";
  frame.allow = "clipboard-write";
  el.append(frame);
  const show = (message) => {
    frame.src = address(message);
  };
  model.on("msg:custom", show);
  model.send({ do: "show" });
  return () => model.off("msg:custom", show);
}

export default { render };
