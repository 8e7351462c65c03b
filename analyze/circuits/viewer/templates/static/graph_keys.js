// The keyboard: everything can be reached without a mouse; ? shows this list.
"use strict";
granary.keys = (() => {
  const LIST = [
    ["/", "search nodes"], ["←, →", "next node in this layer"], ["↑, ↓", "along the strongest edge, up or down"], ["Enter or Space", "choose the node"], ["s", "choose it too, for a supernode"],
    ["n, d, u, b", "paths: next, what leads here, what it leads to, both"], ["p", "pin"], ["g", "name the supernode"], ["l", "edit the label"], ["h", "heat: smooth, patches, none"], ["v", "per token, over tokens"],
    ["+, −, 0", "closer, further, all of it"], ["Shift and an arrow", "move the drawing"], ["Escape", "back: search, chosen nodes, node"], ["t", "light or dark"], ["?", "this list"],
  ];

  function open(does) {
    const list = document.getElementById("keys");
    for (const [keys, what] of LIST) {
      const names = keys.split(/(, | or )/).map((part) => (/^(, | or )$/.test(part) ? part : granary.h("kbd", {}, part)));
      list.append(granary.h("dt", {}, ...names), granary.h("dd", {}, what));
    }
    document.addEventListener("keydown", (event) => pressed(event, does));
  }

  function pressed(event, does) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.getElementById("help").open) return;
    const target = event.target instanceof Element ? event.target : document.body;
    const field = target.closest("input:not([type=radio]):not([type=checkbox]):not([type=range]), select, textarea");
    if (field) {
      if (event.key === "Escape") (field.blur(), field.id === "search" && granary.controls.clearSearch(), event.preventDefault());
      return;
    }
    const own = target.closest("a, button, summary, input");
    if (own && ["Enter", " ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(event.key)) return;
    const act = does[(event.shiftKey && event.key.startsWith("Arrow") ? "Shift+" : "") + event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  return { open };
})();
