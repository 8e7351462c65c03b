// Which view is shown; everything starts here.
"use strict";
(async () => {
  const { h } = granary;
  granary.theme.set(granary.theme.kept());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => granary.plots.again());
  document.getElementById("theme").addEventListener("click", () => granary.theme.next());
  document.getElementById("ask").addEventListener("click", () => document.getElementById("help").showModal());
  document.getElementById("export-labels").addEventListener("click", () => granary.exports.labels());
  document.getElementById("forget-labels").addEventListener("click", forget);
  document.addEventListener("granary-labels", labels);
  granary.keys.open();

  try {
    const report = await granary.load("report");
    granary.features.open(report);
    await Promise.all([granary.labels.open(report), granary.heat.open()]);
  } catch (error) {
    failed(error);
    return;
  }
  labels();
  const title = document.title;
  window.addEventListener("hashchange", shown);
  await shown();
  document.documentElement.dataset.ready = "yes";

  async function shown() {
    const place = granary.place.now();
    for (const view of document.querySelectorAll("main > .view")) view.hidden = view.id !== `view-${place.view}`;
    for (const link of document.querySelectorAll("nav.views a")) {
      const own = link.dataset.view === place.view || (link.dataset.view === "features" && place.view === "feature");
      if (own) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    document.title = title;
    try {
      if (place.view === "overview") await granary.overview.open(place.section);
      if (place.view === "features") await granary.table.open(place.filters);
      if (place.view === "feature") await granary.feature.open(place);
      if (place.view === "labels") labels();
      document.getElementById("failed").hidden = true;
      window.dispatchEvent(new Event("granary-shown"));
    } catch (error) {
      failed(error);
    }
  }

  function failed(error) {
    const note = document.getElementById("failed");
    note.hidden = false;
    note.textContent = error.message;
  }

  function labels() {
    const all = granary.labels.all();
    const own = document.getElementById("own-labels");
    const row = (label) => h("tr", {}, h("th", { scope: "row" }, h("a", { href: granary.place.feature(label.name, granary.features.report().steps[0], label.feature) }, `${label.name}/${label.feature}`)), h("td", {}, label.text || "(taken away)"), h("td", {}, label.author), h("td", {}, label.time.replace("T", " ").replace("Z", "")));
    own.replaceChildren(...all.map(row));
    document.getElementById("own-count").textContent = all.length ? `${all.length} set in this browser` : "none set in this browser yet";
    const built = granary.features.report().dictionaries.flatMap(({ name }) => [...granary.labels.texts(name)].filter(([feature]) => !granary.labels.isOwn(name, feature)).map(([feature, text]) => ({ name, feature, text })));
    const line = (label) => h("li", {}, h("a", { href: granary.place.feature(label.name, granary.features.report().steps[0], label.feature) }, `${label.name}/${label.feature}`), ` · ${label.text}`);
    document.getElementById("built-labels").replaceChildren(...(built.length ? built.map(line) : [h("li", { class: "quiet" }, "none")]));
    for (const id of ["export-labels", "forget-labels"]) document.getElementById(id).disabled = !all.length;
    const nav = document.querySelector("nav.views a[data-view=labels] small");
    nav.textContent = all.length ? String(all.length) : "";
  }

  function forget() {
    if (confirm("Forget the labels set in this browser? Those in the dictionaries stay.")) granary.labels.forget();
  }
})();
