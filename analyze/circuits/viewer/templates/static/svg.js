// The graph as an SVG file, as it is seen: crisp at any size, to be edited, every node with its title, above it what it is of.
"use strict";
granary.svg = (() => {
  const MARGIN = { left: 70, right: 30, top: 100, bottom: 30 };
  const FAINT = 0.2;
  const FAMILY = "sans-serif";
  const printable = (text) => text.replace(/[^\t\n\r\x20-\x7e\u00a0-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, ""); // XML has no control characters
  const escaped = (text) => printable(text).replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);
  const fixed = (value) => Number(value.toFixed(2));

  // `marked`: what stands out, the rest is faint then; its rings.  `headline`: two lines above.
  function text(scene, marked, title, facts, headline) {
    const { net, vis, place } = scene;
    const palette = granary.ink.palette();
    const width = fixed(Math.max(560, place.width + MARGIN.left + MARGIN.right));
    const height = fixed(place.height + MARGIN.top + MARGIN.bottom);
    const pen = { palette, facts, x: (i) => fixed(place.x[i] + MARGIN.left), y: (i) => fixed(place.y[i] + MARGIN.top) };
    const out = marked?.nodes ? marked : null;
    const nodes = net.nodes.map((_, i) => i).filter((i) => vis.mask[i]);
    const shown = new Set(nodes);
    const above = out ? nodes.filter((i) => out.nodes.has(i)) : [];
    const under = nodes.filter((i) => !out?.nodes.has(i));
    const spelt = captions(scene, above, under, out?.main ?? null, { width, height });
    const lines = [
      `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" font-family="${FAMILY}" font-size="11">`,
      `<title>${escaped([title, ...headline].join(" · "))}</title>`, `<rect width="100%" height="100%" fill="${palette.card}"/>`, ...heading(headline, palette, width), ...backdrop(place, width, palette),
      `<g class="all"${out ? ` opacity="${FAINT}"` : ""}>`, ...edges(scene, vis.edges, pen), ...under.map((i) => node(scene, i, pen, spelt)), "</g>",
      `<g class="out">`, ...(out ? edges(scene, out.edges, pen, 1.3) : []), ...above.map((i) => node(scene, i, pen, spelt)), "</g>",
      ...(marked?.rings || []).filter(([i]) => shown.has(i)).map(([i, colour]) => `<circle class="ring" cx="${pen.x(i)}" cy="${pen.y(i)}" r="${fixed(granary.ink.screenRadius(scene.looks[i].radius, 1) + 5)}" fill="none" stroke="${palette[colour]}" stroke-width="2"/>`),
    ];
    return `${lines.join("\n")}\n</svg>\n`;
  }

  // The words of each node that has some: what stands out before the rest, the most influential first.
  function captions(scene, above, under, main, size) {
    const { net, place } = scene;
    const strongest = (list) => [...list].sort((a, b) => (b === main) - (a === main) || net.nodes[b].target - net.nodes[a].target || net.nodes[b].weight - net.nodes[a].weight);
    const list = [...strongest(above), ...strongest(under.filter((i) => place.roomy || net.nodes[i].target))];
    return new Map(granary.painting.spelt(list, scene, { k: 1, x: MARGIN.left, y: MARGIN.top }, size, main, FAMILY).map(({ i, lines }) => [i, lines]));
  }

  function heading([target, rest], palette, width) {
    const { fitted } = granary.painting;
    const key = (x, colour, word) => `<rect x="${x}" y="46" width="22" height="4" fill="${colour}"/><text x="${x + 28}" y="52" fill="${colour}">${word}</text>`;
    return [
      `<text x="8" y="18" font-size="13" font-weight="600" fill="${palette.ink}">${escaped(fitted(target, `600 13px ${FAMILY}`, width - 16))}</text>`, `<text x="8" y="35" fill="${palette.soft}">${escaped(fitted(rest, `11px ${FAMILY}`, width - 16))}</text>`,
      key(8, palette.excite, "excites"), key(90, palette.suppress, "suppresses"), `<text x="190" y="52" fill="${palette.soft}">${escaped(granary.words.LEGEND)}</text>`,
    ];
  }

  function backdrop(place, width, palette) {
    const lines = place.bands.map((band, k) => {
      const top = band.top + MARGIN.top;
      const shade = k % 2 === 0 ? `<rect x="0" y="${fixed(top)}" width="${width}" height="${fixed(band.bottom - band.top)}" fill="${palette.wash}"/>` : "";
      return `${shade}<text x="8" y="${fixed((top + band.bottom + MARGIN.top) / 2)}" fill="${palette.soft}">${escaped(band.title)}</text>`;
    });
    for (const room of place.rooms) lines.push(`<text x="${fixed((room.left + room.right) / 2 + MARGIN.left)}" y="${MARGIN.top - 24}" text-anchor="middle" fill="${palette.soft}">${granary.words.STREAMS[room.name]} stream</text>`);
    return lines;
  }

  function edges({ net, vis }, list, { palette, x, y }, bold = 1) {
    const { ink } = granary;
    const lines = ['<g class="edges" fill="none">'];
    ink.runs(net, list, (run, strength, positive) => {
      const path = d3.path();
      for (const e of run) ink.edge(path, x(net.edges.source[e]), y(net.edges.source[e]), x(net.edges.target[e]), y(net.edges.target[e]), vis.edges.length > ink.STRAIGHT);
      const opacity = bold > 1 ? Math.max(0.55, ink.opacity(strength, false)) : ink.opacity(strength, list.length > 1500);
      lines.push(`<path d="${path}" stroke="${positive ? palette.excite : palette.suppress}" stroke-width="${fixed(ink.width(strength, bold))}" opacity="${fixed(opacity)}"/>`);
    });
    return [...lines, "</g>"];
  }

  function node({ net, looks, labels }, i, { palette, facts, x, y }, spelt) {
    const { ink } = granary;
    const one = net.nodes[i];
    const { fill, stroke } = ink.colours(one, looks[i], palette);
    const radius = ink.screenRadius(looks[i].radius, 1);
    const label = labels(one);
    const words = (spelt.get(i) || []).map((line, k) => `<tspan x="0" dy="${k ? 11 : 0}">${escaped(line)}</tspan>`).join("");
    return [
      `<g transform="translate(${x(i)},${y(i)})"><title>${escaped(granary.words.title(one, facts) + (label ? ` · ${label}` : ""))}</title>`,
      `<path d="${ink.symbol(one.kind).size(ink.area(one.kind, radius)).context(null)()}" fill="${fill}" stroke="${stroke}" stroke-width="${one.target ? 2.2 : 1.2}"/>`,
      one.kind === "group" ? `<circle r="${fixed(radius + 3)}" fill="none" stroke="${stroke}" stroke-width="1.2"/>` : "",
      words ? `<text y="${fixed(radius + 12)}" text-anchor="middle"${one.target ? ' font-weight="600"' : ""} fill="${palette.ink}" paint-order="stroke" stroke="${palette.card}" stroke-width="3">${words}</text>` : "", "</g>",
    ].join("");
  }

  return { text };
})();
