// The table of all features: DataTables with Scroller draws the rows that are seen, features.js says which they are.
"use strict";
granary.table = (() => {
  const { h, show } = granary;
  const COLUMNS = [
    ["feature", "Feature", "", "11rem"],
    ["step", "Step", "num", "3.6rem"],
    ["strongest", "Strongest on", "", "21.5rem"],
    ["interest", "Interest", "num", "5.8rem", "z-score of the mean activation, times root of the share of images"],
    ["density", "Density", "num", "5.8rem", "share of tokens on which it is active"],
    ["image_share", "Images", "num", "5.8rem", "share of images on which it is active"],
    ["max", "Max", "num", "5.2rem", "largest activation on any image"],
    ["mean_active", "Mean", "num", "5.2rem", "mean activation on the tokens where it is active"],
    ["coherence", "Coherence", "num", "6.6rem", "mean cosine of its top images' embeddings, one image a prompt"],
    ["category", "Category", "", "7.8rem", "of its density: dead, rare, common, very common"],
  ];
  const SORTED = { feature: ["asc", "desc"] };
  let table = null;
  let result = null;
  let filters = null;
  let asked = 0; // the number of the newest question: answers to older ones are dropped
  let cursor = 0; // the row that j and k move
  let focusing = false;
  let columns = COLUMNS;
  let prompts = [];

  async function open(wanted) {
    granary.style("datatables.css");
    filters = granary.features.complete(wanted);
    fill();
    const turn = ++asked;
    status("reading …");
    const [found, texts] = await Promise.all([
      granary.features.chosen(filters), granary.features.allPrompts(), granary.library("datatables.js"),
    ]);
    if (turn !== asked) return;
    prompts = texts;
    const same = result && sameRows(found, result);
    result = found;
    const back = granary.features.last;
    const place = back ? granary.features.find(result, back.dictionary, back.step, back.feature) : -1;
    cursor = place >= 0 ? place : same ? cursor : 0;
    if (table) redraw();
    else make();
    if (place >= 0) reveal(true);
    tell();
  }

  const sameRows = (a, b) => a.order.length === b.order.length && a.order.every((id, i) => id === b.order[i]);

  function make() {
    const known = granary.features.report().dictionaries.length && result.blocks.some((each) => each.numbers.coherence);
    columns = COLUMNS.filter(([name]) => name !== "coherence" || known);
    table = new DataTable("#table", {
      serverSide: true,
      ajax: answer,
      columns: columns.map(([name, title, kind, width, meaning]) => ({
        name, title: meaning ? `<span title="${meaning}">${title}</span>` : title, className: `c-${name} ${kind}`, width, data: null,
        defaultContent: "", orderable: !["strongest", "step", "category"].includes(name), orderSequence: SORTED[name] || ["desc", "asc"],
        type: "string",
      })),
      createdRow: (tr, { block, feature, number }) => draw(tr, block, feature, number),
      drawCallback: marked,
      order: order(),
      layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
      scrollY: `${room()}px`,
      scrollX: true,
      scroller: { displayBuffer: 4, serverWait: 0 },
      autoWidth: false,
      searching: false,
      processing: false,
      language: { emptyTable: "No feature matches. Clear the filters to see all." },
    });
    const body = document.querySelector("#view-features .dt-scroll-body");
    Object.entries({ tabindex: "0", role: "region", "aria-label": "Features, one a row" }).forEach(([name, value]) => body.setAttribute(name, value));
    body.addEventListener("click", (event) => {
      const tr = event.target.closest("tr[data-number]");
      if (tr && !event.target.closest("a")) show_feature(Number(tr.dataset.number));
    });
  }

  // DataTables asks for rows; a changed order is a changed address.
  async function answer(request, done) {
    const first = request.order[0];
    if (first) {
      const said = `${first.dir === "desc" ? "-" : ""}${columns[first.column][0]}`;
      if (said !== filters.sort) {
        filters = { ...filters, sort: said };
        granary.place.amend(granary.place.features(filters));
        result = await granary.features.chosen(filters);
        cursor = 0;
      }
    }
    const total = result.order.length;
    const rows = [];
    for (let number = request.start; number < Math.min(total, request.start + request.length); number++) {
      rows.push({ number, ...granary.features.row(result, number) });
    }
    document.getElementById("table").setAttribute("aria-rowcount", total + 1);
    done({ draw: request.draw, recordsTotal: total, recordsFiltered: total, data: rows });
  }

  function draw(tr, block, feature, number) {
    const { numbers } = block;
    const label = granary.labels.text(block.name, feature);
    const stands = block.standsFor.get(feature);
    const link = granary.place.feature(block.name, block.step, feature, filters);
    const images = granary.features.topImages(block, feature);
    const cells = {
      feature: h("span", { class: "name" }, h("a", { href: link, tabindex: "-1" }, `${block.name}/${feature}`), label ? h("b", {}, label) : stands ? h("i", {}, stands) : null),
      step: String(block.step),
      strongest: h("span", { class: "strongest" }, ...thumbs(block, images), words(block, feature, images)),
      interest: show.number(numbers.interest[feature]),
      density: show.percent(numbers.density[feature]),
      image_share: show.percent(numbers.image_share[feature]),
      max: show.number(numbers.max[feature]),
      mean_active: show.number(numbers.mean_active[feature]),
      coherence: numbers.coherence ? show.number(numbers.coherence[feature]) : "–",
      category: granary.features.category(numbers.density[feature]),
    };
    columns.forEach(([name], place) => tr.cells[place].replaceChildren(cells[name]));
    tr.dataset.number = number;
    tr.setAttribute("aria-rowindex", number + 2);
    tr.tabIndex = -1;
  }

  function thumbs(block, images) {
    const report = granary.features.report();
    if (!report.pictures.there || granary.features.dictionary(block.name).stream === "txt") return [];
    return images.slice(0, 3).map((image) => h("img", { src: show.picture(image, report), alt: "", loading: "lazy", decoding: "async" }));
  }

  function words(block, feature, images) {
    const top = granary.features.topWords(block, feature).slice(0, 5);
    const text = top.length ? top.join(" · ") : images.length ? prompts[images[0]] : "–";
    return h("span", { title: images.length ? prompts[images[0]] : "" }, text);
  }

  function order() {
    const place = columns.findIndex(([name]) => name === filters.sort.replace("-", ""));
    return [[Math.max(0, place), filters.sort.startsWith("-") ? "desc" : "asc"]];
  }

  function redraw() {
    table.order(order());
    table.draw();
    table.columns.adjust();
    table.scroller.toPosition(cursor, false);
  }

  const room = () => {
    const top = document.getElementById("view-features").querySelector(".table").getBoundingClientRect().top + window.scrollY;
    return Math.max(300, window.innerHeight - top - 76);
  };

  function resize() {
    const body = document.querySelector("#view-features .dt-scroll-body");
    if (!table || !body || document.getElementById("view-features").hidden) return;
    body.style.height = body.style.maxHeight = `${room()}px`;
    table.scroller.measure(true);
    table.columns.adjust();
  }

  // The row that j, k and the arrows are at.
  function marked() {
    for (const tr of document.querySelectorAll("#table tr[data-number]")) {
      const here = Number(tr.dataset.number) === cursor;
      tr.classList.toggle("current", here);
      tr.setAttribute("aria-selected", here);
      if (here && focusing) (tr.focus({ preventScroll: true }), (focusing = false));
    }
  }

  function move(by) {
    if (!result || !result.order.length) return;
    cursor = Math.max(0, Math.min(result.order.length - 1, cursor + by));
    focusing = true;
    reveal(false);
    marked();
  }

  function reveal(always) {
    const tr = document.querySelector(`#table tr[data-number="${cursor}"]`);
    const body = document.querySelector("#view-features .dt-scroll-body");
    const seen = tr && tr.getBoundingClientRect().top >= body.getBoundingClientRect().top + 30 && tr.getBoundingClientRect().bottom <= body.getBoundingClientRect().bottom;
    if (always || !seen) table.scroller.toPosition(Math.max(0, cursor - 3), false);
  }

  function show_feature(number = cursor) {
    if (!result || !result.order.length) return;
    const { block, feature } = granary.features.row(result, number);
    granary.place.go(granary.place.feature(block.name, block.step, feature, filters));
  }

  // Filters: the form shows them, a change of the form is a change of the address.
  function fill() {
    const form = document.getElementById("filters");
    const report = granary.features.report();
    if (form.elements.dictionary.options.length <= 1) {
      for (const { name } of report.dictionaries) form.elements.dictionary.append(h("option", { value: name }, name));
      for (const step of report.steps) form.elements.step.append(h("option", { value: step }, step));
      form.addEventListener("input", () => changed(form));
      form.addEventListener("submit", (event) => event.preventDefault());
      document.getElementById("clear").addEventListener("click", () => granary.place.go("#/features"));
      window.addEventListener("resize", resize);
      document.addEventListener("granary-labels", () => table && table.draw(false));
    }
    for (const name of ["dictionary", "step", "category", "alive", "labelled"]) form.elements[name].value = filters[name] || "";
    if (document.activeElement !== form.elements.q) form.elements.q.value = filters.q || "";
  }

  let waiting = 0;
  function changed(form) {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const said = Object.fromEntries(["q", "dictionary", "step", "category", "alive", "labelled"].map((name) => [name, form.elements[name].value]));
      granary.features.last = null;
      granary.place.amend(granary.place.features({ ...filters, ...said }));
      open(granary.place.now().filters);
    }, 120);
  }

  const status = (text) => (document.getElementById("count").textContent = text);
  const tell = () => status(`${show.whole(result.order.length)} of ${show.whole(result.total)} features × steps`);

  return { open, move, show: show_feature, resize, page: () => Math.max(1, Math.floor(room() / 48) - 2) };
})();
