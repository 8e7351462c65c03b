// The examples of a feature: its pictures with heat over them, or its prompts with their tokens marked.
"use strict";
granary.examples = (() => {
  const { h } = granary;

  // The record of a feature at a step, and what no step changes of it.
  async function record(dictionary, step, feature) {
    const { chunk } = granary.features.report();
    const number = Math.floor(feature / chunk);
    const [examples, features] = await Promise.all([
      granary.load(`examples/${dictionary}/step.${step}/${number}`),
      granary.load(`features/${dictionary}/${number}`),
    ]);
    const place = feature - examples.first;
    const at = (columns) => Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[place]]));
    const heat = examples.heat?.[feature];
    const { image, maxValue, maxValueTokenIndex } = at(examples.activations);
    const activations = image.map((each, k) => {
      return { image: each, maxValue: maxValue[k], maxValueTokenIndex: maxValueTokenIndex[k], ...(heat ? { heat: heat[k] } : {}) };
    });
    const [bin, ...counts] = examples.freq_hist_data_bar_heights?.[place] || [0];
    return {
      feature_index: feature, ...at(examples.figures), activations, profile: at(features.profile),
      edges: examples.freq_hist_data_bar_edges,
      freq_hist_data_bar_heights: examples.freq_hist_data_bar_edges && bins(bin, counts, examples.freq_hist_data_bar_edges.length + 1),
      topkCosSimIndices: features.topkCosSimIndices?.[place], topkCosSimValues: features.topkCosSimValues?.[place],
      kinds: examples.kinds && Object.fromEntries(Object.entries(examples.kinds).map(([kind, columns]) => [kind, at(columns)])),
      words: examples.words?.[place], word_values: examples.word_values?.[place], stands_for: examples.stands_for?.[feature],
    };
  }

  // Counts of all bins from those of the bins that are not empty.
  function bins(first, counts, total) {
    const all = new Array(total).fill(0);
    counts.forEach((count, i) => (all[first + i] = count));
    return all;
  }

  function tokens(report, stream) {
    const image = report.grid[0] * report.grid[1];
    return { img: image, txt: report.text_tokens, joint: report.text_tokens + image }[stream];
  }

  async function about(image) {
    const { block, pieces } = granary.features.report().pictures;
    const number = Math.floor(image / block);
    const [texts, parts] = await Promise.all([granary.load(`prompts/${number}`), pieces ? granary.load(`pieces/${number}`) : null]);
    const place = image - texts.first;
    return { prompt: texts.prompt[place], seed: texts.seed[place], split: texts.split[place], pieces: parts && parts.pieces[place] };
  }

  // z at every token from `PEAK LEVELS`; of a joint site, which has `first` text tokens, image tokens come first in it, then those.
  function unpacked(heat, total, first) {
    const [peak, levels, text_peak, text_levels] = heat.split(" ");
    const shown = granary.packed.heat(levels, Number(peak), total - first);
    if (!first) return shown;
    const values = new Float32Array(total);
    values.set(shown, first);
    values.set(granary.packed.heat(text_levels, Number(text_peak), first));
    return values;
  }

  // Everything needed to draw a feature's examples: values of z where there is heat, prompts, the scales that they share.
  async function prepare(dictionary, found) {
    const report = granary.features.report();
    const { stream } = granary.features.dictionary(dictionary);
    const total = tokens(report, stream);
    const first = stream === "joint" ? report.text_tokens : 0;
    const list = await Promise.all(found.activations.map(async (activation) => ({
      ...activation,
      ...(await about(activation.image)),
      values: activation.heat === undefined ? null : unpacked(activation.heat, total, first),
    })));
    const heats = list.filter((each) => each.values).map((each) => each.values);
    const whole = granary.heat.scale(first ? heats.map((values) => values.subarray(first)) : heats);
    const words = first ? granary.heat.scale(heats.map((values) => values.subarray(0, first))) : whole;
    return { list, stream, report, first, hottest: { picture: whole, words }, heated: heats.length > 0 };
  }

  // One example.  `look`: "smooth", "patches", or "none" for the picture alone.
  function one(example, { stream, report, first, hottest }, look, place) {
    const value = h("b", { title: "largest z on this image", class: first ? "kinds" : null }, said(example, first));
    const parts = [];
    if (stream !== "txt") parts.push(framed(example, { report, first, hottest }, look));
    const marked = stream !== "img" && example.pieces && example.values && look !== "none";
    const text = marked ? granary.heat.words(example.pieces, example.values, hottest.words) : h("span", {}, example.prompt);
    const caption = h("figcaption", {}, value, " ", text, h("small", {}, ` image ${example.image}, seed ${example.seed}`));
    return h("figure", { class: stream === "txt" ? "example text" : "example", "data-place": place }, ...parts, caption);
  }

  // The largest z; of a joint site, whose tokens are of two kinds, that of each.
  function said(example, first) {
    const number = granary.show.number;
    if (!first) return number(example.maxValue);
    if (!example.values) return `${number(example.maxValue)} on ${example.maxValueTokenIndex < first ? "text" : "image"} tokens`;
    const most = (values) => number(values.reduce((a, b) => Math.max(a, b), 0));
    return `${most(example.values.subarray(first))} on image tokens, ${most(example.values.subarray(0, first))} on text tokens`;
  }

  function framed(example, { report, first, hottest }, look) {
    const ratio = `${report.width} / ${report.height}`;
    if (!report.pictures.there) return h("div", { class: "frame none", style: { "aspect-ratio": ratio } }, "no picture in the store");
    const values = example.values?.subarray(first);
    const heated = values?.some((value) => value > 0) && look !== "none"; // of words alone a picture has none: it stays as it is
    const frame = h("div", { class: heated ? "frame heated" : "frame", style: { "aspect-ratio": ratio } });
    const where = heated ? `, with the feature's heat over it, hottest at ${spot(example, report, first)}` : "";
    frame.append(h("img", {
      src: granary.show.picture(example.image, report), alt: `Image of “${granary.show.short(example.prompt, 120)}”${where}`, loading: "lazy",
      decoding: "async",
    }));
    if (heated) frame.append(granary.heat.canvas(values, report.grid, hottest.picture, look === "smooth"));
    return frame;
  }

  // Where on the grid the largest z is, in words.
  function spot(example, report, first) {
    const place = example.maxValueTokenIndex - first;
    if (place < 0) return "a text token";
    return `row ${Math.floor(place / report.grid[1]) + 1} of ${report.grid[0]}, column ${(place % report.grid[1]) + 1} of ${report.grid[1]}`;
  }

  return { record, prepare, one, tokens, unpacked };
})();
