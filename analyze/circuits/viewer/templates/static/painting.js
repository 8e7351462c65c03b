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
    const list = place.dx * t.k > (place.roomy ? 28 : 40) ? [...order].reverse() : order.filter((i) => net.nodes[i].target);
    captions(context, list, now, t, { width, height }, palette);
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

  // What nodes are called, and where: [{i, lines, x, y, font}], the first before the next.  Of what would lie over another's words the
  // feature's number is tried; where that does not fit either it is left out, pointing shows it.  `family`: of the letters.
  function spelt(list, { net, place, looks, labels, facts }, t, { width, height }, main = null, family = ink.FONT) {
    const boxes = [];
    const found = [];
    for (const i of list) {
      const node = net.nodes[i];
      const [x, middle] = [place.x[i] * t.k + t.x, place.y[i] * t.k + t.y];
      if (x < -60 || middle < -30 || x > width + 60 || middle > height + 30) continue;
      const y = middle + ink.screenRadius(looks[i].radius, t.k) + 9 + (node.kind === "group" ? 3 : 0);
      const font = `${i === main || node.target ? 600 : 400} 11px ${family}`;
      const label = labels(node);
      for (const text of new Set([granary.words.short(node, label, facts), granary.words.short(node, "", facts)])) {
        const lines = broken(text);
        const half = Math.max(...lines.map((line) => measured(line, font))) / 2;
        const mine = { left: x - half, right: x + half, top: y - 5, bottom: y - 6 + 11 * lines.length };
        if (i !== main && boxes.some((each) => each.right > mine.left && each.left < mine.right && each.bottom > mine.top && each.top < mine.bottom)) continue;
        boxes.push(mine);
        found.push({ i, lines, x, y, font });
        break;
      }
    }
    return found;
  }

  function captions(context, list, now, t, size, { ink: words, card }, main = null) {
    context.textAlign = "center";
    context.lineWidth = 3;
    context.lineJoin = "round";
    context.strokeStyle = card;
    context.fillStyle = words;
    for (const { lines, x, y, font } of spelt(list, now, t, size, main)) {
      context.font = font;
      lines.forEach((line, k) => {
        context.strokeText(line, x, y + 11 * k);
        context.fillText(line, x, y + 11 * k);
      });
    }
  }

  const ruler = document.createElement("canvas").getContext("2d");
  function measured(text, font) {
    ruler.font = font;
    return ruler.measureText(text).width;
  }

  // As much of a text as a width has room for, with … where that is not all.
  function fitted(text, font, width) {
    if (measured(text, font) <= width) return text;
    const signs = [...text];
    let [low, high] = [0, signs.length];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (measured(`${signs.slice(0, middle).join("")}…`, font) <= width) low = middle;
      else high = middle - 1;
    }
    return `${signs.slice(0, low).join("").trimEnd()}…`;
  }

  // Words on one line, or on two where they are long and can be broken.
  function broken(text) {
    const places = [...text.matchAll(/[ -]/g)].map(({ index }) => index + 1);
    if (text.length < 11 || !places.length) return [text];
    const at = places.reduce((best, each) => (Math.abs(each - text.length / 2) < Math.abs(best - text.length / 2) ? each : best));
    return [text.slice(0, at).trimEnd(), text.slice(at)];
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
      const list = nodes.size <= 40 || place.dx * t.k > (place.roomy ? 28 : 40) ? [...nodes] : [];
      list.sort((a, b) => (b === main) - (a === main) || net.nodes[b].weight - net.nodes[a].weight);
      captions(context, list, now, t, size, palette, main);
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
    context.fillText(fitted(target, context.font, width - 230), 10, 15);
    context.fillStyle = palette.soft;
    context.font = `12px ${ink.FONT}`;
    context.fillText(fitted(rest, context.font, width - 20), 10, 34);
    [["excites", palette.excite, 205], ["suppresses", palette.suppress, 115]].forEach(([word, colour, from]) => {
      context.fillStyle = colour;
      context.fillRect(width - from, 13, 22, 4);
      context.fillText(word, width - from + 28, 15);
    });
    context.fillStyle = palette.soft;
    context.fillText(fitted(granary.words.LEGEND, context.font, width - 20), 10, 51);
  }

  return { PER_FRAME, HEAD: 62, render, marked, heading, spelt, fitted };
})();
