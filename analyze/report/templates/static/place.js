// Where the reader is, all of it in the part of the address after #, so that every view can be sent as a link.
//   #/overview/truth    #/features?dictionary=img_3&sort=-density    #/feature/img_3/1/412?q=red    #/labels
"use strict";
granary.place = (() => {
  const VIEWS = ["overview", "features", "feature", "labels"];
  const FILTERS = ["q", "dictionary", "step", "category", "alive", "labelled", "sort"];

  function parse(hash) {
    const [path, query] = hash.replace(/^#\/?/, "").split("?");
    const [view, ...rest] = path.split("/").map(decode);
    const asked = new URLSearchParams(query || "");
    const filters = {};
    for (const name of FILTERS) if (asked.get(name)) filters[name] = asked.get(name);
    const place = { view: VIEWS.includes(view) ? view : "overview", filters };
    if (place.view === "overview") place.section = rest[0] || null;
    if (place.view === "feature") Object.assign(place, { dictionary: rest[0], step: Number(rest[1]), feature: Number(rest[2]) });
    return place;
  }

  function decode(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  function query(filters) {
    const said = new URLSearchParams();
    for (const name of FILTERS) if (filters[name]) said.set(name, filters[name]);
    const text = said.toString();
    return text ? `?${text}` : "";
  }

  const features = (filters) => `#/features${query(filters)}`;
  const feature = (dictionary, step, number, filters = {}) =>
    `#/feature/${encodeURIComponent(dictionary)}/${step}/${number}${query(filters)}`;

  const now = () => parse(location.hash);
  const go = (hash) => (location.hash = hash);
  // The same view with other words in the address: no step for the back button, no event.
  function amend(hash) {
    if (hash !== location.hash) history.replaceState(null, "", hash);
  }

  return { now, go, amend, features, feature };
})();
