// The page of one feature: examples, figures, histogram, profile over the steps, similar features, labels.
"use strict";
granary.feature = (() => {
  const { h, show } = granary;
  const GRAPHS = 8; // of those that it stands in, the others on demand
  const LOOKS = [["smooth", "smooth"], ["patches", "patches"], ["none", "none"]];
  const KINDS = { image: "image tokens", real: "text tokens", padding: "padding" };
  let here = null; // {dictionary, step, feature, filters, found, prepared}
  let look = "smooth";
  let asked = 0;

  async function open(place) {
    const turn = ++asked;
    const room = document.getElementById("view-feature");
    const known = granary.features.dictionary(place.dictionary);
    const { steps } = granary.features.report();
    const whole = Number.isInteger(place.feature) && place.feature >= 0;
    if (!known || !steps.includes(place.step) || !whole || place.feature >= known.features) {
      room.replaceChildren(unknown(place));
      return;
    }
    if (!here || here.feature !== place.feature || here.dictionary !== place.dictionary) room.setAttribute("aria-busy", "true");
    const found = await granary.examples.record(place.dictionary, place.step, place.feature);
    const [prepared, block] = await Promise.all([
      granary.examples.prepare(place.dictionary, found), granary.features.block(place.dictionary, place.step),
    ]);
    if (turn !== asked) return;
    here = { ...place, found, prepared, block, known };
    if (known.stream === "txt" && look === "patches") look = "smooth";
    granary.features.last = place;
    granary.features.prompts = await granary.features.allPrompts();
    room.replaceChildren(head(), h("div", { class: "columns" }, h("div", { class: "wide" }, examples(), plots()), h("aside", {}, labelling(), stands(), figures(), graphs(), similar())));
    room.removeAttribute("aria-busy");
    draw_plots(room);
    window.scrollTo(0, 0);
    document.title = `${place.dictionary}/${place.feature} · step ${place.step} · ${granary.features.report().title}`;
    neighbours(turn);
  }

  function unknown(place) {
    const names = granary.features.report().dictionaries.map((each) => `${each.name} (0 to ${each.features - 1})`).join(", ");
    return h("div", {}, h("h2", {}, "No such feature"), h("p", {}, `This report has ${names}, at steps ${granary.features.report().steps.join(", ")}; asked for was ${place.dictionary}/${place.feature} at step ${place.step}.`),
      h("p", {}, h("a", { href: "#/features" }, "All features")));
  }

  function head() {
    const { dictionary, step, feature, known, filters } = here;
    const { steps } = granary.features.report();
    const tabs = steps.length < 2 ? null : h("nav", { class: "steps", "aria-label": "Steps" }, h("span", {}, "step"), ...steps.map((each) =>
      h("a", { href: granary.place.feature(dictionary, each, feature, filters), "aria-current": each === step ? "page" : null }, String(each))));
    return h("header", { class: "feature" },
      h("p", { class: "crumbs" }, h("a", { href: granary.place.features(granary.features.complete(filters, here)), id: "back" }, "← table"),
        h("span", { id: "position", role: "status" }, ""),
        h("a", { id: "previous", class: "button", href: "#", hidden: true, rel: "prev" }, "‹ previous"), h("a", { id: "next", class: "button", href: "#", hidden: true, rel: "next" }, "next ›")),
      h("h2", { tabindex: "-1", id: "feature-name" }, `${dictionary}/${feature}`, h("span", { id: "shown-label" }, granary.labels.text(dictionary, feature))),
      h("p", { class: "what" }, `${known.kind} feature ${feature} of ${show.whole(known.features)} at ${known.site}, reads ${known.point}`), tabs);
  }

  // Where the feature stands in the table that the address describes, and what is before and after it.
  async function neighbours(turn) {
    const filters = granary.features.complete(here.filters, here);
    const result = await granary.features.chosen(filters);
    if (turn !== asked) return;
    const place = granary.features.find(result, here.dictionary, here.step, here.feature);
    const position = document.getElementById("position");
    position.textContent = place < 0 ? "not among the features of the table" : `${show.whole(place + 1)} of ${show.whole(result.order.length)} in the table`;
    for (const [id, number] of [["previous", place - 1], ["next", place < 0 ? -1 : place + 1]]) {
      const link = document.getElementById(id);
      const there = number >= 0 && number < result.order.length;
      link.hidden = !there;
      if (!there) continue;
      const { block, feature } = granary.features.row(result, number);
      link.href = granary.place.feature(block.name, block.step, feature, here.filters.dictionary ? filters : here.filters);
    }
  }

  function examples() {
    const { prepared, found } = here;
    const choices = looks().map(([value, name]) => h("label", {}, h("input", { type: "radio", name: "look", value, checked: value === look }), name));
    const box = h("fieldset", { class: "looks", on: { change: (event) => relook(event.target.value) } }, h("legend", {}, "Heat"), ...choices);
    const note = prepared.list.length && !prepared.heated ? h("p", { class: "note" }, "No heat for this feature: the report was built with heat for the most interesting ones (--heat-features).") : null;
    const none = prepared.list.length ? null : h("p", { class: "note" }, "Active on no image of this store at this step.");
    return h("section", { "aria-labelledby": "h-examples" },
      h("div", { class: "bar" }, h("h3", { id: "h-examples" }, "Strongest on"), prepared.heated ? box : null),
      note, none, found.words?.length ? top_words(found) : null, h("div", { class: prepared.stream === "txt" ? "examples texts" : "examples", id: "examples" }, ...drawn()));
  }

  const drawn = () => here.prepared.list.map((example, place) => granary.examples.one(example, here.prepared, look, place));

  function relook(value) {
    look = value;
    document.getElementById("examples").replaceChildren(...drawn());
    for (const input of document.querySelectorAll("input[name=look]")) input.checked = input.value === look;
  }

  // Words have no patches: their heat is there or not.
  function looks() {
    return here.known.stream === "txt" ? [["smooth", "marked"], ["none", "none"]] : LOOKS;
  }

  function next_look() {
    if (!here || !here.prepared.heated) return;
    const choices = looks().map(([value]) => value);
    relook(choices[(choices.indexOf(look) + 1) % choices.length]);
  }

  function top_words(found) {
    const most = Math.max(...found.word_values, 1e-9);
    return h("p", { class: "words-top" }, h("span", {}, "Top words "), ...found.words.flatMap((word, i) => [h("mark", { style: { "--heat": (found.word_values[i] / most).toFixed(2) }, title: `z ${show.number(found.word_values[i])}` }, word), " "]));
  }

  // What is measured of one kind of a joint site's tokens, a row a figure: image tokens, text tokens, padding.
  function by_kind(kinds) {
    const each = (of) => Object.entries(KINDS).filter(([kind]) => kinds[kind]).map(([kind, name]) => h("span", {}, `${of(kinds[kind])} `, h("small", {}, name)));
    const { images } = granary.features.report();
    return [
      ["Density", each((kind) => show.percent(kind.density)), "share of the tokens of each kind on which it is active"],
      ["Images", each((kind) => show.percent(kind.images_active / images)), "share of the images on which such tokens make it active"],
      ["Max", each((kind) => show.number(kind.max)), "largest activation on any image"],
      ["Mean when active", each((kind) => show.number(kind.mean_active)), "over the tokens where it is active"],
    ];
  }

  function figures() {
    const { found } = here;
    const rows = [
      ...(found.kinds ? by_kind(found.kinds) : [
        ["Density", show.percent(found.frac_nonzero), `share of tokens on which it is active: ${granary.features.category(found.frac_nonzero)}`],
        ["Images", `${show.percent(found.image_share)}`, `active on ${show.whole(found.images_active)} images: ${granary.features.category(found.image_share)}`],
        ["Max", show.number(found.maxActApprox), "largest activation on any image"],
        ["Mean when active", show.number(found.mean_active), "over the tokens where it is active"],
      ]),
      ["Deviation", show.number(found.deviation_active), `of the activation over ${found.kinds ? "all " : ""}the tokens where it is active`],
      ["Interest", show.number(found.interest), "z-score of the mean activation, times root of the share of images"],
    ];
    if (found.coherence !== undefined) rows.push(["Coherence", show.number(found.coherence), "mean cosine of its top images' embeddings, one image a prompt"]);
    return h("section", { class: "box" }, h("h3", {}, "Figures"), h("dl", { class: "rows" }, ...rows.map(([name, value, meaning]) => h("div", {}, h("dt", {}, name), h("dd", Array.isArray(value) ? { class: "kinds" } : {}, ...[value].flat()), h("dd", { class: "meaning" }, meaning)))),
      h("p", {}, h("button", { type: "button", on: { click: () => granary.exports.feature(here) } }, "Export as JSON")));
  }

  function stands() {
    const { found } = here;
    if (!found.stands_for) return null;
    const known = (value) => value !== null && value !== undefined;
    const item = (each) => {
      const compared = [["ridge probe", each.ceiling], ["raw channel", each.floor]].filter(([, value]) => known(value));
      const joint = here.known.stream === "joint"; // judged by its image tokens alone
      const words = [`AUROC ${show.number(each.image_auroc)} over images${joint ? ", by its image tokens" : ""}`];
      if (compared.length) words.push(` (${compared.map(([name, value]) => `${name} ${show.number(value)}`).join(", ")})`);
      if (known(each.token_auroc)) words.push(`, ${show.number(each.token_auroc)} over ${joint ? "image " : ""}tokens`);
      if (known(each.image_f1)) words.push(`; F1 ${show.number(each.image_f1)} where z ${joint ? "on image tokens " : ""}> ${show.number(each.image_threshold)}`);
      if (known(each.heat_inside)) words.push(`; ${show.percent(each.heat_inside)} of its heat lies there`);
      return h("li", { class: each.stands ? "stands" : "" }, h("b", {}, `${each.group} ${each.value}`), ` ${words.join("")}`);
    };
    return h("section", { class: "box" }, h("h3", {}, "Truth"), h("p", {}, "The best feature of this dictionary and step for"), h("ul", { class: "truths" }, ...found.stands_for.map(item)));
  }

  function similar() {
    const { found, dictionary, step, block } = here;
    if (!found.topkCosSimIndices) return null;
    const report = granary.features.report();
    const item = (other, place) => {
      const images = granary.features.topImages(block, other);
      const label = granary.labels.text(dictionary, other) || block.standsFor.get(other) || (images.length ? granary.features.prompts[images[0]] : "not active here");
      const picture = images.length && report.pictures.there && here.known.stream !== "txt" ? h("img", { src: show.picture(images[0], report), alt: "", loading: "lazy" }) : null;
      return h("li", {}, h("a", { href: granary.place.feature(dictionary, step, other) }, picture, h("span", {}, h("b", {}, `${dictionary}/${other}`), h("small", {}, show.short(label, 60)))), h("span", { class: "num", title: "cosine of the decoder directions" }, show.number(found.topkCosSimValues[place], 2)));
    };
    return h("section", { class: "box" }, h("h3", {}, "Similar features"), h("p", { class: "quiet" }, "by the cosine of their decoder directions"), h("ol", { class: "similar" }, ...found.topkCosSimIndices.map(item)));
  }

  function labelling() {
    const { dictionary, feature } = here;
    const problem = h("p", { class: "problem", role: "alert" });
    const text = h("input", { name: "text", id: "label-text", autocomplete: "off", maxlength: "200", placeholder: "what it stands for", value: granary.labels.text(dictionary, feature) });
    const author = h("input", { name: "author", autocomplete: "name", maxlength: "200", placeholder: "your name", value: granary.labels.author() });
    const submit = (event) => {
      event.preventDefault();
      const wrong = granary.labels.set(dictionary, feature, text.value, author.value);
      problem.textContent = wrong || (granary.labels.stored() ? "" : "This browser keeps nothing: export your labels before you close the page.");
      if (!wrong) relabel();
    };
    return h("section", { class: "box", id: "labelling" }, h("h3", {}, "Label"),
      h("form", { on: { submit } }, h("label", {}, h("span", {}, "Text"), text), h("label", {}, h("span", {}, "By"), author), h("button", {}, "Save")), problem, h("ol", { class: "history", id: "history" }, ...said()));
  }

  function said() {
    return granary.labels.history(here.dictionary, here.feature).reverse().map((label) =>
      h("li", {}, h("b", {}, label.text || "(taken away)"), h("small", {}, ` ${label.author}, ${label.time.slice(0, 10)}`)));
  }

  function relabel() {
    document.getElementById("shown-label").textContent = granary.labels.text(here.dictionary, here.feature);
    document.getElementById("history").replaceChildren(...said());
  }

  // What a graph is of, in words: img_4/5 at row 3, column 6.
  function targetsOf(targets, grid) {
    const one = ({ name, site, token, feature }) => {
      if (feature === null || feature === undefined) return name || "a supernode";
      const place = token === null || token === undefined ? "" : site.startsWith("img") ? ` at row ${Math.floor(token / grid[1]) + 1}, column ${(token % grid[1]) + 1}` : ` at text token ${token}`;
      return `${site}/${feature}${place}`;
    };
    const said = (targets || []).slice(0, 2).map(one).join(" and ") || "graph";
    return (targets || []).length > 2 ? `${said} and ${targets.length - 2} more` : said;
  }

  // The attribution graphs that the feature stands in, where the report has any.
  function graphs() {
    if (!granary.features.report().graphs) return null;
    const box = h("section", { class: "box", id: "in-graphs", hidden: true }, h("h3", {}, "In graphs"));
    const { dictionary, feature, known } = here;
    granary.load("graph_features").then((found) => {
      const [stream, layer] = known.site.split("_");
      const links = (found.standing[dictionary]?.[feature] || []).map((place) => {
        const { name, prompt, over_tokens, image, step, grid, targets } = found.graphs[place];
        const node = over_tokens ? `?view=aggregated&node=feature_L${layer}_${stream}_f${feature}` : "";
        return h("li", {}, h("a", { href: `graphs.html#/${encodeURIComponent(name)}${node}` }, h("span", {}, h("b", {}, `${targetsOf(targets, grid)} in image ${image}, step ${step}`), h("small", {}, h("bdi", {}, prompt ? `“${show.short(prompt, 90)}”` : "")))));
      });
      box.hidden = !links.length;
      box.append(h("ul", { class: "similar" }, ...links.slice(0, GRAPHS)));
      if (links.length > GRAPHS) box.append(h("details", {}, h("summary", {}, `${show.whole(links.length - GRAPHS)} more`), h("ul", { class: "similar" }, ...links.slice(GRAPHS))));
    });
    return box;
  }

  function plots() {
    const { steps } = granary.features.report();
    const charts = [];
    if (here.found.freq_hist_data_bar_heights?.some((count) => count > 0)) charts.push(["histogram", "Activations over the tokens where it is active"]);
    if (steps.length > 1) charts.push(["profile-density", "Density over the steps"], ["profile-mean", "Mean activation over the steps"]);
    return h("div", { class: "charts", id: "plots" }, ...charts.map(([name, title]) => h("figure", { class: "chart" }, h("figcaption", {}, title), h("div", { class: "plot", "data-plot": name }))));
  }

  function draw_plots(room) {
    const { found } = here;
    const { steps } = granary.features.report();
    for (const element of room.querySelectorAll("[data-plot]")) {
      if (element.dataset.plot === "histogram") {
        const { counts, names, words } = bins(found);
        granary.plots.draw(element, words, () => granary.plots.bars(counts, names, "z"));
        continue;
      }
      const [values, name] = element.dataset.plot === "profile-density" ? [found.profile.density, "density"] : [found.profile.mean_active, "mean z when active"];
      const words = `${name} by step: ${steps.map((step, i) => `${step}: ${show.number(values[i])}`).join(", ")}`;
      granary.plots.draw(element, words, () => {
        const plot = granary.plots.lines([{ name, x: steps, y: values, colour: "series-1" }], { height: 170, x_axis_label: "step", y_axis_label: name, dots: 8, y_range: [0, 1.1 * Math.max(...values, 1e-9)] });
        plot.xaxes[0].ticker = new Bokeh.FixedTicker({ ticks: steps });
        plot.xgrids[0].visible = false;
        return plot;
      });
    }
  }

  // The bins of the histogram from the first to the last that is not empty.
  function bins({ freq_hist_data_bar_heights: heights, edges }) {
    const open = heights.length === edges.length + 1 ? [null, ...edges, null] : edges;
    const filled = heights.map((count, i) => (count ? i : -1)).filter((i) => i >= 0);
    const first = filled.length ? filled[0] : 0;
    const last = filled.length ? filled.at(-1) : 0;
    const counts = heights.slice(first, last + 1);
    const borders = open.slice(first, last + 2);
    const name = (i) => `${borders[i] === null ? "below" : `${show.number(borders[i])} to`} ${borders[i + 1] === null ? "∞" : show.number(borders[i + 1])}`;
    const names = { edges: borders, bins: counts.map((_, i) => name(i)) };
    const most = counts.indexOf(Math.max(...counts));
    return { counts, names, words: `Histogram of activations: ${show.whole(counts.reduce((a, b) => a + b, 0))} active tokens, most of them (${show.whole(counts[most])}) ${names.bins[most]}` };
  }

  const step_by = (by) => {
    const link = document.getElementById(by < 0 ? "previous" : "next");
    if (link && !link.hidden) granary.place.go(link.getAttribute("href"));
  };
  function other_step(by) {
    const { steps } = granary.features.report();
    const now = granary.place.now(); // the address, which is ahead of a page that is still being loaded
    const place = steps.indexOf(now.step) + by;
    if (here && now.view === "feature" && place >= 0 && place < steps.length) granary.place.go(granary.place.feature(now.dictionary, steps[place], now.feature, now.filters));
  }

  const back = () => document.getElementById("back") && granary.place.go(document.getElementById("back").getAttribute("href"));
  return { open, step_by, other_step, next_look, back, edit: () => document.getElementById("label-text")?.focus() };
})();
