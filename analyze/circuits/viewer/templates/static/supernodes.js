// Supernodes by hand: nodes that are chosen with shift, put together under a name.
"use strict";
granary.supernodes = (() => {
  const { h } = granary;
  let room, calls;

  function open(element, callbacks) {
    room = element;
    calls = callbacks;
  }

  // `chosen`: names that are chosen.  Groups and pins whose nodes stand in the other view, `other`, are kept for it, and only counted here.
  function show(chosen, net, state, graph, other) {
    const title = (name) => (net.index.has(name) ? granary.words.title(net.nodes[net.index.get(name)], graph.facts) : name);
    const [groups, pins] = [state.groups.filter(({ title: of }) => net.index.has(`group_${of}`)), state.pins.filter((pin) => net.index.has(pin))];
    const there = other ? state.groups.filter((group) => !groups.includes(group) && granary.grouping.fits(other, group)) : [];
    const elsewhere = there.length + state.pins.filter((pin) => !pins.includes(pin) && (other?.index.has(pin) || there.some(({ title: of }) => pin === `group_${of}`))).length;
    const problem = h("p", { class: "problem", role: "alert" });
    const name = h("input", { id: "group-name", autocomplete: "off", maxlength: "60", placeholder: "name of the supernode", "aria-label": "Name of the supernode" });
    const submit = (event) => {
      event.preventDefault();
      problem.textContent = calls.group(name.value.replace(/[:,]/g, " ").trim().replace(/\s+/g, " ")) || "";
      if (!problem.textContent) [...room.querySelectorAll(".chip.group")].at(-1)?.focus(); // the form is gone
    };
    room.classList.toggle("used", chosen.size + groups.length + pins.length > 0); // then it stands above the node
    room.replaceChildren(h("h3", {}, "Supernodes and pins"),
      chosen.size ? h("form", { id: "grouping", on: { submit } }, h("p", {}, `${chosen.size} chosen`, " ", h("button", { type: "button", class: "small", on: { click: calls.forget } }, "none")), name, h("button", { disabled: chosen.size < 2 }, "Put together"))
        : h("p", { class: "quiet" }, "Shift-click nodes, or shift-drag over them, to put them together."), problem,
      h("ul", { class: "chips" }, ...groups.map((group) => h("li", {}, h("button", { type: "button", class: "chip group", on: { click: () => calls.choose(`group_${group.title}`) } }, h("bdi", {}, group.title), ` (${group.names.length})`), h("button", { type: "button", class: "chip close", "aria-label": `Take ${group.title} apart`, on: { click: () => calls.ungroup(group.title) } }, "×"))),
        ...pins.map((pin) => h("li", {}, h("button", { type: "button", class: "chip", on: { click: () => calls.choose(pin) } }, title(pin)), h("button", { type: "button", class: "chip close", "aria-label": `Unpin ${title(pin)}`, on: { click: () => calls.pin(pin) } }, "×")))),
      ...(elsewhere ? [h("p", { class: "quiet", id: "elsewhere" }, `${elsewhere} more ${state.view === "positional" ? "over tokens" : "per token"}`)] : []));
  }

  return { open, show };
})();
