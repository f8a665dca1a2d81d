// An extension as course.js is one, for `lab --present` alone: all of the screen is the notebook's, but for the menu.

const projector = {
  id: "llmstream-projector:screen",
  autoStart: true,
  activate({ restored, shell }) {
    restored.then(() => {
      for (const side of ["left", "right"]) if (shell.isSideTabBarVisible(side)) shell.toggleSideTabBarVisibility(side);
      shell.collapseLeft();
      shell.collapseRight();
      if (shell.isTopInSimpleModeVisible()) shell.toggleTopInSimpleModeVisibility();
      const bare = () => shell.currentWidget?.toolbar?.hide();
      shell.currentChanged.connect(bare);
      bare();
    });
  },
};

(window._JUPYTERLAB ??= {})["llmstream-projector"] = {
  init() {}, // it shares no modules
  get: async () => () => ({ __esModule: true, default: projector }),
};
