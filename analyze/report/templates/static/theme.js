// In which colours the page is shown: as the system, light or dark.
"use strict";
granary.theme = (() => {
  const KEY = "granary theme";
  const ORDER = ["", "light", "dark"];
  const NAMES = { "": "as the system", light: "light", dark: "dark" };

  function kept() {
    try {
      return localStorage.getItem(KEY) || "";
    } catch {
      return "";
    }
  }

  function set(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    const button = document.getElementById("theme");
    if (button) button.setAttribute("aria-label", `Colours: ${NAMES[theme]}. Change`);
    if (button) button.title = `Colours: ${NAMES[theme]} (t)`;
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // it lasts as long as the page
    }
    granary.plots?.again();
  }

  function next() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const cycle = dark ? ["", "light", "dark"] : ["", "dark", "light"]; // the first press always changes something
    const now = document.documentElement.dataset.theme || "";
    set(cycle[(cycle.indexOf(now) + 1) % ORDER.length]);
  }

  return { set, next, kept };
})();
