// Nodes in words: what they are called in files, on the page and aloud.
"use strict";
granary.words = (() => {
  const TERMS = {
    encoder: "the encoder's bias and what its shift by the denoising step adds", decoder: "the decoder's bias",
    value: "the bias of the value projection", output: "the bias of the attention's output projection",
    "shift-attention": "adaLN's shift before the attention", "shift-mlp": "adaLN's shift before the MLP",
    "attention-error": "attention output as it was, minus the one replayed from the trace",
    rounding: "residual and MLP input as they were, minus the replayed ones",
  };
  const KINDS = {
    feature: "feature", error: "error", input: "input", rest: "rest", bias: "bias", dropped: "dropped", supernode: "supernode", group: "supernode by hand",
  };
  const MEANINGS = {
    error: "What the transcoder here leaves unexplained of the MLP's output.",
    input: "The residual that enters block 0: the embedded picture or text.",
    rest: "Active features here that were not expanded, together.",
    dropped: "Everything under the thresholds that the graph was made with",
    supernode: "Several features that were asked for together.",
    group: "Nodes that were put together by hand on this page.",
  };
  const STREAMS = { img: "image", txt: "text", joint: "joint" };

  // feature_L3_img_p12_f66, as analyze/circuits/nodes.py names it.
  function name({ kind, layer, stream, token, feature, term }) {
    if (kind === "dropped") return "dropped";
    if (kind === "supernode") return `supernode_${term}`;
    if (kind === "bias") return `bias_L${layer}_${stream}_${term}`;
    const block = kind === "input" && token < 0 ? "" : `_L${layer}`;
    return `${kind}${block}_${stream}${token < 0 ? "" : `_p${token}`}${feature < 0 ? "" : `_f${feature}`}`;
  }

  // What people read: img_3/66 at row 2, column 4.
  function title(node, facts) {
    const site = `${node.stream}_${node.layer}`;
    const where = node.token >= 0 ? ` at ${place(node.stream, node.token, facts)}` : "";
    if (node.kind === "feature") return `${site}/${node.feature}${where}`;
    if (node.kind === "error") return `error of ${site}${where}`;
    if (node.kind === "input") return `${STREAMS[node.stream]} input${where}`;
    if (node.kind === "rest") return `other features of ${site}${where}`;
    if (node.kind === "bias") return `bias of ${site}: ${node.term}`;
    if (node.kind === "dropped") return "dropped";
    return node.term;
  }

  // The nodes of targets that were traced from one token, also where a node stands for all tokens.
  function tracedAt(node, facts) {
    if (!node.target || node.kind !== "feature") return [];
    const site = `${node.stream}_${node.layer}`;
    return (facts.targets || []).filter((of) => of.site === site && of.feature === node.feature && of.token !== null && of.token !== undefined).map((of) => of.token);
  }

  // What fits under a node: 66@3,5 is feature 66 at row 3, column 5, as headings count.
  function short(node, label, facts) {
    if (label) return granary.show.short(label, 16);
    const at = node.token >= 0 ? `@${spot(node, facts)}` : "";
    if (node.kind === "feature") return `${node.feature}${at}`;
    if (node.kind === "bias") return node.term;
    if (node.kind === "supernode" || node.kind === "group") return granary.show.short(node.term, 18);
    return `${node.kind}${at}`;
  }

  function spot({ stream, token }, facts) {
    if (stream !== "img") return granary.show.short(facts.pieces?.[token]?.trim() || String(token), 8);
    return `${Math.floor(token / facts.grid[1]) + 1},${(token % facts.grid[1]) + 1}`;
  }

  // A token in words: of a picture by row and column, of a text by its piece.
  function place(stream, token, facts) {
    const [, columns] = facts.grid;
    if (stream === "img") return `row ${Math.floor(token / columns) + 1}, column ${(token % columns) + 1}`;
    const piece = facts.pieces?.[token]?.trim();
    return piece ? `“${piece}”` : `text token ${token}`;
  }

  // `overTokens`: of the view over tokens, where what pruning took is dropped too.
  function meaning(node, overTokens) {
    if (node.kind === "bias") return `A constant path: ${TERMS[node.term] || node.term}.`;
    if (node.kind === "dropped") return `${MEANINGS.dropped}${overTokens ? ", and what pruning removed" : ""}.`;
    return MEANINGS[node.kind] || null;
  }

  // A number with as many digits as say something; small ones with an exponent.
  const number = (value, digits = 3) => (value && Math.abs(value) < 1e-4 ? value.toExponential(Math.max(0, digits - 2)) : granary.show.number(value, digits));
  const signed = (value, digits = 3) => (value > 0 ? "+" : value < 0 ? "−" : "") + number(Math.abs(value), digits);

  // What a picture of the graph says above it: target, prompt and step.
  function headline(facts) {
    const targets = (facts.targets || []).map((of) => (of.feature === null || of.feature === undefined ? of.name || "supernode" : target(of, facts)));
    const rest = targets.length > 3 ? ` and ${targets.length - 3} more` : "";
    return [`Target ${targets.slice(0, 3).join(", ")}${rest}`, `image ${facts.image}, step ${facts.step}${facts.prompt ? `: “${facts.prompt}”` : ""}`];
  }
  const target = (of, facts) => title({ kind: "feature", stream: of.site.split("_")[0], layer: Number(of.site.split("_")[1]), feature: of.feature, token: of.token ?? -1 }, facts);

  // What can be searched for: everything that is said of a node.
  function searched(node, label, facts) {
    const where = node.layer >= 0 && node.kind !== "input" ? `block ${node.layer} layer ${node.layer}` : "";
    const does = node.target ? "target" : node.effect > 0 ? "excites" : node.effect < 0 ? "suppresses" : "";
    const traced = tracedAt(node, facts).map((token) => `at ${place(node.stream, token, facts)}`).join(" ");
    const members = (node.members || []).map((each) => each.name).join(" ");
    return `${node.name} ${title(node, facts)} ${traced} ${label} ${where} ${STREAMS[node.stream] ? `${STREAMS[node.stream]} stream` : ""} ${KINDS[node.kind]} ${does} ${members}`.toLowerCase();
  }

  const LEGEND = "size: influence; pale: paths cancel; hollow: constant or unexplained";

  return { KINDS, MEANINGS, STREAMS, LEGEND, name, title, short, place, tracedAt, meaning, number, signed, headline, target, searched };
})();
