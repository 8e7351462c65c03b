// Supernodes by hand: nodes drawn as one, whose edges are the sums of theirs; edges between members are inside and not drawn.
"use strict";
granary.grouping = (() => {
  // Whether a group can be seen in a network: it has all members.  One per token has none of one over tokens, and the other way round.
  const fits = (net, { names }) => names.every((name) => net.index.has(name));

  // The network with the groups, [{title, names}], that fit it; a node belongs to the first group that names it.
  function applied(net, groups) {
    const of = new Int32Array(net.count).fill(-1);
    const found = [];
    for (const { title, names } of groups.filter((group) => fits(net, group))) {
      const members = names.map((name) => net.index.get(name)).filter((i) => i !== undefined && of[i] < 0);
      if (!members.length) continue;
      for (const i of members) of[i] = found.length;
      found.push({ title, members });
    }
    if (!found.length) return net;
    const nodes = [];
    const place = new Int32Array(net.count);
    net.nodes.forEach((node, i) => {
      if (of[i] < 0) place[i] = nodes.push({ ...node, row: i }) - 1;
    });
    const first = nodes.length;
    for (const { title, members } of found) nodes.push(joined(title, members, net));
    for (let i = 0; i < net.count; i++) if (of[i] >= 0) place[i] = first + of[i];
    return granary.network.finished({ nodes, edges: summed(net, place, nodes.length), maps: net.maps, base: net, leftOut: net.leftOut });
  }

  function joined(title, members, net) {
    const all = members.map((i) => net.nodes[i]);
    const same = (key, none) => (all.every((node) => node[key] === all[0][key]) ? all[0][key] : none);
    const sum = (key) => all.reduce((total, node) => total + (node[key] || 0), 0);
    return {
      kind: "group", name: `group_${title}`, term: title, members: members.map((i) => ({ ...net.nodes[i], row: i })), stream: same("stream", null) || all.find((node) => node.stream)?.stream || null,
      layer: Math.max(...all.map((node) => node.layer)), token: same("token", -1), feature: -1, order: -1, target: all.some((node) => node.target),
      activation: NaN, pre: NaN, influence: sum("influence"), effect: sum("effect"), conservation: NaN,
    };
  }

  function summed({ edges }, place, count) {
    const sums = new Map();
    for (let e = 0; e < edges.source.length; e++) {
      const source = place[edges.source[e]];
      const target = place[edges.target[e]];
      if (source === target) continue;
      const key = source * count + target;
      sums.set(key, (sums.get(key) || 0) + edges.value[e]);
    }
    const keys = [...sums.keys()];
    return {
      source: Int32Array.from(keys, (key) => Math.floor(key / count)), target: Int32Array.from(keys, (key) => key % count), value: Float32Array.from(sums.values()),
    };
  }

  return { applied, fits };
})();
