// Plots by Bokeh, in the colours of the page; each says in words what it shows, for those who do not see it.
"use strict";
granary.plots = (() => {
  const drawn = new Map(); // element -> how to draw it again

  const ready = () => granary.library("bokeh.min.js", "bokeh-api.min.js");

  // Draw into an element, again whenever the colours change.  `make` returns a figure.
  async function draw(element, words, make) {
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", words);
    drawn.set(element, make);
    await ready();
    quiet();
    await render(element, make);
  }

  // Once: Bokeh tells the console of every change of its level.
  let hushed = false;
  function quiet() {
    if (!hushed) Bokeh.set_log_level("error");
    hushed = true;
  }

  async function render(element, make) {
    if (drawn.get(element) !== make || !element.isConnected) return;
    element.replaceChildren();
    const inner = granary.h("div", { "aria-hidden": "true" });
    element.append(inner);
    await Bokeh.Plotting.show(make(), inner);
  }

  function again() {
    for (const [element, make] of drawn) {
      if (!element.isConnected) drawn.delete(element);
      else if (globalThis.Bokeh) render(element, make);
    }
  }

  function figure(options) {
    const ink = granary.show.colour("soft");
    const line = granary.show.colour("line");
    const plot = Bokeh.Plotting.figure({
      height: 220, sizing_mode: "stretch_width", toolbar_location: null, tools: "", background_fill_alpha: 0, border_fill_alpha: 0,
      outline_line_color: null, min_border: 4, ...options,
    });
    for (const axis of plot.axes) {
      Object.assign(axis, {
        axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: line, major_tick_line_color: line,
        minor_tick_line_color: null, axis_label_text_font_style: "normal", axis_label_text_font_size: "12px",
        major_label_text_font_size: "11px", axis_label_text_font: FONT, major_label_text_font: FONT,
      });
    }
    for (const grid of plot.grids) grid.grid_line_color = line;
    return plot;
  }
  const FONT = "system-ui, sans-serif";

  function hover(plot, renderers, tooltips, options = {}) {
    plot.add_tools(new Bokeh.HoverTool({ renderers, tooltips, ...options }));
  }

  function legend(plot, location = "top_right") {
    const legends = plot.legend ? [plot.legend].flat() : [];
    for (const each of legends) {
      Object.assign(each, {
        background_fill_alpha: 0, border_line_alpha: 0, label_text_color: granary.show.colour("soft"), label_text_font_size: "11px",
        location, label_text_font: FONT, spacing: 0, padding: 2, margin: 2,
      });
    }
  }

  // Counts in bins whose borders have names: bars side by side.
  function bars(counts, names, label) {
    const places = counts.map((_, i) => i);
    const plot = figure({ height: 170, x_range: [-0.6, counts.length - 0.4], x_axis_label: label, y_axis_label: "tokens" });
    const bar = plot.quad({
      left: places.map((p) => p - 0.46), right: places.map((p) => p + 0.46), top: counts, bottom: counts.map(() => 0),
      fill_color: granary.show.colour("series-1"), line_color: null,
    });
    bar.data_source.data = { ...Object.fromEntries(Object.entries(bar.data_source.data)), name: names.bins };
    hover(plot, [bar], [["z", "@name"], ["tokens", "@top{0,0}"]]);
    plot.y_range.start = 0;
    const every = Math.max(1, Math.ceil(names.edges.length / 8));
    const ticks = names.edges.map((_, i) => i).filter((i) => names.edges[i] !== null && i % every === 0);
    plot.xgrids[0].visible = false;
    plot.xaxes[0].ticker = new Bokeh.FixedTicker({ ticks: ticks.map((i) => i - 0.5) });
    plot.xaxes[0].major_label_overrides = new Map(ticks.map((i) => [i - 0.5, granary.show.number(names.edges[i], 2)]));
    return plot;
  }

  // Lines: series of {name, x, y, colour}; `legend_of`: names that stand in the legend.
  function lines(series, { dots: size = 5, legend: corner, ...options }, named = false) {
    const plot = figure(options);
    series.forEach(({ name, x, y, colour, label }) => {
      const ink = granary.show.colour(colour);
      const words = named ? { legend_label: label || name } : {};
      plot.line({ x, y, line_color: ink, line_width: 2, line_alpha: 0.85, ...words });
      const dots = plot.scatter({ x, y, fill_color: ink, line_color: null, size });
      hover(plot, [dots], [["", name], [options.x_axis_label || "x", "@x{0.[000]}"], [options.y_axis_label || "y", "@y{0.[0000]}"]]);
    });
    if (named) legend(plot, corner);
    return plot;
  }

  // Points with names: groups of {name, colour, points: [{x, y, name}]}.
  function points(groups, { legend: corner, ...options }) {
    const plot = figure(options);
    for (const { name, colour, marker, points: found } of groups) {
      const dots = plot.scatter({
        x: found.map((p) => p.x), y: found.map((p) => p.y), size: 10, marker, fill_alpha: 0.75,
        fill_color: granary.show.colour(colour), line_color: granary.show.colour("card"), legend_label: name,
      });
      dots.data_source.data = { ...Object.fromEntries(Object.entries(dots.data_source.data)), name: found.map((p) => p.name) };
      hover(plot, [dots], [["", "@name"], [options.x_axis_label, "@x{0.0}"], [options.y_axis_label, "@y{0.000}"]]);
    }
    legend(plot, corner);
    return plot;
  }

  return { draw, again, bars, lines, points };
})();
