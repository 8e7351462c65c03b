// The whole graph, or what is pointed at in it, as an SVG file: crisp at any size, to be edited, every node with its title.
"use strict";
granary.svg = (() => {
  const MARGIN = { left: 70, right: 30, top: 40, bottom: 30 };
  const escaped = (text) => text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);
  const fixed = (value) => Number(value.toFixed(2));

  function text({ net, vis, place, looks, labels }, marked, title, facts) {
    const { ink } = granary;
    const palette = ink.palette();
    const width = fixed(place.width + MARGIN.left + MARGIN.right);
    const height = fixed(place.height + MARGIN.top + MARGIN.bottom);
    const x = (i) => fixed(place.x[i] + MARGIN.left);
    const y = (i) => fixed(place.y[i] + MARGIN.top);
    const lines = [
      `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" font-family="sans-serif" font-size="11">`,
      `<title>${escaped(title)}</title>`, `<rect width="100%" height="100%" fill="${palette.card}"/>`,
    ];
    place.bands.forEach((band, k) => {
      const top = band.top + MARGIN.top;
      if (k % 2 === 0) lines.push(`<rect x="0" y="${fixed(top)}" width="${width}" height="${fixed(band.bottom - band.top)}" fill="${palette.wash}"/>`);
      lines.push(`<text x="8" y="${fixed((top + band.bottom + MARGIN.top) / 2)}" fill="${palette.soft}">${band.title}</text>`);
    });
    for (const room of place.rooms) lines.push(`<text x="${fixed((room.left + room.right) / 2 + MARGIN.left)}" y="16" text-anchor="middle" fill="${palette.soft}">${granary.words.STREAMS[room.name]} stream</text>`);
    const edges = marked?.nodes ? marked.edges : vis.edges;
    const straight = edges.length > ink.STRAIGHT;
    lines.push('<g fill="none">');
    ink.runs(net, edges, (run, strength, positive) => {
      const path = d3.path();
      for (const e of run) ink.edge(path, x(net.edges.source[e]), y(net.edges.source[e]), x(net.edges.target[e]), y(net.edges.target[e]), straight);
      lines.push(`<path d="${path}" stroke="${positive ? palette.excite : palette.suppress}" stroke-width="${fixed(ink.width(strength))}" opacity="${fixed(ink.opacity(strength, edges.length > 1500))}"/>`);
    });
    lines.push("</g>");
    for (let i = 0; i < net.count; i++) {
      if (!vis.mask[i]) continue;
      const node = net.nodes[i];
      const { fill, stroke } = ink.colours(node, looks[i], palette);
      const radius = ink.screenRadius(looks[i].radius, 1);
      const faint = marked?.nodes && !marked.nodes.has(i) ? ' opacity="0.2"' : "";
      const label = labels(node);
      lines.push(`<g transform="translate(${x(i)},${y(i)})"${faint}><title>${escaped(granary.words.title(node, facts) + (label ? ` · ${label}` : ""))}</title>`,
        `<path d="${ink.symbol(node.kind).size(ink.area(node.kind, radius)).context(null)()}" fill="${fill}" stroke="${stroke}" stroke-width="${node.target ? 2.2 : 1.2}"/>`);
      if (place.roomy || node.target || marked?.nodes?.has(i)) lines.push(`<text y="${fixed(radius + 12)}" text-anchor="middle" fill="${palette.ink}" paint-order="stroke" stroke="${palette.card}" stroke-width="3">${escaped(granary.words.short(node, label))}</text>`);
      lines.push("</g>");
    }
    return `${lines.join("\n")}\n</svg>\n`;
  }

  return { text };
})();
