// Where nodes stand: layers upwards, text on the left and image on the right, and in each of these rooms tokens from left to right,
// or, over tokens, each node near what it adds to.
"use strict";
granary.layers = (() => {
  const MANY = 140; // nodes from which on they stand closer and have no words beneath
  const ROOMS = ["txt", "img", "joint"];
  const AISLE = 1.4; // cells between the streams

  // {x, y by node; bands and rooms to draw behind; width, height}.  `aspect`: width over height of what it is drawn on.
  function placed(net, vis, aspect, byToken) {
    const cells = roomed(net, vis);
    const wide = vis.count > MANY ? { dx: 24, dy: 24, gap: 22 } : { dx: 62, dy: 48, gap: 34 };
    const rooms = ROOMS.filter((room) => cells.bands.some((band) => band.rooms[room].length));
    const columns = best(cells.bands, rooms, aspect, wide);
    const place = { x: new Float32Array(net.count).fill(NaN), y: new Float32Array(net.count), bands: [], rooms: [], roomy: vis.count <= MANY, ...wide };
    let left = 0;
    for (const room of rooms) {
      const width = columns[room] * wide.dx;
      place.rooms.push({ name: room, left, right: left + width });
      left += width + AISLE * wide.dx;
    }
    place.width = Math.max(left - AISLE * wide.dx, wide.dx);
    let y = 0;
    for (const band of [...cells.bands].reverse()) { // from the top: what lies above is placed before what adds to it
      const heights = rooms.map((room) => rows(band.rooms[room], columns[room]));
      const height = Math.max(1, ...heights) * wide.dy;
      place.bands.push({ title: band.title, top: y - wide.gap / 2, bottom: y + height + wide.gap / 2 });
      for (const { name, left: start, right } of place.rooms) fill(net, vis, place, band.rooms[name], { start, right, y, height, columns: columns[name], byToken });
      y += height + wide.gap;
    }
    place.height = Math.max(y - wide.gap, wide.dy);
    return place;
  }

  // The nodes of each band (a layer; inputs below, targets that are supernodes above) and stream; features, then the rest.
  function roomed(net, vis) {
    const levels = new Map();
    const top = Math.max(-1, ...net.nodes.map((node) => node.layer)) + 1;
    net.nodes.forEach((node, i) => {
      if (!vis.mask[i]) return;
      const level = below(node) ? -1 : node.layer < 0 ? top : node.layer;
      if (!levels.has(level)) levels.set(level, { level, rooms: { txt: [], img: [], joint: [] } });
      levels.get(level).rooms[node.stream || (node.kind === "dropped" ? "txt" : "img")].push(i);
    });
    const bands = [...levels.values()].sort((a, b) => a.level - b.level);
    for (const band of bands) band.title = band.level < 0 ? "input" : band.level === top ? "target" : `block ${band.level}`;
    return { bands };
  }

  const below = (node) => node.kind === "input" || node.kind === "dropped" || (node.kind === "group" && node.members.every(below));
  const rows = (list, columns) => Math.ceil(list.length / Math.max(1, columns));

  // The numbers of columns of the rooms that make the whole fit the page best.
  function best(bands, rooms, aspect, { dx, dy, gap }) {
    const most = Object.fromEntries(rooms.map((room) => [room, Math.max(...bands.map((band) => band.rooms[room].length))]));
    const share = Object.fromEntries(rooms.map((room) => [room, Math.sqrt(most[room])]));
    const total = rooms.reduce((sum, room) => sum + share[room], 0);
    let found = null;
    for (let width = rooms.length; width <= 400; width = Math.ceil(width * 1.07)) {
      const columns = Object.fromEntries(rooms.map((room) => [room, Math.min(most[room], Math.max(1, Math.round((width * share[room]) / total)))]));
      const w = (rooms.reduce((sum, room) => sum + columns[room], 0) + AISLE * (rooms.length - 1)) * dx;
      const h = bands.reduce((sum, band) => sum + Math.max(1, ...rooms.map((room) => rows(band.rooms[room], columns[room]))) * dy + gap, 0);
      const off = Math.abs(Math.log(w / h / aspect));
      if (!found || off < found.off - 1e-9) found = { off, columns };
    }
    return found.columns;
  }

  // Columns are filled one after the other, so that left and right mean something however many rows there are.
  function fill(net, vis, place, list, { start, right, y, height, columns, byToken }) {
    if (!list.length) return;
    const byWeight = [...list].sort((a, b) => net.nodes[b].weight - net.nodes[a].weight || a - b);
    const aside = (k) => ((k % 2 ? 1 : -1) * k) / 1e3; // what nothing pulls stands around the strongest of its kind
    const wanted = new Map(byWeight.map((i, k) => [i, byToken && net.nodes[i].token >= 0 ? net.nodes[i].token : pull(net, vis, place, i, (start + right) / 2 + aside(k))]));
    const late = (i) => (["feature", "group", "supernode", "input"].includes(net.nodes[i].kind) ? 0 : 1);
    const order = [...list].sort((a, b) => (byToken ? late(a) - late(b) : 0) || wanted.get(a) - wanted.get(b) || net.nodes[b].weight - net.nodes[a].weight || a - b);
    const deep = rows(list, columns);
    const across = Math.ceil(list.length / deep);
    const spread = (right - start) / across;
    const step = Math.min(spread, place.dx * (place.roomy ? 2.2 : 1.5));
    const from = (start + right) / 2 - (across * step) / 2;
    const down = Math.min(height / deep, place.dy * 1.5);
    order.forEach((i, k) => {
      const column = Math.floor(k / deep);
      place.x[i] = from + (column + 0.5) * step;
      place.y[i] = y + height / 2 + ((k % deep) - (deep - 1) / 2) * down;
    });
  }

  // Where what it adds to stands, on average; these are placed already, for they lie above.
  function pull(net, vis, place, node, middle) {
    let sum = 0;
    let weight = 0;
    for (const e of granary.network.edgesOf(net.outof, node)) {
      const x = place.x[net.edges.target[e]];
      if (!vis.edgeMask[e] || Number.isNaN(x)) continue; // in the same layer: not placed yet
      const size = Math.abs(net.edges.value[e]);
      sum += size * x;
      weight += size;
    }
    return weight ? sum / weight : middle;
  }

  return { placed };
})();
