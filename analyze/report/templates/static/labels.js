// What features are called: the labels in the dictionaries when the report was built, and those set here, kept in localStorage.
// Labels are only ever added; the latest of a feature is shown, an empty one takes it away (as in analyze/labels).
"use strict";
granary.labels = (() => {
  const LONGEST = 200;
  const AUTHOR = "granary labels author";
  const built = new Map(); // dictionary -> labels
  const own = new Map(); // dictionary -> labels set here
  const shown = new Map(); // dictionary -> Map(feature -> text)
  const keys = new Map(); // dictionary -> key in localStorage
  const full = new Map(); // dictionary -> name that `label --merge` knows
  let stored = true;

  const before = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const order = (a, b) =>
    a.feature - b.feature || before(a.time, b.time) || before(a.author, b.author) || before(a.text, b.text);

  async function open(report) {
    const labels = await granary.load("labels");
    for (const dictionary of report.dictionaries) {
      built.set(dictionary.name, labels[dictionary.name] || []);
      keys.set(dictionary.name, `granary labels ${dictionary.identity}`);
      full.set(dictionary.name, dictionary.full_name);
      own.set(dictionary.name, read(keys.get(dictionary.name)));
      show(dictionary.name);
    }
    window.addEventListener("storage", (event) => {
      for (const [name, key] of keys) if (event.key === key) (own.set(name, read(key)), show(name), announce());
    });
  }

  function read(key) {
    try {
      const found = JSON.parse(localStorage.getItem(key) || "[]");
      return Array.isArray(found) ? found : [];
    } catch {
      stored = false;
      return [];
    }
  }

  function show(name) {
    const texts = new Map();
    for (const label of [...built.get(name), ...own.get(name)].sort(order)) texts.set(label.feature, label.text);
    for (const [feature, text] of texts) if (!text) texts.delete(feature);
    shown.set(name, texts);
  }

  const text = (name, feature) => shown.get(name)?.get(feature) || "";
  const texts = (name) => shown.get(name) || new Map();
  const history = (name, feature) =>
    [...built.get(name), ...own.get(name)].filter((label) => label.feature === feature).sort(order);
  const isOwn = (name, feature) => own.get(name).some((label) => label.feature === feature);

  // What is wrong with a text or an author, or null.
  function wrong(what, value) {
    if (value.length > LONGEST) return `${what} has ${value.length} characters, expected at most ${LONGEST}`;
    if (/[\p{C}\p{Zl}\p{Zp}]/u.test(value)) return `${what} holds characters that cannot be printed`;
    return null;
  }

  // Call a feature so from now on; returns what is wrong, or null.
  function set(name, feature, said, by) {
    const value = said.trim().replace(/\s+/g, " ");
    const author = by.trim().replace(/\s+/g, " ");
    const problem = author ? wrong("the label", value) || wrong("your name", author) : "say who you are first";
    if (problem) return problem;
    if (value === text(name, feature)) return null;
    const latest = history(name, feature).at(-1)?.time || "";
    let moment = new Date();
    const stamp = () => `${moment.toISOString().slice(0, 19)}Z`;
    if (latest >= stamp()) moment = new Date(Date.parse(latest) + 1000); // what is said last is what is shown
    own.get(name).push({ feature, text: value, author, time: stamp() });
    keep(name);
    remember(author);
    show(name);
    announce();
    return null;
  }

  function keep(name) {
    try {
      localStorage.setItem(keys.get(name), JSON.stringify(own.get(name).sort(order)));
    } catch {
      stored = false;
    }
  }

  function remember(author) {
    try {
      localStorage.setItem(AUTHOR, author);
    } catch {
      stored = false;
    }
  }

  function author() {
    try {
      return localStorage.getItem(AUTHOR) || "";
    } catch {
      return "";
    }
  }

  // Forget what was set here, of all dictionaries.
  function forget() {
    for (const name of own.keys()) {
      own.set(name, []);
      keep(name);
      show(name);
    }
    announce();
  }

  const announce = () => document.dispatchEvent(new CustomEvent("granary-labels"));
  const all = () =>
    [...own].flatMap(([name, labels]) => labels.map((label) => ({ dictionary: full.get(name), name, ...label })));

  // The file that `python -m analyze label --merge labels.json` reads.
  function file() {
    const labels = all().map(({ dictionary, feature, text, author, time }) => ({ dictionary, feature, text, author, time }));
    return `${JSON.stringify({ format: "granary labels", labels, version: 1 }, null, 1)}\n`;
  }

  return { open, text, texts, history, isOwn, set, author, all, file, forget, stored: () => stored, built: (name) => built.get(name) };
})();
