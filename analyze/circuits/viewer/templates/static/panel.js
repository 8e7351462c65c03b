// What is known of the node that is chosen, or of the graph: figures, what it is made of, its strongest edges, examples, its label.
"use strict";
granary.panel = (() => {
  const { h, show } = granary;
  const LISTED = 8;
  const EXAMPLES = 4;
  let room, calls;
  let asked = 0;

  function open(element, callbacks) {
    room = element;
    calls = callbacks;
  }

  // The dictionary that a node's feature is of, as {name, full_name, identity, in_report}; null for other nodes.
  const dictionary = (node, graph) => (node.kind === "feature" ? graph.entry.dictionaries[`${node.stream}_${node.layer}`] || null : null);

  function label(node, graph) {
    const of = dictionary(node, graph);
    return of ? granary.labels.text(of.name, node.feature) : "";
  }

  function of(i, graph, net, state) {
    asked++;
    if (i === null) return room.replaceChildren(about(graph, net));
    const node = net.nodes[i];
    const said = label(node, graph);
    room.replaceChildren(...[
      h("section", { class: "box", id: "node" },
        h("h2", { tabindex: "-1", id: "node-name" }, h("bdi", {}, granary.words.title(node, graph.facts)), h("span", { id: "shown-label" }, said && h("bdi", {}, said))),
        h("p", { class: "quiet" }, kind(node, graph, state)), actions(i, node, state), figures(node, graph), node.members ? members(node, graph) : null),
      edges("What it is made of", "incoming", i, graph, net), edges("What it adds to", "outgoing", i, graph, net),
      dictionary(node, graph) ? labelling(node, graph) : null, dictionary(node, graph) ? examples(node, graph) : null,
    ].filter(Boolean));
  }

  const kind = (node, graph, state) => [
    node.target ? `Target${traced(node, graph)}. ` : "",
    granary.words.meaning(node, state.view === "aggregated") || `Feature ${node.feature} of ${dictionary(node, graph)?.full_name || `the transcoder of ${node.stream}_${node.layer}`}, ${granary.words.STREAMS[node.stream]} stream, block ${node.layer}.`,
  ].join("");

  // Over tokens a target says where it was traced from.
  function traced(node, graph) {
    const places = node.token < 0 ? granary.words.tracedAt(node, graph.facts).map((token) => granary.words.place(node.stream, token, graph.facts)) : [];
    return places.length ? `, traced at ${places.join("; ")}` : "";
  }

  function actions(i, node, state) {
    const pinned = state.pins.includes(node.name);
    const choose = (follow, text, key) => h("label", {}, h("input", { type: "radio", name: "follow", value: follow, checked: state.follow === follow, on: { change: () => calls.follow(follow) } }), text, h("kbd", {}, key));
    return h("div", { class: "acts" },
      h("fieldset", { class: "looks" }, h("legend", {}, "Paths"), choose("near", "next", "n"), choose("down", "what leads here", "d"), choose("up", "what it leads to", "u"), choose("both", "both", "b")),
      h("p", { class: "buttons" }, h("button", { type: "button", id: "pin", "aria-pressed": String(pinned), on: { click: () => calls.pin(node.name) } }, pinned ? "Unpin" : "Pin"), " ",
        node.kind === "group" ? h("button", { type: "button", id: "ungroup", on: { click: () => calls.ungroup(node.term) } }, "Take apart") : null));
  }

  function figures(node, { facts }) {
    const targets = facts.targets || [];
    const pre = targets.reduce((sum, of) => sum + (of.pre ?? NaN), 0);
    const whole = `${targets.length > 1 ? "the targets' pre-activations, together" : "the target's pre-activation"}${Number.isNaN(pre) ? "" : ` ${granary.words.number(pre)}`}`;
    const sign = node.effect > 0 ? "excites" : "suppresses";
    const rows = [
      ["Activation z", node.activation, node.token < 0 ? "the largest over its tokens" : null], ["Pre-activation", node.pre, null], ["Influence on the targets", node.influence, "a share, 1 for the target itself: along all paths, whatever their sign"],
      ["Effect on the targets", node.target ? NaN : node.effect, node.effect ? `of ${whole}: ${sign}, all paths together` : null, true],
      ["Conservation", node.conservation, "what its edges miss of its pre-activation, before any threshold"],
    ].filter(([, value]) => value !== null && value !== undefined && !Number.isNaN(value));
    if (node.order >= 0) rows.push(["Expanded", node.order === 0 ? "target" : `as number ${node.order}`, null]);
    return h("dl", { class: "rows" }, ...rows.map(([name, value, meaning, signed]) => h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "string" ? value : signed ? granary.words.signed(value) : granary.words.number(value)), meaning && h("dd", { class: "meaning" }, meaning))));
  }

  const members = (node, graph) => h("details", {}, h("summary", {}, `${node.members.length} members`), h("ul", {}, ...node.members.map((each) => h("li", {}, h("bdi", {}, granary.words.title(each, graph.facts))))));

  // The sums of a node's edges by where they come from, then the strongest that excite and that suppress.
  function edges(title, side, i, graph, net) {
    const incoming = side === "incoming";
    const list = [...granary.network.edgesOf(incoming ? net.into : net.outof, i)];
    const far = incoming ? net.edges.source : net.edges.target;
    const { value } = net.edges;
    const total = list.reduce((sum, e) => sum + Math.abs(value[e]), 0);
    if (!list.length) return incoming && net.nodes[i].kind === "feature" ? h("section", { class: "box" }, h("h3", {}, title), h("p", { class: "quiet" }, "It was not expanded: what makes it fire is not in this graph.")) : null;
    const most = list.reduce((top, e) => Math.max(top, Math.abs(value[e])), 0);
    const strongest = (positive) => list.filter((e) => (value[e] > 0) === positive && value[e] !== 0).sort((a, b) => Math.abs(value[b]) - Math.abs(value[a]) || a - b);
    const group = (positive) => {
      const all = strongest(positive);
      const word = positive ? (incoming ? "Excited by" : "Excites") : incoming ? "Suppressed by" : "Suppresses";
      const sum = all.reduce((whole, e) => whole + value[e], 0);
      return h("div", { class: positive ? "excites" : "suppresses" }, h("h4", {}, word, h("small", {}, all.length ? ` ${all.length}, together ${granary.words.signed(sum)}` : " nothing")),
        h("ul", { class: "edges" }, ...all.slice(0, LISTED).map((e) => row(far[e], value[e], most, total, graph, net))), more(all, far, value, most, total, graph, net));
    };
    return h("section", { class: `box ${side}`, id: side }, h("h3", {}, title), incoming ? shares(list, far, value, net) : null,
      h("p", { class: "quiet why" }, incoming ? `In units of its pre-activation${own(net.nodes[i])}; a percentage is the edge's part of all that comes in, excitation and suppression alike.` : "Each in units of the pre-activation of the node that it goes to; a percentage is the edge's part of all that goes out."), group(true), group(false));
  }

  const own = (node) => (Number.isNaN(node.pre) ? "" : ` ${granary.words.number(node.pre)}`);

  function more(all, far, value, most, total, graph, net) {
    if (all.length <= LISTED) return null;
    const rest = h("details", {}, h("summary", {}, `${all.length - LISTED} more`));
    rest.addEventListener("toggle", () => rest.childElementCount === 1 && rest.append(h("ul", { class: "edges" }, ...all.slice(LISTED, 200).map((e) => row(far[e], value[e], most, total, graph, net)))));
    return rest;
  }

  function row(i, value, most, total, graph, net) {
    const node = net.nodes[i];
    const said = label(node, graph);
    const share = total ? show.percent(Math.abs(value) / total) : "";
    return h("li", {}, h("button", { type: "button", class: "edge", "data-node": node.name, on: { click: () => calls.choose(i), pointerenter: () => calls.hover(i), pointerleave: () => calls.hover(null), focus: () => calls.hover(i), blur: () => calls.hover(null) } },
      h("span", { class: "meter", style: { "--part": `${(100 * Math.abs(value)) / most}%` }, "aria-hidden": "true" }), h("span", { class: "who" }, granary.words.title(node, graph.facts), said ? h("b", {}, " ", h("bdi", {}, said)) : null),
      h("span", { class: "value" }, granary.words.signed(value)), h("small", {}, share)));
  }

  // Where what comes in comes from: a bar to the right for what excites, to the left for what suppresses.
  function shares(list, far, value, net) {
    const sums = new Map();
    for (const e of list) {
      const node = net.nodes[far[e]];
      const name = node.kind === "input" || node.kind === "feature" ? `${granary.words.STREAMS[node.stream] || ""} ${node.kind}s`.trim() : { error: "errors", rest: "other features", bias: "biases", dropped: "dropped", supernode: "supernodes", group: "supernodes" }[node.kind];
      const sum = sums.get(name) || { up: 0, down: 0 };
      if (value[e] > 0) sum.up += value[e];
      else sum.down -= value[e];
      sums.set(name, sum);
    }
    const rows = [...sums].sort(([, a], [, b]) => b.up + b.down - a.up - a.down);
    return bars(rows.map(([name, { up, down }]) => ({ name, up, down, said: granary.words.signed(up - down) })), "Sums of incoming edges by kind");
  }

  function bars(rows, caption) {
    const most = Math.max(...rows.flatMap(({ up, down }) => [up, down]));
    const part = (size) => `${(100 * size) / most}%`;
    return h("table", { class: "shares" }, h("caption", { class: "unseen" }, caption), h("tbody", {}, ...rows.map(({ name, up, down, said }) => h("tr", {}, h("th", { scope: "row" }, name),
      h("td", { class: "left" }, h("i", { class: "suppress", style: { width: part(down) } })), h("td", { class: "right" }, h("i", { class: "excite", style: { width: part(up) } })),
      h("td", { class: "num" }, said)))));
  }

  function labelling(node, graph) {
    const of = dictionary(node, graph);
    const problem = h("p", { class: "problem", role: "alert" });
    const text = h("input", { name: "text", id: "label-text", autocomplete: "off", maxlength: "200", placeholder: "what it stands for", value: granary.labels.text(of.name, node.feature) });
    const author = h("input", { name: "author", autocomplete: "name", maxlength: "200", placeholder: "your name", value: granary.labels.author() });
    const submit = (event) => {
      event.preventDefault();
      const wrong = granary.labels.set(of.name, node.feature, text.value, author.value);
      problem.textContent = wrong || (granary.labels.stored() ? "" : "This browser keeps nothing: export your labels before you close the page.");
    };
    const said = granary.labels.history(of.name, node.feature).reverse();
    return h("section", { class: "box", id: "labelling" }, h("h3", {}, "Label"), h("form", { on: { submit } }, h("label", {}, h("span", {}, "Text"), text), h("label", {}, h("span", {}, "By"), author), h("button", {}, "Save")), problem,
      h("ol", { class: "history" }, ...said.map((each) => h("li", {}, h("b", {}, h("bdi", {}, each.text || "(taken away)")), h("small", {}, " ", h("bdi", {}, each.author), `, ${each.time.slice(0, 10)}`)))));
  }

  // The pictures on which a feature is strongest, where the page stands beside a report.
  function examples(node, graph) {
    const of = dictionary(node, graph);
    if (!of.in_report) return null;
    const box = h("section", { class: "box", id: "examples-box" }, h("h3", {}, "Examples"));
    const { steps } = granary.features.report();
    const step = steps.includes(graph.facts.step) ? graph.facts.step : steps[0];
    const turn = asked;
    const strip = h("div", { class: "examples" });
    box.append(strip, h("p", {}, h("a", { href: `index.html#/feature/${encodeURIComponent(of.name)}/${step}/${node.feature}` }, `${of.name}/${node.feature} in the report`)));
    granary.examples.record(of.name, step, node.feature).then(async (found) => {
      found.activations = found.activations.slice(0, EXAMPLES);
      const prepared = await granary.examples.prepare(of.name, found);
      if (turn !== asked) return;
      strip.classList.toggle("texts", prepared.stream === "txt");
      strip.replaceChildren(...(prepared.list.length ? prepared.list.map((each, k) => granary.examples.one(each, prepared, "smooth", k)) : [h("p", { class: "quiet" }, "active on no image of the report")]));
    }).catch((error) => strip.replaceChildren(h("p", { class: "problem" }, error.message)));
    return box;
  }

  // The graph as a whole, while no node is chosen.
  function about(graph, net) {
    const { facts } = graph;
    const totals = facts.totals || {};
    const count = (value) => (typeof value === "number" ? show.whole(value) : null);
    const rows = [
      ["Image, step", `${facts.image}, step ${facts.step}${facts.sigma === undefined || facts.sigma === null ? "" : ` (sigma ${show.number(facts.sigma, 4)})`}`], ["Nodes, edges", `${show.whole(net.count)}, ${show.whole(net.edges.source.length)}`],
      ["Expanded", count(totals.expanded)], ["Conservation", totals.conservation === undefined ? null : Number(totals.conservation).toExponential(1)],
      ["Left out of this page", net.leftOut.edges ? `the weakest: ${show.whole(net.leftOut.nodes)} nodes, ${show.whole(net.leftOut.edges)} edges` : net.leftOut.nodes ? `${show.whole(net.leftOut.nodes)} node${net.leftOut.nodes === 1 ? "" : "s"} without an edge` : null],
    ].filter(([, value]) => value !== null && value !== undefined);
    const targets = net.nodes.map((node, i) => [node, i]).filter(([node]) => node.target);
    return h("section", { class: "box", id: "about" }, h("h2", {}, targets.length > 1 ? "Targets" : "Target"),
      h("ul", { class: "edges" }, ...targets.slice(0, 12).map(([node, i]) => h("li", {}, h("button", { type: "button", class: "edge", "data-node": node.name, on: { click: () => calls.choose(i), pointerenter: () => calls.hover(i), pointerleave: () => calls.hover(null) } },
        h("span", { class: "who" }, granary.words.title(node, facts) + (traced(node, graph)), label(node, graph) ? h("b", {}, " ", h("bdi", {}, label(node, graph))) : null), h("span", { class: "value" }, Number.isNaN(node.pre) ? "" : `pre ${granary.words.number(node.pre)}`))))),
      h("dl", { class: "rows" }, ...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))), tracedBack(totals.shares?.paths), targets.length ? madeOf(targets[0][1], net, targets.length > 1) : null,
      h("p", { class: "quiet" }, "Choose a node to see what it is made of."));
  }

  function madeOf(i, net, several) {
    const list = [...granary.network.edgesOf(net.into, i)];
    return list.length ? h("div", {}, h("h3", {}, several ? "The first target is made of" : "Made of", h("small", {}, "its incoming edges")), shares(list, net.edges.source, net.edges.value, net)) : null;
  }

  // Where the pre-activation comes from along all paths of the whole graph, as shares that add up to 1.
  function tracedBack(paths) {
    if (!paths) return null;
    const names = { img: "image inputs", txt: "text inputs", error: "errors", bias: "biases", rest: "other features", dropped: "dropped" };
    const rows = Object.entries(paths).filter(([, share]) => share !== 0).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a)).map(([key, share]) => ({ name: names[key] || key, up: Math.max(0, share), down: Math.max(0, -share), said: `${share < 0 ? "−" : "+"}${show.percent(Math.abs(share))}` }));
    return rows.length ? h("div", {}, h("h3", {}, "Traced back", h("small", {}, "along all paths, of the pre-activation")), bars(rows, "Shares of the pre-activation along all paths")) : null;
  }

  return { open, of, label };
})();
