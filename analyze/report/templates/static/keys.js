// The keyboard: everything can be reached without a mouse; ? shows this list.
"use strict";
granary.keys = (() => {
  const LIST = [
    ["/", "search features"],
    ["j, k or ↓, ↑", "next and previous row, or feature"],
    ["Page Down, Page Up, Home, End", "further down and up the table"],
    ["Enter", "open the row"],
    ["Escape", "back to the table; leave a field"],
    ["←, →", "previous and next step of a feature"],
    ["h", "heat: smooth, patches, none"],
    ["l", "edit the label"],
    ["o, f", "overview, features"],
    ["t", "light or dark"],
    ["?", "this list"],
  ];

  function open() {
    const list = document.getElementById("keys");
    for (const [keys, does] of LIST) {
      const names = keys.split(/(, | or )/).map((part) => (/^(, | or )$/.test(part) ? part : granary.h("kbd", {}, part)));
      list.append(granary.h("dt", {}, ...names), granary.h("dd", {}, does));
    }
    document.addEventListener("keydown", pressed);
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const target = event.target instanceof Element ? event.target : document.body;
    const { view } = granary.place.now();
    if (document.getElementById("help").open) return;
    const field = target.closest("input:not([type=radio]):not([type=checkbox]), select, textarea");
    if (field) {
      if (event.key === "Escape") (field.blur(), event.preventDefault());
      else if (view === "features" && field.name === "q" && (event.key === "Enter" || event.key === "ArrowDown")) (field.blur(), granary.table.move(0), event.preventDefault());
      return;
    }
    const does = { ...everywhere, ...(view === "features" ? table : view === "feature" ? feature : {}) }[event.key];
    if (!does || (event.key === "Enter" && target.closest("a, button, summary, thead"))) return;
    event.preventDefault();
    does();
  }

  const everywhere = {
    "/": search,
    "?": () => document.getElementById("help").showModal(),
    o: () => granary.place.go("#/"),
    f: () => granary.place.go("#/features"),
    t: () => granary.theme.next(),
  };
  const table = {
    j: () => granary.table.move(1), k: () => granary.table.move(-1), ArrowDown: () => granary.table.move(1), ArrowUp: () => granary.table.move(-1),
    PageDown: () => granary.table.move(granary.table.page()), PageUp: () => granary.table.move(-granary.table.page()),
    Home: () => granary.table.move(-Infinity), End: () => granary.table.move(Infinity), Enter: () => granary.table.show(),
    Escape: () => granary.place.go("#/"),
  };
  const feature = {
    j: () => granary.feature.step_by(1), k: () => granary.feature.step_by(-1), ArrowRight: () => granary.feature.other_step(1), ArrowLeft: () => granary.feature.other_step(-1),
    h: () => granary.feature.next_look(), l: () => granary.feature.edit(), Escape: () => granary.feature.back(),
  };

  function search() {
    const find = () => document.querySelector("#filters [name=q]").focus();
    if (granary.place.now().view === "features") return find();
    window.addEventListener("granary-shown", find, { once: true });
    granary.place.go("#/features");
  }

  return { open };
})();
