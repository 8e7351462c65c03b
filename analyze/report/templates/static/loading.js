// What the report is made of arrives as classic scripts that call granary.take(name, value): file:// allows nothing else.
"use strict";
const granary = (() => {
  const base = document.documentElement.dataset.base || ""; // where everything lies, from the page
  const EXAMPLES_KEPT = 64; // files of 64 features each; the oldest are let go of
  const values = new Map();
  const asked = new Map();

  function script(path) {
    return new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = base + path;
      element.onload = () => (element.remove(), resolve());
      element.onerror = () => (element.remove(), reject(new Error(`${path} cannot be read: is the folder of the report whole?`)));
      document.head.append(element);
    });
  }

  function take(name, value) {
    values.set(name, value);
  }

  // The value that data/NAME.js hands over; it is read once.
  function load(name) {
    if (!asked.has(name)) {
      const loaded = script(`data/${name}.js`).then(() => {
        const value = values.get(name);
        values.delete(name);
        return value;
      });
      loaded.catch(() => asked.delete(name));
      asked.set(name, loaded);
      if (name.startsWith("examples/")) {
        const old = [...asked.keys()].filter((key) => key.startsWith("examples/"));
        old.slice(0, Math.max(0, old.length - EXAMPLES_KEPT)).forEach((key) => asked.delete(key));
      }
    }
    return asked.get(name);
  }

  // A library of libraries/, read when it is first needed; several in the order given.
  const libraries = new Map();
  function library(...names) {
    return names.reduce((before, name) => before.then(() => {
      if (!libraries.has(name)) libraries.set(name, script(`libraries/${name}`));
      return libraries.get(name);
    }), Promise.resolve());
  }

  const styles = new Set();
  function style(name) {
    if (styles.has(name)) return;
    styles.add(name);
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = `${base}libraries/${name}`;
    document.querySelector("link[rel=stylesheet]").before(link); // ours comes after it and wins
  }

  // An element: h("a", {href: "#", class: "x", on: {click}}, "text", other).  Text is always text.
  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, does] of Object.entries(value)) element.addEventListener(event, does);
      else if (name === "style") for (const [key, is] of Object.entries(value)) element.style.setProperty(key, is);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  return { take, load, library, style, h };
})();
