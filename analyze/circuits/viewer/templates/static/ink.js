// How nodes and edges look: form says what a node is, size how much it matters, colour whether it excites or suppresses the target.
"use strict";
granary.ink = (() => {
  const SYMBOLS = {
    feature: d3.symbolCircle, error: d3.symbolSquare, input: d3.symbolTriangle, rest: d3.symbolDiamond, bias: d3.symbolCross, dropped: d3.symbolWye,
    supernode: d3.symbolStar, group: d3.symbolCircle,
  };
  const NAMES = ["ink", "soft", "paper", "card", "line", "wash", "accent", "excite", "suppress"];
  const STRAIGHT = 3000; // edges from which on they are straight: a third of the time of curves
  const TOGETHER = [[300, 1], [2000, 6], [Infinity, 48]]; // of how many edges how many have one width, and are drawn in one go
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

  const palette = () => Object.fromEntries(NAMES.map((name) => [name, granary.show.colour(name)]));

  // Radius of each node in cells of 24, and how sure its colour is: 1 where all its influence has one sign.
  function looks(net) {
    let most = 1e-30;
    for (const node of net.nodes) if (!node.target && node.kind !== "group") most = Math.max(most, node.weight);
    return net.nodes.map((node) => {
      const share = Math.min(1, node.weight / most);
      const radius = node.target ? 12 : node.kind === "group" ? 8 + 5 * Math.sqrt(share) : 3.4 + 7 * Math.sqrt(share);
      const sign = node.target ? 1 : Math.sign(node.effect) || 0;
      const sure = node.target ? 1 : node.weight > 0 ? Math.min(1, Math.abs(node.effect || 0) / node.weight) : 0;
      return { radius, sign, sure };
    });
  }

  const screenRadius = (radius, scale) => Math.min(26, Math.max(2, radius * Math.min(scale, 2.2)));

  // The edges from the weakest to the strongest in runs of one strength: calls draw(edges, strength 0 to 1, positive).
  function runs(net, edges, draw) {
    const { score, value } = net.edges;
    const most = edges.length ? Math.max(1e-30, score[edges[0]]) : 1;
    const [, together] = TOGETHER.find(([count]) => edges.length <= count);
    for (let end = edges.length; end > 0; end -= together) {
      const run = edges.subarray(Math.max(0, end - together), end);
      const strength = Math.sqrt(score[run[0]] / most);
      const positive = run.filter((e) => value[e] >= 0);
      if (positive.length) draw(positive, strength, true);
      if (positive.length < run.length) draw(run.filter((e) => value[e] < 0), strength, false);
    }
  }

  const width = (strength, bold = 1) => bold * (0.5 + 3.2 * strength);
  const opacity = (strength, many) => Math.min(0.95, (many ? 0.1 : 0.26) + 0.6 * strength);

  // One edge as a path, on a canvas or a d3.path.
  function edge(pen, x0, y0, x1, y1, straight) {
    pen.moveTo(x0, y0);
    if (straight) return pen.lineTo(x1, y1);
    if (Math.abs(y1 - y0) < 2) return pen.quadraticCurveTo((x0 + x1) / 2, y0 - 0.25 * Math.abs(x1 - x0), x1, y1);
    const middle = (y0 + y1) / 2;
    return pen.bezierCurveTo(x0, middle, x1, middle, x1, y1);
  }

  const symbols = new Map();
  function symbol(kind) {
    if (!symbols.has(kind)) symbols.set(kind, d3.symbol().type(SYMBOLS[kind]));
    return symbols.get(kind);
  }
  const area = (kind, radius) => (kind === "feature" || kind === "group" ? Math.PI : 2.4) * radius * radius;

  // Fill and stroke: features are filled, what stands for something unexplained or constant is drawn hollow.
  function colours(node, look, { excite, suppress, soft, card, ink }) {
    const base = look.sign > 0 ? excite : look.sign < 0 ? suppress : soft;
    const solid = ["feature", "group", "supernode"].includes(node.kind);
    const fill = solid ? d3.interpolateRgb(card, base)(0.3 + 0.7 * look.sure) : card;
    return { fill: d3.color(fill).formatHex(), stroke: node.target ? ink : base };
  }

  return { SYMBOLS, STRAIGHT, FONT, palette, looks, screenRadius, runs, width, opacity, edge, symbol, area, colours };
})();
