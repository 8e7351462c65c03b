// Supernodes by hand: nodes that are chosen with shift, put together under a name.
"use strict";
granary.supernodes = (() => {
  const { h } = granary;
  let room, calls;

  function open(element, callbacks) {
    room = element;
    calls = callbacks;
  }

  // `chosen`: rows of the network that are chosen; the groups that there are, and the pins.
  function show(chosen, net, state, graph) {
    const title = (name) => (net.index.has(name) ? granary.words.title(net.nodes[net.index.get(name)], graph.facts) : name);
    const problem = h("p", { class: "problem", role: "alert" });
    const name = h("input", { id: "group-name", autocomplete: "off", maxlength: "60", placeholder: "name of the supernode", "aria-label": "Name of the supernode" });
    const submit = (event) => {
      event.preventDefault();
      problem.textContent = calls.group(name.value.replace(/[:,]/g, " ").trim().replace(/\s+/g, " ")) || "";
    };
    room.classList.toggle("used", chosen.size + state.groups.length + state.pins.length > 0); // then it stands above the node
    room.replaceChildren(h("h3", {}, "Supernodes and pins"),
      chosen.size ? h("form", { id: "grouping", on: { submit } }, h("p", {}, `${chosen.size} chosen`, " ", h("button", { type: "button", class: "small", on: { click: calls.forget } }, "none")), name, h("button", { disabled: chosen.size < 2 }, "Put together"))
        : h("p", { class: "quiet" }, "Shift-click nodes, or shift-drag over them, to put them together."), problem,
      h("ul", { class: "chips" }, ...state.groups.map((group) => h("li", {}, h("button", { type: "button", class: "chip group", on: { click: () => calls.choose(`group_${group.title}`) } }, `${group.title} (${group.names.length})`), h("button", { type: "button", class: "chip close", "aria-label": `Take ${group.title} apart`, on: { click: () => calls.ungroup(group.title) } }, "×"))),
        ...state.pins.map((pin) => h("li", {}, h("button", { type: "button", class: "chip", on: { click: () => calls.choose(pin) } }, title(pin)), h("button", { type: "button", class: "chip close", "aria-label": `Unpin ${title(pin)}`, on: { click: () => calls.pin(pin) } }, "×")))));
  }

  return { open, show };
})();
