// Above the graph: which graph, per token or over tokens, how much of it, search; and files that leave the page.
"use strict";
granary.controls = (() => {
  const { h, show } = granary;
  const FOUND = 40;
  let calls;
  const at = (id) => document.getElementById(id);

  function open(callbacks, contents) {
    calls = callbacks;
    const select = at("graph");
    if (select) {
      for (const { name, prompt } of contents.graphs) select.append(h("option", { value: name, title: prompt || "" }, name));
      select.addEventListener("change", () => calls.graph(select.value));
    }
    for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", () => calls.view(radio.value));
    for (const key of ["nodes", "edges"]) at(`${key}-slider`).addEventListener("input", (event) => calls.share(key, Number(event.target.value) / 1000));
    at("search").addEventListener("input", found);
    at("search").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "ArrowDown") return;
      const first = at("found").querySelector("button");
      if (event.key === "Enter" && first) first.click();
      else first?.focus();
      event.preventDefault();
    });
    at("share").addEventListener("click", copy);
    at("png").addEventListener("click", () => calls.png());
    at("svg").addEventListener("click", () => calls.svg());
    at("json").addEventListener("click", () => calls.labels());
    at("fit").addEventListener("click", () => calls.fit());
    at("reset").addEventListener("click", () => calls.reset());
  }

  async function copy() {
    const button = at("share");
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Link copied";
    } catch {
      button.textContent = "The address is the link";
    }
    setTimeout(() => (button.textContent = "Copy link"), 2500);
  }

  // The state into the controls, and how much of the whole it shows.
  function set(state, net, vis, views) {
    if (at("graph")) at("graph").value = state.graph;
    for (const radio of document.querySelectorAll("[name=view]")) {
      radio.checked = radio.value === state.view;
      radio.disabled = !views[radio.value];
    }
    for (const key of ["nodes", "edges"]) {
      at(`${key}-slider`).value = String(Math.round(state[key] * 1000));
      const [count, all] = key === "nodes" ? [vis.count, net.count] : [vis.edges.length, net.edges.source.length];
      const what = `${show.percent(state[key])} of the ${key === "nodes" ? "influence" : "weight"}`;
      at(`${key}-count`).replaceChildren(`${show.whole(count)} of ${show.whole(all)}`, h("small", {}, what));
      at(`${key}-slider`).title = key === "nodes" ? `The nodes that matter most, until they have ${what} on the targets` : `The edges that matter most, until they have ${what}: each counts by its share of what its upper node gets, times that node's influence`;
      at(`${key}-slider`).setAttribute("aria-valuetext", `${what}, ${show.whole(count)} of ${show.whole(all)} ${key}`);
    }
    kinds(state, net);
  }

  // The legend is also the switch for kinds of nodes.
  let legend = "";
  function kinds(state, net) {
    const there = [...new Set(net.nodes.map((node) => node.kind))];
    const order = Object.keys(granary.words.KINDS).filter((kind) => there.includes(kind));
    const now = `${order} ${state.hidden}`;
    if (now === legend) return; // else a switch would lose the focus at every move of a slider
    legend = now;
    at("kinds").replaceChildren(...order.map((kind) => {
      const path = granary.ink.symbol(kind).size(90).context(null)();
      const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      icon.setAttribute("viewBox", "-8 -8 16 16");
      icon.setAttribute("aria-hidden", "true");
      icon.innerHTML = `<path d="${path}" ${["feature", "group", "supernode"].includes(kind) ? 'fill="currentColor"' : 'fill="none"'} stroke="currentColor" stroke-width="1.3"/>${kind === "group" ? '<circle r="7.3" fill="none" stroke="currentColor"/>' : ""}`;
      return h("label", { title: granary.words.MEANINGS[kind] }, h("input", { type: "checkbox", value: kind, checked: !state.hidden.includes(kind), on: { change: (event) => calls.kind(kind, event.target.checked) } }), icon, granary.words.KINDS[kind]);
    }));
  }

  // Whether the words have a term; one that ends in a number has to end there: img_4/5 is not img_4/502.
  function has(words, term) {
    if (!/\d$/.test(term)) return words.includes(term);
    for (let from = words.indexOf(term); from >= 0; from = words.indexOf(term, from + 1)) if (!/\d/.test(words[from + term.length] || "")) return true;
    return false;
  }

  // Nodes whose name, label, token or term has what is searched for; without a word the strongest.
  function matches(net, graph, text) {
    const terms = text.toLowerCase().match(/(?:block|layer|row|column|token)\s+\d+|[^\s,]+/g) || [];
    const phrase = text.trim().toLowerCase();
    const fits = (node) => {
      const label = granary.panel.label(node, graph);
      const words = granary.words.searched(node, label, graph.facts);
      const said = `${granary.words.title(node, graph.facts)} ${label}`;
      return terms.every((term) => (/^\d+$/.test(term) ? new RegExp(`\\b${term}\\b`).test(said) : has(words, term))) || (!/^\d+$/.test(phrase) && has(words, phrase));
    };
    return [...net.nodeOrder].filter((i) => !terms.length || fits(net.nodes[i]));
  }

  function found() {
    const text = at("search").value;
    const list = at("found");
    at("clear-search").hidden = !text;
    if (!text.trim()) {
      list.hidden = true;
      at("found-count").textContent = "";
      return calls.found(null);
    }
    const { net, graph } = calls.now();
    const all = matches(net, graph, text);
    at("found-count").textContent = `${show.whole(all.length)} found`;
    list.hidden = !all.length;
    list.replaceChildren(...all.slice(0, FOUND).map((i) => h("li", {}, h("button", { type: "button", class: "edge", "data-node": net.nodes[i].name, on: { click: () => (clearSearch(), at("search").blur(), calls.choose(i)), pointerenter: () => calls.hover(i), pointerleave: () => calls.hover(null), focus: () => calls.hover(i) } },
      h("span", { class: "who" }, granary.words.title(net.nodes[i], graph.facts), " ", h("b", {}, h("bdi", {}, granary.panel.label(net.nodes[i], graph)))), h("small", {}, net.nodes[i].weight > 0 ? `influence ${granary.words.number(net.nodes[i].weight)}` : "")))));
    calls.found(new Set(all));
  }

  // Search again: the network is another one.
  const again = () => at("search").value.trim() && found();

  function clearSearch() {
    at("search").value = "";
    found();
  }

  function save(name, blob) {
    const url = URL.createObjectURL(blob);
    h("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  return { open, set, again, matches, clearSearch, save };
})();
