// The graph onto a canvas context: bands and rooms behind, edges from the weakest to the strongest, nodes, what they are called.
"use strict";
granary.painting = (() => {
  const { ink } = granary;
  const PER_FRAME = 1200; // edges drawn before the page may do something else

  // Everything onto a canvas context, in steps.
  function* render(context, { net, vis, place, looks, labels, straight, order }, t, { width, height }, palette) {
    backdrop(context, place, t, width, palette);
    titles(context, place, t, palette);
    const many = vis.edges.length > 1500;
    let waiting = 0;
    const runs = [];
    ink.runs(net, vis.edges, (edges, strength, positive) => runs.push([edges, strength, positive]));
    for (const [edges, strength, positive] of runs) {
      strokes(context, { net, place, straight }, edges, t, { width: ink.width(strength), opacity: ink.opacity(strength, many), colour: positive ? palette.excite : palette.suppress });
      waiting += edges.length;
      if (waiting < PER_FRAME) continue;
      waiting = 0;
      yield;
    }
    for (const i of order) symbol(context, net.nodes[i], looks[i], place.x[i] * t.k + t.x, place.y[i] * t.k + t.y, t.k, palette);
    if (place.dx * t.k > 40) for (const i of order) caption(context, i, { net, place, looks, labels }, t, palette, false);
    else for (const i of order) if (net.nodes[i].target) caption(context, i, { net, place, looks, labels }, t, palette, true);
  }

  function backdrop(context, place, t, width, { wash, line }) {
    context.fillStyle = wash;
    place.bands.forEach(({ top, bottom }, k) => k % 2 === 0 && context.fillRect(0, top * t.k + t.y, width, (bottom - top) * t.k));
    context.strokeStyle = line;
    context.lineWidth = 1;
    for (let k = 1; k < place.rooms.length; k++) {
      const x = Math.round(((place.rooms[k - 1].right + place.rooms[k].left) / 2) * t.k + t.x) + 0.5;
      context.setLineDash([3, 4]);
      context.beginPath();
      context.moveTo(x, place.bands[0].top * t.k + t.y);
      context.lineTo(x, place.bands.at(-1).bottom * t.k + t.y);
      context.stroke();
      context.setLineDash([]);
    }
  }

  // What the bands and the rooms are called; said again over what is pointed at, for the rest is dim then.
  function titles(context, place, t, { soft }) {
    context.font = `12px ${ink.FONT}`;
    context.textBaseline = "middle";
    context.fillStyle = soft;
    context.textAlign = "left";
    for (const { title, top, bottom } of place.bands) if ((bottom - top) * t.k > 14) context.fillText(title, 8, ((top + bottom) / 2) * t.k + t.y);
    context.textAlign = "center";
    for (const { name, left, right } of place.rooms) context.fillText(`${granary.words.STREAMS[name]} stream`, ((left + right) / 2) * t.k + t.x, Math.max(14, place.bands[0].top * t.k + t.y - 10));
  }

  function strokes(context, { net, place, straight }, edges, t, { width, opacity, colour }) {
    const { source, target } = net.edges;
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.globalAlpha = opacity;
    context.beginPath();
    for (const e of edges) ink.edge(context, place.x[source[e]] * t.k + t.x, place.y[source[e]] * t.k + t.y, place.x[target[e]] * t.k + t.x, place.y[target[e]] * t.k + t.y, straight);
    context.stroke();
    context.globalAlpha = 1;
  }

  function symbol(context, node, look, x, y, scale, palette) {
    const radius = ink.screenRadius(look.radius, scale);
    const { fill, stroke } = ink.colours(node, look, palette);
    context.translate(x, y);
    context.beginPath();
    if (node.kind === "feature") context.arc(0, 0, radius, 0, 2 * Math.PI);
    else ink.symbol(node.kind).size(ink.area(node.kind, radius)).context(context)();
    context.fillStyle = fill;
    context.fill();
    context.strokeStyle = stroke;
    context.lineWidth = node.target ? 2.2 : 1.2;
    context.stroke();
    if (node.kind === "group") {
      context.beginPath();
      context.arc(0, 0, radius + 3, 0, 2 * Math.PI);
      context.stroke();
    }
    context.translate(-x, -y);
  }

  function caption(context, i, { net, place, looks, labels }, t, { ink: words, card }, bold) {
    const node = net.nodes[i];
    const y = place.y[i] * t.k + t.y + ink.screenRadius(looks[i].radius, t.k) + 9 + (node.kind === "group" ? 3 : 0);
    context.font = `${bold ? 600 : 400} 11px ${ink.FONT}`;
    context.textAlign = "center";
    context.lineWidth = 3;
    context.lineJoin = "round";
    context.strokeStyle = card;
    const text = granary.words.short(node, labels(node));
    const x = place.x[i] * t.k + t.x;
    context.strokeText(text, x, y);
    context.fillStyle = words;
    context.fillText(text, x, y);
  }

  // What is pointed at, over the rest: its edges and nodes, and rings around those that are chosen or pinned.
  function marked(context, now, { nodes, edges, main, rings }, t, palette) {
    const { net, place, looks } = now;
    context.textBaseline = "middle";
    if (nodes) {
      titles(context, place, t, palette);
      const straight = edges.length > ink.STRAIGHT;
      ink.runs(net, edges, (run, strength, positive) => strokes(context, { net, place, straight }, run, t, { width: ink.width(strength, 1.3), opacity: Math.max(0.55, ink.opacity(strength, false)), colour: positive ? palette.excite : palette.suppress }));
      for (const i of nodes) symbol(context, net.nodes[i], looks[i], place.x[i] * t.k + t.x, place.y[i] * t.k + t.y, t.k, palette);
      const spelt = nodes.size <= 40 || place.dx * t.k > 40 ? [...nodes] : [];
      for (const i of spelt) caption(context, i, now, t, palette, i === main);
    }
    context.lineWidth = 2;
    for (const [i, colour] of rings) {
      context.strokeStyle = palette[colour];
      context.beginPath();
      context.arc(place.x[i] * t.k + t.x, place.y[i] * t.k + t.y, ink.screenRadius(looks[i].radius, t.k) + 5, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  return { PER_FRAME, render, marked };
})();
