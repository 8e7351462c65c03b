// Files that leave the page: a feature as JSON in the names of SAEDashboard and Neuronpedia, and labels.json.
"use strict";
granary.exports = (() => {
  function save(name, text) {
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const link = granary.h("a", { href: url, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  // The names of the tokens of a stream on one image: words of a prompt, row and column of a picture, from 1.
  function tokens(example, { stream, report, first }) {
    const words = stream === "img" ? [] : (example.pieces || []).map((piece) => piece.trim());
    if (stream === "txt") return words;
    const names = Array.from({ length: report.grid[0] * report.grid[1] }, (_, i) => `${Math.floor(i / report.grid[1]) + 1},${(i % report.grid[1]) + 1}`);
    return stream === "img" ? names : [...Array.from({ length: first }, (_, i) => words[i] || ""), ...names];
  }

  function content({ dictionary, step, feature, found, prepared, known }) {
    const { report } = prepared;
    const heights = found.freq_hist_data_bar_heights || [];
    const edges = found.edges || [];
    const open = heights.length === edges.length + 1;
    const centre = (i) => {
      const low = open ? edges[i - 1] : edges[i];
      const high = open ? edges[i] : edges[i + 1];
      return low === undefined || low === null ? high : high === undefined || high === null ? low : Math.sqrt(low * high);
    };
    const activations = prepared.list.map((example) => {
      const names = tokens(example, prepared);
      const values = example.values ? [...example.values.subarray(0, names.length)].map((value) => Number(value.toPrecision(4))) : null;
      return {
        image: example.image, prompt: example.prompt, seed: example.seed, maxValue: example.maxValue, maxValueTokenIndex: example.maxValueTokenIndex,
        ...(values ? { tokens: names, values } : {}),
      };
    });
    const { profile, edges: _, freq_hist_data_bar_edges: __, activations: ___, ...figures } = found;
    return {
      modelId: report.model, layer: known.site, hookName: known.point, dictionary: known.full_name, dictionary_sha256: known.identity, step, index: feature, ...figures,
      freq_hist_data_bar_values: heights.map((count, i) => centre(i)),
      profile: { step: report.steps, ...profile },
      explanations: granary.labels.history(dictionary, feature).map(({ text, author, time }) => ({ description: text, author, time })),
      activations,
    };
  }

  const feature = (here) => save(`${here.dictionary}-${here.feature}-step-${here.step}.json`, `${JSON.stringify(content(here), null, 1)}\n`);
  const labels = () => save("labels.json", granary.labels.file());

  return { feature, labels, content };
})();
