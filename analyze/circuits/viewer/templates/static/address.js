// What is shown, all of it in the part of the address after #, so that it can be sent as a link.
//   #/image-00017.step-2.img_3.p12.f66?view=positional&nodes=0.8&edges=0.9&node=feature_L2_img_p4_f7&follow=up&pin=…&group=red:…
"use strict";
granary.address = (() => {
  const FOLLOWS = ["both", "up", "down", "near"];

  function parse(hash, known) {
    const [path, query] = hash.replace(/^#\/?/, "").split("?");
    const asked = new URLSearchParams(query || "");
    const name = decode(path);
    const share = (key) => (asked.has(key) && Number.isFinite(Number(asked.get(key))) ? Math.min(1, Math.max(0, Number(asked.get(key)))) : null);
    const list = (key) => (asked.get(key) || "").split(",").filter(Boolean);
    return {
      graph: known.includes(name) ? name : known[0], unknown: name && !known.includes(name) ? name : null,
      view: ["positional", "aggregated"].includes(asked.get("view")) ? asked.get("view") : null,
      nodes: share("nodes"), edges: share("edges"), shares: asked.has("nodes") || asked.has("edges"), node: asked.get("node") || null, follow: FOLLOWS.includes(asked.get("follow")) ? asked.get("follow") : "near",
      pins: list("pin"), hidden: list("hide"),
      groups: asked.getAll("group").map((text) => ({ title: text.slice(0, text.indexOf(":")), names: text.slice(text.indexOf(":") + 1).split(",").filter(Boolean) })).filter((group) => group.title && group.names.length),
    };
  }

  function decode(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  // The link to a state; shares to the last digit, so that the link shows what was seen.
  function link(state) {
    const said = new URLSearchParams();
    if (state.view) said.set("view", state.view);
    for (const key of ["nodes", "edges"]) if (state.shares && state[key] !== null) said.set(key, String(state[key]));
    if (state.node) said.set("node", state.node);
    if (state.follow !== "near") said.set("follow", state.follow);
    if (state.pins.length) said.set("pin", state.pins.join(","));
    if (state.hidden.length) said.set("hide", state.hidden.join(","));
    for (const { title, names } of state.groups) said.append("group", `${title}:${names.join(",")}`);
    const text = said.toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
    return `#/${encodeURIComponent(state.graph)}${text ? `?${text}` : ""}`;
  }

  return { parse, link, FOLLOWS };
})();
