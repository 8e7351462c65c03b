// The traced picture and its prompt: where a node stands, how strong it is everywhere, and which nodes stand where one points.
"use strict";
granary.traced = (() => {
  const { h, show } = granary;
  let room, graph, calls, heats, views;
  let look = "smooth";
  let last = null; // [node, net]

  function open(element, callbacks) {
    room = element;
    calls = callbacks;
  }

  // Begin with a graph: its facts, its words, its picture, and the networks that say where nodes stand.
  function begin(current, networks) {
    graph = current;
    views = networks;
    heats = null;
    const { facts, contents } = graph;
    const [rows, columns] = facts.grid;
    const frame = h("div", { class: "frame", id: "traced-frame", style: { "aspect-ratio": `${columns} / ${rows}` } });
    if (contents.pictures.there) frame.append(h("img", { src: show.picture(facts.image, contents), alt: `Traced image ${facts.image}: “${show.short(facts.prompt || "", 160)}”`, on: { load: (event) => (frame.style.aspectRatio = `${event.target.naturalWidth} / ${event.target.naturalHeight}`) } }));
    else {
      frame.classList.add("plain");
      frame.append(h("p", { class: "quiet", id: "no-picture" }, `No picture here: ${contents.pictures.without}; cells are tokens, ${rows} × ${columns}.`));
    }
    frame.append(h("div", { class: "heat-room" }), h("div", { class: "cells" }), h("div", { class: "pointed", hidden: true }));
    const cell = (event) => {
      const box = frame.getBoundingClientRect();
      const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
      const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
      return row * columns + column;
    };
    frame.addEventListener("pointermove", (event) => calls.token("img", cell(event)));
    frame.addEventListener("pointerleave", () => calls.token(null));
    frame.addEventListener("click", (event) => calls.chooseToken("img", cell(event)));
    room.replaceChildren(frame, h("p", { class: "words", id: "traced-words" }), h("p", { class: "quiet", id: "traced-caption" }));
    of(null, null);
  }

  // Tokens and values of every feature, error and input of this graph, by its name over tokens.
  function heatOf(node) {
    if (!heats) {
      heats = new Map();
      const over = views.aggregated;
      over?.nodes.forEach((each, i) => over.maps && heats.set(key(each), { tokens: over.maps.token.subarray(over.maps.start[i], over.maps.start[i + 1]), values: over.maps.value.subarray(over.maps.start[i], over.maps.start[i + 1]) }));
      const lists = new Map();
      const each = views.positional;
      each?.nodes.forEach((one, i) => {
        if (one.token < 0 || heats.get(key(one))?.tokens.length) return;
        const value = one.kind === "feature" ? one.activation : each.edges && sum(each, i);
        if (!lists.has(key(one))) lists.set(key(one), { tokens: [], values: [] });
        lists.get(key(one)).tokens.push(one.token);
        lists.get(key(one)).values.push(value || 0);
      });
      for (const [name, list] of lists) heats.set(name, list);
    }
    return heats.get(key(node)) || { tokens: [], values: [] };
  }
  const key = ({ kind, stream, layer, feature }) => (kind === "input" ? `input ${stream}` : `${kind} ${stream} ${layer} ${feature}`);
  const sum = (net, i) => granary.network.edgesOf(net.outof, i).reduce((total, e) => total + Math.abs(net.edges.value[e]), 0);

  // z, or weight, at every token of a stream; members of a group count alike.
  function values(node, stream) {
    const { facts } = graph;
    const total = stream === "txt" ? Math.max(facts.n_txt || 0, facts.pieces.length) : facts.grid[0] * facts.grid[1];
    const found = new Float32Array(total);
    const parts = (node.members || [node]).filter((part) => part.stream === stream);
    for (const part of parts) {
      const { tokens, values: list } = heatOf(part);
      const unit = parts.length > 1 ? 1 / Math.max(1e-12, ...list) : 1;
      tokens.forEach((token, k) => token < total && (found[token] += list[k] * unit));
    }
    return found;
  }

  // Show a node, or nothing.
  function of(node, net, anew = true) {
    if (!anew && last && last[0] === node) return;
    last = [node, net];
    const { facts } = graph;
    const frame = room.querySelector("#traced-frame");
    const spots = (stream) => new Set(node ? (node.members || [node]).filter((each) => each.stream === stream).flatMap((each) => (each.token >= 0 ? [each.token] : granary.words.tracedAt(each, facts))) : []);
    const image = node ? values(node, "img") : new Float32Array(0);
    const hottest = Math.max(0, ...image);
    frame.classList.toggle("heated", hottest > 0 && look !== "none" && graph.contents.pictures.there);
    room.querySelector("#no-picture")?.toggleAttribute("hidden", hottest > 0 && look !== "none");
    frame.querySelector(".heat-room").replaceChildren(...(hottest > 0 && look !== "none" ? [granary.heat.canvas(image, facts.grid, hottest, look === "smooth")] : []));
    frame.querySelector(".cells").replaceChildren(...[...spots("img")].slice(0, 400).map((token) => cellBox(token, "cell")));
    words(node ? values(node, "txt") : new Float32Array(0), spots("txt"));
    caption(node, hottest);
  }

  function cellBox(token, name) {
    const [rows, columns] = graph.facts.grid;
    return h("i", { class: name, style: { left: `${(100 * (token % columns)) / columns}%`, top: `${(100 * Math.floor(token / columns)) / rows}%`, width: `${100 / columns}%`, height: `${100 / rows}%` } });
  }

  function caption(node, hottest) {
    const line = room.querySelector("#traced-caption");
    if (!node) return line.replaceChildren("Point at a node to see where it is active; point at the picture to see which nodes stand there.");
    const { place, tracedAt } = granary.words;
    const traced = tracedAt(node, graph.facts).map((token) => place(node.stream, token, graph.facts));
    const stands = node.token >= 0 ? `, at ${place(node.stream, node.token, graph.facts)}` : traced.length ? `, traced at ${traced.join("; ")}` : "";
    const what = node.kind === "feature" ? "z" : node.members ? "z, members alike" : "weight";
    line.replaceChildren(`${granary.words.title({ ...node, token: -1 }, graph.facts)}${stands}${hottest > 0 && !node.members ? `: ${what} up to ${granary.words.number(hottest)}` : ""}`);
  }

  // The prompt, token by token; tokens of padding together.
  function words(heat, spots) {
    const { pieces, prompt, n_txt: total } = graph.facts;
    const line = room.querySelector("#traced-words");
    const hottest = Math.max(0, ...heat);
    const strength = (token) => (hottest > 0 && look !== "none" ? (heat[token] || 0) / hottest : 0);
    const piece = (token, text) => h(strength(token) > 0.02 ? "mark" : "span", {
      class: spots.has(token) ? "spot" : null, style: { "--heat": strength(token).toFixed(2) }, title: `text token ${token}`,
      on: { pointerenter: () => calls.token("txt", token), pointerleave: () => calls.token(null), click: () => calls.chooseToken("txt", token) },
    }, h("bdi", {}, text));
    line.replaceChildren();
    if (!pieces.length) line.append(h("span", {}, ...(prompt ? ["“", h("bdi", {}, prompt), "” "] : [])));
    pieces.forEach((text, token) => {
      if (text.startsWith(" ") && token > 0) line.append(" ");
      line.append(piece(token, text.trimStart() || "␣"));
    });
    const rest = new Set([...spots, ...[...heat.keys()].filter((token) => strength(token) > 0.02)].filter((token) => token >= pieces.length));
    const listed = [...rest].sort((a, b) => (heat[b] || 0) - (heat[a] || 0) || a - b).slice(0, 12).sort((a, b) => a - b);
    const kind = pieces.length ? "padding" : "token";
    for (const token of listed) line.append(" ", piece(token, `${kind} ${token}`));
    const more = Math.max(0, (total || 0) - pieces.length - listed.length);
    if (more && pieces.length) line.append(h("small", {}, ` and ${more} ${listed.length ? "more " : ""}of padding`));
  }

  // Nodes of a network that stand at a token, or are active there.
  function standing(net, mask, stream, token) {
    const found = [];
    net.nodes.forEach((node, i) => {
      if (!mask[i]) return;
      const parts = (node.members || [node]).filter((part) => part.stream === stream);
      if (parts.some((part) => (part.token >= 0 ? part.token === token : ["feature", "error", "input"].includes(part.kind) && has(heatOf(part), token)))) found.push(i);
    });
    return found;
  }

  function has({ tokens, values: list }, token) {
    const place = tokens.indexOf(token);
    return place >= 0 && list[place] > 0;
  }

  function point(stream, token) {
    const box = room.querySelector(".pointed");
    box.hidden = stream !== "img";
    if (stream === "img") box.replaceChildren(cellBox(token, "cell"));
  }

  function nextLook() {
    look = { smooth: "patches", patches: "none", none: "smooth" }[look];
    of(...last);
    return look;
  }

  return { open, begin, of, point, standing, nextLook };
})();
