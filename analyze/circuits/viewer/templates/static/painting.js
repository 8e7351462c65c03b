// The graph onto a canvas context: bands and rooms behind, edges from the weakest to the strongest, nodes, what they are called.
"use strict";
granary.painting = (() => {
  const { ink } = granary;
  const PER_FRAME = 1200; // edges drawn before the page may do something else

  // Everything onto a canvas context, in steps.
  function* render(context, { net, vis, place, looks, labels, straight, order, facts }, t, { width, height }, palette) {
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
    const now = { net, place, looks, labels, facts };
    const spelt = place.dx * t.k > (place.roomy ? 28 : 40) ? [...order].reverse() : order.filter((i) => net.nodes[i].target);
    captions(context, spelt, now, t, { width, height }, palette);
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

  // What nodes are called, the first before the next: what would lie over another's words is left out, pointing shows it.
  function captions(context, list, now, t, { width, height }, palette, main = null) {
    const boxes = [];
    for (const i of list) {
      const [x, y] = [now.place.x[i] * t.k + t.x, now.place.y[i] * t.k + t.y];
      if (x < -60 || y < -30 || x > width + 60 || y > height + 30) continue;
      const bold = i === main || now.net.nodes[i].target;
      const box = caption(context, i, now, t, palette, bold, (mine) => i === main || boxes.every((each) => each.right <= mine.left || each.left >= mine.right || each.bottom <= mine.top || each.top >= mine.bottom));
      if (box) boxes.push(box);
    }
  }

  // Words on one line, or on two where they are long and can be broken.
  function broken(text) {
    const places = [...text.matchAll(/[ -]/g)].map(({ index }) => index + 1);
    if (text.length < 11 || !places.length) return [text];
    const at = places.reduce((best, each) => (Math.abs(each - text.length / 2) < Math.abs(best - text.length / 2) ? each : best));
    return [text.slice(0, at).trimEnd(), text.slice(at)];
  }

  // Draws it where `free` says of its box that it may; the box, or null.
  function caption(context, i, { net, place, looks, labels, facts }, t, { ink: words, card }, bold, free) {
    const node = net.nodes[i];
    const y = place.y[i] * t.k + t.y + ink.screenRadius(looks[i].radius, t.k) + 9 + (node.kind === "group" ? 3 : 0);
    context.font = `${bold ? 600 : 400} 11px ${ink.FONT}`;
    context.textAlign = "center";
    context.lineWidth = 3;
    context.lineJoin = "round";
    context.strokeStyle = card;
    const lines = broken(granary.words.short(node, labels(node), facts));
    const x = place.x[i] * t.k + t.x;
    const half = Math.max(...lines.map((line) => context.measureText(line).width)) / 2;
    const box = { left: x - half, right: x + half, top: y - 5, bottom: y - 6 + 11 * lines.length };
    if (!free(box)) return null;
    context.fillStyle = words;
    lines.forEach((line, k) => {
      context.strokeText(line, x, y + 11 * k);
      context.fillText(line, x, y + 11 * k);
    });
    return box;
  }

  // What is pointed at, over the rest: its edges and nodes, and rings around those that are chosen or pinned.
  function marked(context, now, { nodes, edges, main, rings }, t, size, palette) {
    const { net, place, looks } = now;
    context.textBaseline = "middle";
    if (nodes) {
      titles(context, place, t, palette);
      const straight = edges.length > ink.STRAIGHT;
      ink.runs(net, edges, (run, strength, positive) => strokes(context, { net, place, straight }, run, t, { width: ink.width(strength, 1.3), opacity: Math.max(0.55, ink.opacity(strength, false)), colour: positive ? palette.excite : palette.suppress }));
      for (const i of nodes) symbol(context, net.nodes[i], looks[i], place.x[i] * t.k + t.x, place.y[i] * t.k + t.y, t.k, palette);
      const spelt = nodes.size <= 40 || place.dx * t.k > (place.roomy ? 28 : 40) ? [...nodes] : [];
      spelt.sort((a, b) => (b === main) - (a === main) || net.nodes[b].weight - net.nodes[a].weight);
      captions(context, spelt, now, t, size, palette, main);
    }
    context.lineWidth = 2;
    for (const [i, colour] of rings) {
      context.strokeStyle = palette[colour];
      context.beginPath();
      context.arc(place.x[i] * t.k + t.x, place.y[i] * t.k + t.y, ink.screenRadius(looks[i].radius, t.k) + 5, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  // Above a picture that leaves the page: what it is of, and what the colours mean.
  function heading(context, [target, rest], width, palette) {
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillStyle = palette.ink;
    context.font = `600 13px ${ink.FONT}`;
    context.fillText(target, 10, 15, width - 230);
    context.fillStyle = palette.soft;
    context.font = `12px ${ink.FONT}`;
    context.fillText(rest, 10, 34, width - 20);
    [["excites", palette.excite, 205], ["suppresses", palette.suppress, 115]].forEach(([word, colour, from]) => {
      context.fillStyle = colour;
      context.fillRect(width - from, 13, 22, 4);
      context.fillText(word, width - from + 28, 15);
    });
    context.fillStyle = palette.soft;
    context.fillText(granary.words.LEGEND, 10, 51, width - 20);
  }

  return { PER_FRAME, HEAD: 62, render, marked, heading, broken };
})();
