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
    dropped: "Everything under the thresholds that the graph was made with.",
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

  // What fits under a node.
  function short(node, label) {
    if (label) return granary.show.short(label, 16);
    const at = node.token >= 0 ? `@${node.token}` : "";
    if (node.kind === "feature") return `${node.feature}${at}`;
    if (node.kind === "bias") return node.term;
    if (node.kind === "supernode" || node.kind === "group") return granary.show.short(node.term, 18);
    return `${node.kind}${at}`;
  }

  // A token in words: of a picture by row and column, of a text by its piece.
  function place(stream, token, facts) {
    const [, columns] = facts.grid;
    if (stream === "img") return `row ${Math.floor(token / columns) + 1}, column ${(token % columns) + 1}`;
    const piece = facts.pieces?.[token]?.trim();
    return piece ? `“${piece}”` : `text token ${token}`;
  }

  const meaning = (node) => (node.kind === "bias" ? `A constant path: ${TERMS[node.term] || node.term}.` : MEANINGS[node.kind] || null);
  const signed = (value, digits = 3) => (value > 0 ? "+" : value < 0 ? "−" : "") + granary.show.number(Math.abs(value), digits);

  return { KINDS, MEANINGS, STREAMS, name, title, short, place, meaning, signed };
})();
