// The page of graphs: what is shown follows from the address; every change goes through it.
"use strict";
granary.graphs = (() => {
  const NODES_AT_FIRST = 220;
  const EDGES_AT_FIRST = 900;
  const VIEWS = { positional: "per token", aggregated: "over tokens" };
  const at = (id) => document.getElementById(id);
  const { address, network, drawing } = granary;
  let contents = null;
  let state = null; // what the address says, with nothing left open
  let graph = null; // {name, entry, facts, contents}
  let views = {}; // the networks of the graph: positional, aggregated
  let turn = 0; // counts what was asked for: of two graphs asked for at once the later is shown
  let net = null;
  let vis = null;
  let looks = null;
  let hovered = null;
  let found = null; // what a search found, or null
  let atToken = null; // nodes that stand where the reader points on the picture
  const chosen = new Set(); // names, for a supernode
  const row = (name) => (name !== null && net.index.has(name) ? net.index.get(name) : null);
  const selected = () => row(state.node);

  async function start() {
    contents = await granary.load("graphs");
    const report = contents.in_report ? await granary.load("report") : null;
    if (report) granary.features.open(report);
    const dictionaries = new Map((report?.dictionaries || []).map((each) => [each.name, each]));
    for (const entry of contents.graphs) for (const of of Object.values(entry.dictionaries)) if (!dictionaries.has(of.name)) dictionaries.set(of.name, of);
    await Promise.all([granary.labels.open({ dictionaries: [...dictionaries.values()] }), granary.heat.open()]);
    const calls = {
      hover, choose, lasso, token, chooseToken, follow: (to) => go({ follow: to }), pin, group, ungroup, forget, graph: (name) => (location.hash = `#/${encodeURIComponent(name)}`), view: turnTo, moved: () => tip(hovered), resized: () => (redraw(true), mark()),
      share: (key, value) => go({ [key]: value, shares: true }), kind, png, svg, labels: () => granary.controls.save("labels.json", new Blob([granary.labels.file()], { type: "application/json" })), fit: () => drawing.fit(true),
      reset, found: (set) => ((found = set), mark()), now: () => ({ net, graph }),
    };
    drawing.open(at("canvas"), calls);
    granary.traced.open(at("traced"), calls);
    granary.panel.open(at("panel"), calls);
    granary.supernodes.open(at("supernodes"), { ...calls, choose: (name) => choose(row(name)) });
    granary.controls.open(calls, contents);
    granary.keys.open(keys());
    at("canvas").addEventListener("focus", () => hovered === null && selected() === null && hover(firstTarget()));
    document.addEventListener("granary-labels", () => (redraw(false), aside(), mark()));
    window.addEventListener("hashchange", () => arrive().catch((error) => tell(error.message)));
    if (granary.plots === undefined) granary.plots = { again: () => drawing.repaint() };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawing.repaint());
    await arrive();
  }

  // From the address to the page.
  async function arrive() {
    const mine = ++turn;
    const asked = address.parse(location.hash, contents.graphs.map(({ name }) => name));
    const found = graph?.name === asked.graph ? null : await read(asked.graph).catch((error) => stayed(mine, error));
    if (mine !== turn) return; // something else was asked for meanwhile
    if (found) begin(found);
    const before = found ? null : state;
    state = asked;
    state.view = views[asked.view] ? asked.view : views.aggregated ? "aggregated" : "positional";
    render(before);
    const problem = asked.unknown ? `There is no graph called ${asked.unknown} here; shown is ${asked.graph}.` : lost();
    tell(problem);
  }

  // A graph that cannot be read: the address and the list name again the one that is drawn.
  function stayed(mine, error) {
    if (graph && mine === turn) {
      history.replaceState(null, "", address.link(state));
      controls();
    }
    throw error;
  }

  // Show the state; `before`: the one that the page shows now, null for another graph.
  function render(before) {
    const changed = (...keys) => !before || keys.some((key) => JSON.stringify(before[key]) !== JSON.stringify(state[key]));
    const regrouped = changed("view", "groups");
    if (regrouped) regroup();
    if (regrouped && !state.shares) state.nodes = state.edges = null;
    fill();
    if (changed("view", "groups", "nodes", "edges", "hidden") || missing()) redraw(regrouped);
    controls();
    if (changed("view", "groups", "hidden", "node", "follow", "pins")) aside(); // while a slider moves the panel stays
    mark();
    if (regrouped) granary.controls.again();
    at("canvas").setAttribute("aria-label", description());
    document.title = `${graph.name} · graph`;
  }

  function tell(problem) {
    at("failed").hidden = !problem;
    at("failed").textContent = problem || "";
  }

  // What the address names and the graph has not, in words; null where all is there.
  function lost() {
    const { node, pins, groups } = state;
    const nets = Object.values(views);
    const known = (name) => row(name) !== null || nets.some((each) => each.index.has(name)) || groups.some(({ title }) => name === `group_${title}`);
    const away = groups.filter((group) => !nets.some((each) => granary.grouping.fits(each, group)));
    const unpinned = pins.filter((name) => !known(name) || away.some(({ title }) => name === `group_${title}`));
    const said = [];
    if (node !== null && row(node) === null) said.push(`There is no node ${node} in this graph ${VIEWS[state.view]}.`);
    if (unpinned.length) said.push(`Not in this graph, and not pinned: ${unpinned.join(", ")}.`);
    if (away.length) said.push(`Not in this graph are all nodes of the supernode${away.length > 1 ? "s" : ""} ${away.map(({ title }) => title).join(", ")}.`);
    if (!said.length) return null;
    const before = { ...state };
    if (node !== null && row(node) === null) state.node = null;
    state.pins = pins.filter((name) => !unpinned.includes(name));
    state.groups = groups.filter((group) => !away.includes(group));
    render(before);
    return said.join(" ");
  }

  // A graph as its file has it; nothing on the page changes yet.
  async function read(name) {
    const { facts, pieces, views: packed } = await granary.load(`graphs/${name}`);
    const nets = {};
    for (const [key, view] of Object.entries(packed)) if (view) nets[key] = withMembers(network.of(view), facts);
    return { graph: { name, entry: contents.graphs.find((each) => each.name === name), facts: { ...facts, pieces }, contents }, nets };
  }

  function begin(found) {
    graph = found.graph;
    views = found.nets;
    const { facts } = graph;
    chosen.clear();
    granary.traced.begin(graph, views);
    at("prompt").replaceChildren(...(facts.prompt ? ["“", granary.h("bdi", {}, facts.prompt), "”"] : [`image ${facts.image}`]));
    at("prompt").title = facts.prompt || "";
  }

  // Supernodes that were asked for know their members, so that they have heat and are found by them.
  function withMembers(net, facts) {
    for (const node of net.nodes) {
      const members = node.kind === "supernode" && facts.targets.find(({ name }) => name === node.name)?.members;
      if (!members) continue;
      node.members = members.map(({ site, token, feature }) => {
        const part = { kind: "feature", stream: site.split("_")[0], layer: Number(site.split("_")[1]), token: token ?? -1, feature, term: null };
        return { ...part, name: granary.words.name(part) };
      });
      if (node.members.every(({ stream }) => stream === node.members[0].stream)) node.stream = node.members[0].stream;
    }
    return net;
  }

  // Shares that the address leaves open: as much as can be read at once.
  function fill() {
    const share = (shares, most) => (shares.length <= most ? 1 : shares[most - 1]);
    if (state.nodes === null) state.nodes = share(net.nodeShare, NODES_AT_FIRST);
    if (state.edges === null) state.edges = among(net, state.nodes, EDGES_AT_FIRST);
  }

  // The share of edges of which `most` run between the strongest nodes.
  function among({ nodeOrder, nodeShare, edgeShare, edges, count }, nodeShown, most) {
    const strong = new Uint8Array(count);
    const limit = network.howMany(nodeShare, nodeShown);
    for (let k = 0; k < limit; k++) strong[nodeOrder[k]] = 1;
    let left = most;
    for (let e = 0; e < edgeShare.length; e++) if (strong[edges.source[e]] && strong[edges.target[e]] && --left === 0) return edgeShare[e];
    return 1;
  }

  function regroup() {
    net = granary.grouping.applied(views[state.view], state.groups);
    for (const name of chosen) if (!net.index.has(name)) chosen.delete(name);
    looks = granary.ink.looks(net);
    hovered = null;
    found = null;
    atToken = null;
  }

  function redraw(refit) {
    const keep = [...state.pins, state.node, ...chosen].map(row).filter((i) => i !== null);
    vis = network.shown(net, { nodes: state.nodes, edges: state.edges, hidden: new Set(state.hidden), keep });
    const place = granary.layers.placed(net, vis, drawing.aspect(), state.view === "positional");
    drawing.show({ net, vis, place, looks, labels: (node) => granary.panel.label(node, graph), facts: graph.facts }, refit, selected() ?? row(state.pins.at(-1) ?? null));
  }

  const controls = () => granary.controls.set(state, net, vis, views);

  function aside() {
    granary.panel.of(selected(), graph, net, state);
    granary.supernodes.show(chosen, net, state, graph, views[state.view === "positional" ? "aggregated" : "positional"]);
  }

  // Change what is shown, and say so in the address; `step`: one that the back button undoes.
  function go(change, step = false) {
    turn++; // a graph that is still being read comes too late
    const before = state;
    state = { ...state, ...change };
    history[step ? "pushState" : "replaceState"](null, "", address.link(state));
    tell(null);
    render(before);
  }

  // Supernodes and pins stay, each is seen where its nodes are; the chosen node goes along.
  function turnTo(view) {
    if (view === state.view || !views[view]) return controls();
    go({ view, node: counterpart(state.node, view), nodes: null, edges: null, shares: false }, true);
  }

  // The node of the other view that stands for one: over tokens the sum, per token the one that matters most.
  function counterpart(name, view) {
    const node = name === null || row(name) === null ? null : net.nodes[row(name)];
    if (!node) return null;
    if (node.kind === "group") return granary.grouping.fits(views[view], state.groups.find(({ title }) => title === node.term)) ? name : null;
    const part = granary.words.name({ ...node, token: -1 });
    const same = views[view].nodes.filter((each) => granary.words.name({ ...each, token: -1 }) === part);
    return same.length ? same.reduce((most, each) => ((each.target - most.target || each.weight - most.weight) > 0 ? each : most)).name : null;
  }

  function reset() {
    go({ nodes: null, edges: null, shares: false, hidden: [], node: null, follow: "near", pins: [], groups: [] }, true);
    drawing.fit(false);
  }
  const missing = () => [...state.pins, state.node].some((name) => row(name) !== null && !vis.mask[row(name)]);

  function hover(i) {
    if (hovered === i) return;
    hovered = i;
    atToken = null;
    mark();
  }

  // What the reader points at, else what was found, else what is chosen.
  function mark() {
    const i = hovered !== null && vis.mask[hovered] ? hovered : selected();
    const rings = [...state.pins.map((name) => [row(name), "soft"]), ...[...chosen].map((name) => [row(name), "ink"]), [selected(), "accent"]].filter(([each]) => each !== null && vis.mask[each]);
    const only = hovered === null && (atToken || found);
    if (only) drawing.mark({ nodes: new Set([...only].filter((each) => vis.mask[each])), edges: new Uint32Array(0), main: null, rings });
    else if (i === null) drawing.mark({ nodes: null, edges: null, main: null, rings });
    else drawing.mark({ ...network.paths(net, vis, i, hovered !== null && hovered !== selected() ? "near" : state.follow), main: i, rings });
    const told = hovered !== null ? hovered : selected();
    if (!atToken) granary.traced.of(told === null ? null : net.nodes[told], net, false);
    tip(hovered);
  }

  function tip(i) {
    const box = at("tip");
    box.hidden = i === null || !vis.mask[i];
    if (box.hidden) return;
    const node = net.nodes[i];
    const said = granary.panel.label(node, graph);
    const figures = [["z", node.activation], ["influence", node.influence]].filter(([, value]) => value > 0).map(([name, value]) => `${name} ${granary.words.number(value)}`);
    if (node.effect && !node.target) figures.push(`${node.effect > 0 ? "excites" : "suppresses"} ${granary.words.signed(node.effect)}`);
    box.replaceChildren(granary.h("b", {}, granary.words.title(node, graph.facts)), ...(said ? [granary.h("bdi", { class: "said" }, said)] : []), granary.h("small", {}, figures.join(" · ")));
    const [x, y] = drawing.screen(i);
    const { width, height } = drawing.size;
    if (x < 0 || y < 0 || x > width || y > height) box.hidden = true; // it was moved out of sight
    box.style.left = `${Math.min(Math.max(8, x + 14), width - box.offsetWidth - 8)}px`;
    box.style.top = `${y + 16 + box.offsetHeight > height ? Math.max(4, y - box.offsetHeight - 14) : Math.max(4, y + 16)}px`;
  }

  function say(i) {
    const node = net.nodes[i];
    at("said").textContent = `${granary.words.title(node, graph.facts)} ${granary.panel.label(node, graph)}, ${node.effect > 0 ? "excites" : node.effect < 0 ? "suppresses" : "no effect known"}, influence ${granary.words.number(node.weight)}`;
  }

  // Choose a node, or with shift take it for a supernode; nothing: forget what is chosen.
  function choose(i, too = false) {
    if (i === undefined) return;
    if (too) {
      if (i === null) return;
      const { name } = net.nodes[i];
      if (!chosen.delete(name)) chosen.add(name);
      aside();
      return mark();
    }
    hovered = null;
    const name = i === null ? null : net.nodes[i].name;
    go({ node: name === state.node ? null : name }, true);
    if (i !== null && state.node) (drawing.reveal(i), say(i));
  }

  function lasso(nodes) {
    for (const i of nodes) chosen.add(net.nodes[i].name);
    aside();
    mark();
  }

  function forget() {
    chosen.clear();
    aside();
    mark();
  }

  function pin(name) {
    go({ pins: state.pins.includes(name) ? state.pins.filter((each) => each !== name) : [...state.pins, name] });
  }

  // Put what is chosen together; returns what is wrong, or null.
  function group(title) {
    if (!title) return "give it a name";
    if (state.groups.some((each) => each.title === title)) return `there is a supernode ${title} already`;
    const inside = (name) => state.groups.find((each) => `group_${each.title}` === name)?.names || [name];
    const names = [...chosen].flatMap(inside);
    const rest = state.groups.filter((each) => !chosen.has(`group_${each.title}`));
    chosen.clear();
    go({ groups: [...rest, { title, names }], node: `group_${title}`, pins: state.pins.filter((pinned) => !names.includes(pinned)) }, true);
    return null;
  }

  function ungroup(title) {
    go({ groups: state.groups.filter((each) => each.title !== title), node: state.node === `group_${title}` ? null : state.node, pins: state.pins.filter((name) => name !== `group_${title}`) }, true);
  }

  const kind = (name, on) => go({ hidden: on ? state.hidden.filter((each) => each !== name) : [...state.hidden, name] });

  function token(stream, number) {
    granary.traced.point(stream, number);
    const standing = stream ? granary.traced.standing(net, vis.mask, stream, number) : null;
    atToken = standing ? new Set(standing) : null;
    at("said").textContent = standing ? `${standing.length} nodes at ${granary.words.place(stream, number, graph.facts)}` : "";
    mark();
  }

  const chooseToken = (stream, number) => lasso(granary.traced.standing(net, vis.mask, stream, number));

  async function png() {
    granary.controls.save(`${graph.name}.png`, await drawing.png(granary.words.headline(graph.facts)));
  }
  const svg = () => granary.controls.save(`${graph.name}.svg`, new Blob([granary.svg.text(drawing.scene(), drawing.marked(), description(), graph.facts, granary.words.headline(graph.facts))], { type: "image/svg+xml" }));

  const firstTarget = () => net.nodes.findIndex((node) => node.target);
  function description() {
    const targets = net.nodes.filter((node) => node.target).map((node) => granary.words.title(node, graph.facts));
    return `Attribution graph of ${targets.slice(0, 3).join(", ") || graph.name}: ${vis.count} nodes and ${vis.edges.length} edges are shown, layers upwards, ${granary.drawing.scene().place.rooms.map(({ name }) => granary.words.STREAMS[name]).join(" left, ")} on the right`;
  }

  // Walk with the keyboard: `sideways` in the layer, else along the strongest edge shown.
  function walk(sideways, by) {
    const from = hovered ?? selected() ?? firstTarget();
    if (from < 0 || from === null) return;
    const { place } = drawing.scene();
    let to = from;
    if (sideways) {
      const band = place.bands.findIndex(({ top, bottom }) => place.y[from] >= top && place.y[from] <= bottom);
      const { top, bottom } = place.bands[band];
      const row = drawing.scene().order.filter((i) => place.y[i] >= top && place.y[i] <= bottom).sort((a, b) => place.x[a] - place.x[b] || place.y[a] - place.y[b]);
      to = row[(row.indexOf(from) + by + row.length) % row.length];
    } else {
      const list = [...network.edgesOf(by > 0 ? net.outof : net.into, from)].filter((e) => vis.edgeMask[e]);
      list.sort((a, b) => Math.abs(net.edges.value[b]) - Math.abs(net.edges.value[a]) || a - b);
      if (list.length) to = (by > 0 ? net.edges.target : net.edges.source)[list[0]];
    }
    hover(to);
    drawing.reveal(to);
    say(to);
  }

  function keys() {
    const now = () => hovered ?? selected();
    const followed = (follow) => () => go({ follow });
    const enter = () => now() !== null && choose(now());
    return {
      "/": () => at("search").focus(), "?": () => at("help").showModal(), t: () => granary.theme.next(), ArrowLeft: () => walk(true, -1), ArrowRight: () => walk(true, 1), ArrowUp: () => walk(false, 1), ArrowDown: () => walk(false, -1),
      Enter: enter, " ": enter, s: () => now() !== null && choose(now(), true), n: followed("near"), d: followed("down"), u: followed("up"), b: followed("both"), p: () => now() !== null && pin(net.nodes[now()].name),
      g: () => at("group-name")?.focus(), l: () => at("label-text")?.focus(), h: () => granary.traced.nextLook(), v: () => turnTo(state.view === "positional" ? "aggregated" : "positional"),
      "Shift+ArrowLeft": () => drawing.panBy(60, 0), "Shift+ArrowRight": () => drawing.panBy(-60, 0), "Shift+ArrowUp": () => drawing.panBy(0, 60), "Shift+ArrowDown": () => drawing.panBy(0, -60),
      "+": () => drawing.zoomBy(1.3), "-": () => drawing.zoomBy(1 / 1.3), "0": () => drawing.fit(true),
      Escape: () => (found ? granary.controls.clearSearch() : chosen.size ? forget() : hovered !== null ? hover(null) : state.node && go({ node: null })),
    };
  }

  return { start, state: () => state, network: () => net, visible: () => vis, facts: () => graph.facts, chosen, hover, choose, row };
})();

(async () => {
  granary.theme.set(granary.theme.kept());
  document.getElementById("theme").addEventListener("click", () => granary.theme.next());
  document.getElementById("ask").addEventListener("click", () => document.getElementById("help").showModal());
  document.getElementById("clear-search").addEventListener("click", () => granary.controls.clearSearch());
  try {
    await granary.graphs.start();
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    const note = document.getElementById("failed");
    note.hidden = false;
    note.textContent = error.message;
  }
})();
