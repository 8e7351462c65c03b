// The features of the report as columns of numbers, and which of them a filter leaves, in which order.
"use strict";
granary.features = (() => {
  const EDGES = [1e-4, 0.01, 0.1];
  const CATEGORIES = ["dead", "rare", "common", "very common"];
  const SMALL_REPORT = 250000; // up to so many rows everything is shown at first, else one dictionary
  let report = null;
  let prompts = null; // one text an image, in lower case
  const blocks = new Map(); // "img_3/step.1" -> columns

  const open = (value) => (report = value);
  const dictionary = (name) => report.dictionaries.find((each) => each.name === name);
  const category = (share) => CATEGORIES[EDGES.filter((edge) => share >= edge).length];

  async function block(name, step) {
    const key = `${name}/step.${step}`;
    if (!blocks.has(key)) {
      blocks.set(key, granary.load(`tables/${key}`).then((table) => unpacked(name, step, table)));
    }
    return blocks.get(key);
  }

  function unpacked(name, step, table) {
    const numbers = {};
    for (const [column, text] of Object.entries(table.numbers)) numbers[column] = granary.packed.numbers(text, "f4");
    const { form, width, data } = table.images;
    const words = table.words && { ...table.words, of: granary.packed.numbers(table.words.data, "i4") };
    const standsFor = new Map(Object.entries(table.stands_for).map(([feature, text]) => [Number(feature), text]));
    return {
      name, step, count: table.features, numbers, words, standsFor, alive: granary.packed.numbers(table.alive, "u1"),
      images: granary.packed.numbers(data, form), width, none: form === "u2" ? 65535 : -1,
    };
  }

  // The blocks that the filters name, in the order of the report.
  function wanted(filters) {
    const names = filters.dictionary === "all" ? report.dictionaries.map((each) => each.name) : [filters.dictionary];
    const steps = filters.step === "all" ? report.steps : [Number(filters.step)];
    return names.filter(dictionary).flatMap((name) => steps.filter((s) => report.steps.includes(s)).map((step) => [name, step]));
  }

  // Filters with nothing left open: what a table shows when the address does not say.
  function complete(filters, own = null) {
    const rows = report.dictionaries.reduce((sum, each) => sum + each.features * report.steps.length, 0);
    const first = rows <= SMALL_REPORT ? "all" : report.dictionaries[0].name;
    const last = rows <= SMALL_REPORT || report.dictionaries[0].features * report.steps.length <= SMALL_REPORT;
    return {
      dictionary: own ? own.dictionary : first,
      step: String(own ? own.step : last ? "all" : report.steps[0]),
      alive: "yes",
      sort: "-interest",
      ...filters,
    };
  }

  async function allPrompts() {
    if (!prompts) {
      const files = Math.ceil(report.images / report.pictures.block);
      const parts = await Promise.all(Array.from({ length: files }, (_, i) => granary.load(`prompts/${i}`)));
      prompts = parts.flatMap((part) => part.prompt);
      prompts.lower = prompts.map((text) => text.toLowerCase());
    }
    return prompts;
  }

  // Rows (block and feature) that the filters leave, in the order asked for.
  async function chosen(filters) {
    const found = await Promise.all(wanted(filters).map(([name, step]) => block(name, step)));
    const terms = (filters.q || "").toLowerCase().split(/\s+/).filter(Boolean);
    const texts = terms.length ? await allPrompts() : null;
    const starts = [];
    let total = 0;
    for (const each of found) (starts.push(total), (total += each.count));
    const kept = new Uint32Array(total);
    let count = 0;
    found.forEach((each, place) => {
      const fits = fitting(each, filters, terms, texts);
      for (let feature = 0; feature < each.count; feature++) if (fits[feature]) kept[count++] = starts[place] + feature;
    });
    const order = kept.subarray(0, count);
    sort(order, found, starts, filters.sort);
    return { blocks: found, starts, order, total };
  }

  function fitting(each, filters, terms, texts) {
    const fits = new Uint8Array(each.count).fill(1);
    const labels = granary.labels.texts(each.name);
    const { density } = each.numbers;
    for (let f = 0; f < each.count; f++) {
      if (filters.alive === "yes" && !each.alive[f]) fits[f] = 0;
      else if (filters.category && category(density[f]) !== filters.category) fits[f] = 0;
      else if (filters.labelled === "yes" && !labels.has(f)) fits[f] = 0;
    }
    for (const term of terms) keepMatching(fits, each, labels, term, texts.lower);
    return fits;
  }

  // Features that have the term in their label, name or attribute, in one of their words, or in the prompt of a top image.
  function keepMatching(fits, each, labels, term, lower) {
    const inPrompt = new Uint8Array(lower.length);
    for (let i = 0; i < lower.length; i++) inPrompt[i] = lower[i].includes(term) ? 1 : 0;
    const named = new Set();
    for (const [feature, text] of labels) if (text.toLowerCase().includes(term)) named.add(feature);
    for (const [feature, text] of each.standsFor) if (text.toLowerCase().includes(term)) named.add(feature);
    const name = term.startsWith(`${each.name.toLowerCase()}/`) ? term.slice(each.name.length + 1) : term;
    if (/^\d+$/.test(name)) named.add(Number(name));
    const words = each.words && each.words.vocabulary.map((word) => word.toLowerCase().includes(term));
    const { images, width, none } = each;
    for (let f = 0; f < each.count; f++) {
      if (!fits[f] || named.has(f)) continue;
      let found = false;
      for (let k = f * width; k < (f + 1) * width && !found && images[k] !== none; k++) found = inPrompt[images[k]] === 1;
      if (words) {
        const { of, width: most } = each.words;
        for (let k = f * most; k < (f + 1) * most && !found && of[k] >= 0; k++) found = words[of[k]];
      }
      if (!found) fits[f] = 0;
    }
  }

  function sort(order, found, starts, said) {
    const falling = said.startsWith("-");
    const column = said.replace("-", "");
    if (column === "feature" || !found.length) {
      if (falling) order.reverse();
      return;
    }
    const keys = new Float64Array(starts.at(-1) + found.at(-1).count);
    found.forEach((each, place) => {
      const values = each.numbers[column];
      for (let f = 0; f < each.count; f++) {
        const value = values ? values[f] : NaN;
        keys[starts[place] + f] = Number.isNaN(value) ? Infinity : falling ? -value : value; // what is not known comes last
      }
    });
    order.sort((a, b) => keys[a] - keys[b] || a - b);
  }

  // Row number -> {block, feature}.
  function row(result, number) {
    const id = result.order[number];
    let place = result.starts.length - 1;
    while (result.starts[place] > id) place--;
    return { block: result.blocks[place], feature: id - result.starts[place] };
  }

  // Where a feature stands in a result; -1 where it does not.
  function find(result, name, step, feature) {
    const place = result.blocks.findIndex((each) => each.name === name && each.step === step);
    return place < 0 ? -1 : result.order.indexOf(result.starts[place] + feature);
  }

  function topImages(each, feature) {
    const found = [...each.images.subarray(feature * each.width, (feature + 1) * each.width)];
    return found.filter((image) => image !== each.none);
  }

  function topWords(each, feature) {
    if (!each.words) return [];
    const { of, width, vocabulary } = each.words;
    return [...of.subarray(feature * width, (feature + 1) * width)].filter((n) => n >= 0).map((n) => vocabulary[n]);
  }

  return {
    CATEGORIES, open, dictionary, category, block, complete, chosen, row, find, topImages, topWords, allPrompts,
    report: () => report,
  };
})();
