// A graph in the page: nodes and edges as columns, neighbours, what thresholds leave, paths.
//   net: {count, nodes: [{kind, layer, stream, token, feature, term, …}], names, index, edges: {source, target, value, score}, maps}
"use strict";
granary.network = (() => {
  const { numbers } = granary.packed;

  // The network of one view of a graph, as columns.py packed it.
  function of(view) {
    const columns = {};
    for (const name of ["kind", "stream", "target"]) columns[name] = numbers(view[name], "u1");
    for (const name of ["layer", "token", "feature", "order"]) columns[name] = numbers(view[name], "i4");
    for (const name of ["activation", "pre", "influence", "effect", "conservation"]) columns[name] = numbers(view[name], "f4");
    const nodes = Array.from({ length: view.count }, (_, i) => ({
      kind: view.kinds[columns.kind[i]], stream: view.streams[columns.stream[i]] || null, term: view.terms[i] ?? null, target: columns.target[i] === 1,
      layer: columns.layer[i], token: columns.token[i], feature: columns.feature[i], order: columns.order[i], activation: columns.activation[i],
      pre: columns.pre[i], influence: columns.influence[i], effect: columns.effect[i], conservation: columns.conservation[i], members: null,
    }));
    for (const node of nodes) node.name = granary.words.name(node);
    const edges = { source: numbers(view.edges.source, "i4"), target: numbers(view.edges.target, "i4"), value: numbers(view.edges.attribution, "f4") };
    const maps = view.maps && { start: numbers(view.maps.start, "i4"), token: numbers(view.maps.token, "i4"), value: numbers(view.maps.value, "f4") };
    return finished({ nodes, edges, maps, leftOut: view.left_out });
  }

  // Scores, orders and neighbours of nodes and edges that are there.
  function finished(net) {
    const { nodes, edges } = net;
    net.count = nodes.length;
    net.index = new Map(nodes.map((node, i) => [node.name, i]));
    guess_influence(net);
    score(net);
    net.nodeOrder = Uint32Array.from(nodes.keys()).sort((a, b) => nodes[b].weight - nodes[a].weight || a - b);
    net.nodeShare = cumulative(net.nodeOrder, (i) => nodes[i].weight);
    net.edgeShare = cumulative(null, (e) => edges.score[e], edges.score.length);
    net.into = adjacency(edges.target, net.count);
    net.outof = adjacency(edges.source, net.count);
    return net;
  }

  // Nodes without a known influence count by what they add to others.
  function guess_influence({ nodes, edges }) {
    const sums = new Float64Array(nodes.length);
    edges.value.forEach((value, e) => (sums[edges.source[e]] += Math.abs(value)));
    const known = nodes.some((node) => node.influence > 0);
    nodes.forEach((node, i) => (node.weight = known ? node.influence || 0 : sums[i]));
  }

  // |attribution| over the sum into its target, times the target's influence; edges are put into falling order of it.
  function score(net) {
    const { nodes, edges } = net;
    const into = new Float64Array(nodes.length);
    edges.value.forEach((value, e) => (into[edges.target[e]] += Math.abs(value)));
    const most = Math.max(1e-30, ...nodes.filter((node) => !node.target).map((node) => node.weight));
    const scores = Float64Array.from(edges.value, (value, e) => {
      const node = nodes[edges.target[e]];
      return (Math.abs(value) / Math.max(into[edges.target[e]], 1e-30)) * (node.target ? Math.max(1, most) : node.weight);
    });
    const order = Uint32Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
    for (const name of ["source", "target", "value"]) edges[name] = edges[name].constructor.from(order, (e) => edges[name][e]);
    edges.score = Float64Array.from(order, (e) => scores[e]);
    net.sumInto = into;
  }

  function cumulative(order, weight, count = order.length) {
    const sums = new Float64Array(count);
    let sum = 0;
    for (let i = 0; i < count; i++) sums[i] = sum += weight(order ? order[i] : i);
    return sum > 0 ? sums.map((each) => each / sum) : sums;
  }

  // Edges by one of their ends: those of node i are edge[start[i]] to edge[start[i + 1] - 1], strongest first.
  function adjacency(ends, count) {
    const start = new Uint32Array(count + 1);
    for (const end of ends) start[end + 1]++;
    for (let i = 0; i < count; i++) start[i + 1] += start[i];
    const next = start.slice();
    const edge = new Uint32Array(ends.length);
    ends.forEach((end, e) => (edge[next[end]++] = e));
    return { start, edge };
  }

  const edgesOf = ({ start, edge }, node) => edge.subarray(start[node], start[node + 1]);

  // How many of the strongest make up a share of the whole.
  function howMany(shares, share) {
    if (share >= 1) return shares.length;
    let low = 0;
    for (let high = shares.length; low < high; ) {
      const middle = (low + high) >> 1;
      if (shares[middle] < share) low = middle + 1;
      else high = middle;
    }
    return Math.min(low + 1, shares.length);
  }

  // What the thresholds leave: masks of nodes and edges, and the edges in falling order.  `keep`: nodes that stay anyway.
  function shown(net, { nodes: nodeShare, edges: edgeShare, hidden, keep }) {
    const candidates = new Uint8Array(net.count);
    const allowed = (i) => !hidden.has(net.nodes[i].kind);
    const most = howMany(net.nodeShare, nodeShare);
    for (let k = 0; k < most; k++) if (allowed(net.nodeOrder[k])) candidates[net.nodeOrder[k]] = 1;
    net.nodes.forEach((node, i) => node.target && (candidates[i] = 1));
    for (const i of keep) candidates[i] = 1;
    const { source, target } = net.edges;
    const mask = new Uint8Array(net.count);
    const edges = [];
    const limit = howMany(net.edgeShare, edgeShare);
    for (let e = 0; e < limit; e++) {
      if (!candidates[source[e]] || !candidates[target[e]]) continue;
      edges.push(e);
      mask[source[e]] = mask[target[e]] = 1;
    }
    net.nodes.forEach((node, i) => node.target && (mask[i] = 1));
    for (const i of keep) mask[i] = 1;
    const edgeMask = new Uint8Array(source.length);
    for (const e of edges) edgeMask[e] = 1;
    let count = 0;
    for (const one of mask) count += one;
    return { mask, edges: Uint32Array.from(edges), edgeMask, count };
  }

  // Nodes and edges on paths from (`up`: towards the targets) or to (`down`) a node, along edges that are shown.
  function paths(net, vis, node, follow) {
    const nodes = new Set([node]);
    const edges = new Set();
    const walk = (side, ends, far) => {
      const seen = new Set([node]);
      const open = [node];
      while (open.length) {
        for (const e of edgesOf(side, open.pop())) {
          if (!vis.edgeMask[e]) continue;
          edges.add(e);
          const other = ends[e];
          if (seen.has(other)) continue;
          seen.add(other);
          nodes.add(other);
          if (far) open.push(other);
        }
      }
    };
    const far = follow !== "near";
    if (follow !== "down") walk(net.outof, net.edges.target, far);
    if (follow !== "up") walk(net.into, net.edges.source, far);
    return { nodes, edges: Uint32Array.from(edges).sort() };
  }

  return { of, finished, shown, paths, edgesOf, howMany };
})();
