// The overview's plots and the pictures of its findings; its words are in index.html already.
"use strict";
granary.overview = (() => {
  const { h, show } = granary;
  const STREAMS = { img: ["image", "series-1", "circle"], txt: ["text", "series-2", "diamond"], joint: ["joint", "series-3", "square"] };
  const EDGES = Array.from({ length: 25 }, (_, place) => 10 ** ((place - 24) / 4));
  let made = false;

  async function open(section) {
    if (!made) {
      made = true;
      // What can be read is there already: the page is painted before Bokeh's megabyte is read.
      requestAnimationFrame(() => setTimeout(() => findings().then(plots).then(() => seek(section))));
    }
    seek(section);
    if (!section) window.scrollTo(0, 0);
  }

  // What was drawn meanwhile has moved the section that was asked for.
  function seek(section) {
    if (section && granary.place.now().section === section) document.getElementById(section)?.scrollIntoView();
  }

  function plots() {
    const { dictionaries } = granary.features.report();
    const measured = dictionaries.filter((each) => each.fvu_value !== null && each.l0_value !== null);
    const room = document.getElementById("curves");
    if (measured.length) {
      const words = measured.map((each) => `${each.name} FVU ${show.number(each.fvu_value)} at L0 ${show.number(each.l0_value)}`).join("; ");
      place(room, "FVU against L0", words, () => granary.plots.points(
        Object.entries(STREAMS).map(([stream, [name, colour, marker]]) => ({
          name, colour, marker,
          points: measured.filter((each) => each.stream === stream).map((each) => ({ x: each.l0_value, y: each.fvu_value, name: each.name })),
        })).filter((group) => group.points.length),
        { x_axis_label: "L0", y_axis_label: "FVU", legend: "bottom_left", x_range: upTo(measured.map((each) => each.l0_value)), y_range: upTo(measured.map((each) => each.fvu_value)) },
      ));
      const curves = measured.filter((each) => Object.keys(each.fvu_steps).length > 1);
      if (curves.length) {
        place(room, "FVU by step", `FVU of ${curves.length} dictionaries over the steps; the table below has the numbers`, () => lines(curves, (each) => ({
          x: Object.keys(each.fvu_steps).map(Number), y: Object.values(each.fvu_steps),
        }), {
          x_axis_label: "step", y_axis_label: "FVU", legend: "bottom_right", y_range: upTo(curves.flatMap((each) => Object.values(each.fvu_steps))),
        }, granary.features.report().steps));
      }
    } else {
      room.append(h("p", { class: "note" }, "None of these dictionaries was ever measured on held-out rows: FVU and L0 are not known."));
    }
    const words = `How many features of each dictionary have which density, over ${EDGES.length - 1} bins from 1e-6 to 1`;
    place(room, "Features by density", words, () => lines(dictionaries, (each) => ({
      x: EDGES.slice(1).map((edge, i) => Math.sqrt(edge * EDGES[i])),
      y: EDGES.slice(1).map((_, i) => each.density.reduce((sum, counts) => sum + counts[i], 0) / each.density.length / each.features),
    }), { x_axis_label: "density", y_axis_label: "share of features", x_axis_type: "log", dots: 4, legend: "top_left" }));
  }

  const upTo = (values) => [0, 1.15 * Math.max(...values, 1e-9)];

  // One curve a dictionary, in the colour of its stream; `ticks`: the only places named on the axis.
  function lines(dictionaries, xy, options, ticks = null) {
    const plot = granary.plots.lines(dictionaries.map((each) => {
      const [label, colour] = STREAMS[each.stream];
      return { name: each.name, label, colour, ...xy(each) };
    }), options, true);
    if (ticks) (plot.xaxes[0].ticker = new Bokeh.FixedTicker({ ticks })), (plot.xgrids[0].visible = false);
    return plot;
  }

  function place(room, title, words, make) {
    const plot = h("div", { class: "plot" });
    room.append(h("figure", { class: "chart" }, h("figcaption", {}, title), plot));
    granary.plots.draw(plot, `${title}. ${words}`, make);
  }

  async function findings() {
    for (const item of document.querySelectorAll("[data-feature]")) {
      const [dictionary, step, feature] = item.dataset.feature.split("/");
      const found = await granary.examples.record(dictionary, Number(step), Number(feature));
      const room = await granary.examples.prepare(dictionary, found);
      const strip = h("div", { class: room.stream === "txt" ? "strip texts" : "strip" });
      const many = room.stream === "txt" ? 2 : 6;
      room.list.slice(0, many).forEach((example, place) => strip.append(granary.examples.one(example, room, "smooth", place)));
      item.append(strip);
    }
  }

  return { open };
})();
