// The graph on its canvases: one with everything, which is drawn when something changed, and over it one with what the reader points
// at, which is drawn at once.  While it is moved, the picture is moved; it is drawn anew when it rests.
"use strict";
granary.drawing = (() => {
  const { ink, painting } = granary;
  const DIMMED = 0.2;
  const REST_MS = 90;
  const NEAR = 13; // pixels from a node at which it counts as pointed at
  let base, over, room, zoom, calls;
  let scene = null; // {net, vis, place, looks, labels, straight}
  let tree = null;
  let transform = d3.zoomIdentity;
  let drawn = d3.zoomIdentity; // the transform that the lower canvas shows
  let colours = null;
  let marked = null; // {nodes, edges, main}
  let turn = 0;
  let resting = null;
  let laying = null;
  let own = false; // whether the reader has zoomed or moved it: then it stays where it is
  const size = { width: 0, height: 0, ratio: 1 };

  function open(element, callbacks) {
    room = element;
    calls = callbacks;
    base = room.querySelector("canvas.base");
    over = room.querySelector("canvas.over");
    zoom = d3.zoom().scaleExtent([0.05, 12]).filter((event) => !event.shiftKey && !event.button).on("zoom", (event) => ((own ||= Boolean(event.sourceEvent)), moved(event.transform)));
    d3.select(over).call(zoom).on("dblclick.zoom", null);
    over.addEventListener("pointermove", (event) => event.buttons || calls.hover(pick(event)));
    over.addEventListener("pointerleave", () => calls.hover(null));
    over.addEventListener("click", (event) => !event.shiftKey && calls.choose(pick(event), false));
    over.addEventListener("dblclick", () => fit(true));
    over.addEventListener("pointerdown", (event) => event.shiftKey && lasso(event));
    new ResizeObserver(() => resized()).observe(room);
    measure();
  }

  function measure() {
    const box = room.getBoundingClientRect();
    const same = size.width === box.width && size.height === box.height;
    Object.assign(size, { width: box.width, height: box.height, ratio: Math.min(2, window.devicePixelRatio || 1) });
    if (same) return false;
    for (const canvas of [base, over]) Object.assign(canvas, { width: Math.round(size.width * size.ratio), height: Math.round(size.height * size.ratio) });
    return true;
  }

  function resized() {
    const { width, height } = size;
    if (!measure() || !scene) return;
    if (!own) {
      clearTimeout(laying);
      laying = setTimeout(() => own || calls.resized(), REST_MS); // for another shape another layout
      return fit(false);
    }
    d3.select(over).call(zoom.translateBy, (size.width - width) / 2 / transform.k, (size.height - height) / 2 / transform.k);
    paint();
  }

  const aspect = () => Math.max(0.5, (size.width - 60) / Math.max(1, size.height - 40));

  // Show a scene; `refit`: from the start, as a whole.  Else it is fitted until the reader moves it himself; from then on `anchor`, a
  // node of his, stays where it is.
  function show(next, refit, anchor = null) {
    const before = scene;
    scene = next;
    if (before?.net !== next.net) forget(); // what stood out has other rows now
    colours = ink.palette();
    const { net, vis, place } = scene;
    const nodes = [];
    for (let i = 0; i < net.count; i++) if (vis.mask[i]) nodes.push(i);
    scene.order = nodes.sort((a, b) => net.nodes[a].weight - net.nodes[b].weight);
    scene.straight = vis.edges.length > ink.STRAIGHT;
    tree = d3.quadtree(nodes, (i) => place.x[i], (i) => place.y[i]);
    if (refit || !own || !before) return fit(false);
    stay(before.place, anchor);
    paint();
  }

  function forget() {
    marked = null;
    base.style.opacity = "1";
  }

  // Move it so that the anchor, or without one what was in the middle, is where it was.
  function stay(was, anchor) {
    const { place } = scene;
    const [x, y] = [size.width / 2, size.height / 2];
    const inside = (part) => Math.min(1, Math.max(0, part));
    const pinned = anchor !== null && !Number.isNaN(was.x[anchor]) && was.x[anchor] !== undefined;
    const [from, to] = pinned
      ? [[transform.applyX(was.x[anchor]), transform.applyY(was.y[anchor])], [place.x[anchor], place.y[anchor]]]
      : [[x, y], [inside(transform.invertX(x) / was.width) * place.width, inside(transform.invertY(y) / was.height) * place.height]];
    d3.select(over).call(zoom.transform, d3.zoomIdentity.translate(from[0] - transform.k * to[0], from[1] - transform.k * to[1]).scale(transform.k));
  }

  function fit(smoothly) {
    own = false;
    const { place } = scene;
    const margin = { left: 58, right: 18, top: 34, bottom: 18 };
    const k = Math.min((size.width - margin.left - margin.right) / place.width, (size.height - margin.top - margin.bottom) / place.height, 1.6);
    const x = margin.left + (size.width - margin.left - margin.right - k * place.width) / 2;
    const y = margin.top + (size.height - margin.top - margin.bottom - k * place.height) / 2;
    const to = d3.zoomIdentity.translate(x, y).scale(Math.max(0.05, k));
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    (smoothly && !calm ? d3.select(over).transition().duration(250) : d3.select(over)).call(zoom.transform, to);
    if (!smoothly) paint();
  }

  function moved(to) {
    transform = to;
    if (!scene) return;
    const k = to.k / drawn.k;
    base.style.transform = `translate(${to.x - k * drawn.x}px, ${to.y - k * drawn.y}px) scale(${k})`;
    paintOver();
    calls.moved();
    clearTimeout(resting);
    resting = setTimeout(paint, scene.vis.edges.length > painting.PER_FRAME ? REST_MS : 0);
  }

  const zoomBy = (factor) => ((own = true), d3.select(over).call(zoom.scaleBy, factor));
  const panBy = (x, y) => ((own = true), d3.select(over).call(zoom.translateBy, x / transform.k, y / transform.k));

  // Bring a node into view where it is not.
  function reveal(i) {
    const x = transform.applyX(scene.place.x[i]);
    const y = transform.applyY(scene.place.y[i]);
    if (x < 60 || y < 30 || x > size.width - 30 || y > size.height - 30) d3.select(over).call(zoom.translateTo, scene.place.x[i], scene.place.y[i]);
  }

  function pick(event) {
    const box = over.getBoundingClientRect();
    return at(event.clientX - box.left, event.clientY - box.top);
  }

  function at(x, y) {
    if (!tree) return null;
    const found = tree.find(transform.invertX(x), transform.invertY(y), NEAR / transform.k);
    return found === undefined ? null : found;
  }

  // Shift and drag: choose what lies in the rectangle; without a drag, the node pointed at.
  function lasso(down) {
    const box = over.getBoundingClientRect();
    const from = [down.clientX - box.left, down.clientY - box.top];
    const frame = room.querySelector(".lasso");
    let to = from;
    const move = (event) => {
      to = [event.clientX - box.left, event.clientY - box.top];
      Object.assign(frame.style, { left: `${Math.min(from[0], to[0])}px`, top: `${Math.min(from[1], to[1])}px`, width: `${Math.abs(to[0] - from[0])}px`, height: `${Math.abs(to[1] - from[1])}px` });
      frame.hidden = false;
    };
    const up = () => {
      frame.hidden = true;
      window.removeEventListener("pointermove", move);
      if (Math.hypot(to[0] - from[0], to[1] - from[1]) < 4) return calls.choose(at(...from), true);
      const [left, right] = [from[0], to[0]].map((x) => transform.invertX(x)).sort((a, b) => a - b);
      const [top, bottom] = [from[1], to[1]].map((y) => transform.invertY(y)).sort((a, b) => a - b);
      const { x, y } = scene.place;
      calls.lasso(scene.order.filter((i) => x[i] >= left && x[i] <= right && y[i] >= top && y[i] <= bottom));
    };
    down.preventDefault();
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", up, { once: true });
  }

  // Draw everything anew, in pieces where it is much; a later call takes over from one that is not done.
  async function paint() {
    clearTimeout(resting);
    if (!scene) return;
    const mine = ++turn;
    const target = document.createElement("canvas");
    Object.assign(target, { width: base.width, height: base.height });
    const context = target.getContext("2d");
    context.scale(size.ratio, size.ratio);
    const at = transform;
    const steps = painting.render(context, scene, at, size, colours);
    for (let step = steps.next(); !step.done; step = steps.next()) {
      await new Promise((resolve) => requestAnimationFrame(resolve));
      if (mine !== turn) return;
    }
    drawn = at;
    base.getContext("2d").clearRect(0, 0, base.width, base.height);
    base.getContext("2d").drawImage(target, 0, 0);
    const k = transform.k / drawn.k;
    base.style.transform = `translate(${transform.x - k * drawn.x}px, ${transform.y - k * drawn.y}px) scale(${k})`;
    paintOver();
    room.dataset.painted = String(Number(room.dataset.painted || 0) + 1);
  }

  // What is pointed at: `nodes` and `edges` that belong to it, `main` the node itself, `rings` nodes with a ring (pinned, chosen).
  function mark(next) {
    marked = next;
    base.style.opacity = marked.nodes ? String(DIMMED) : "1";
    paintOver();
  }

  function paintOver() {
    const context = over.getContext("2d");
    context.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    if (scene && marked) painting.marked(context, scene, marked, transform, size, colours);
  }

  // The canvas as it is seen, twice as fine, under two lines that say what it is of.
  function png(headline) {
    const head = painting.HEAD;
    const canvas = granary.h("canvas", { width: Math.round(size.width * 2), height: Math.round((size.height + head) * 2) });
    const context = canvas.getContext("2d");
    context.scale(2, 2);
    context.fillStyle = colours.card;
    context.fillRect(0, 0, size.width, size.height + head);
    painting.heading(context, headline, size.width, colours);
    context.translate(0, head);
    context.beginPath();
    context.rect(0, 0, size.width, size.height);
    context.clip();
    context.globalAlpha = 1;
    const layer = granary.h("canvas", { width: canvas.width, height: Math.round(size.height * 2) });
    const own = layer.getContext("2d");
    own.scale(2, 2);
    for (const _ of painting.render(own, scene, transform, size, colours)); // all at once
    context.globalAlpha = marked?.nodes ? DIMMED : 1;
    context.drawImage(layer, 0, 0, size.width, size.height);
    context.globalAlpha = 1;
    if (marked) painting.marked(context, scene, marked, transform, size, colours);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  const screen = (i) => [transform.applyX(scene.place.x[i]), transform.applyY(scene.place.y[i])];
  return { open, show, fit, mark, png, zoomBy, panBy, reveal, screen, aspect, repaint: () => scene && ((colours = ink.palette()), paint()), scene: () => scene, marked: () => marked, size };
})();
