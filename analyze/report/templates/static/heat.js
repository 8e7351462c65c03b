// Heat over pictures and words, drawn here from packed token values: as analyze/pictures/overlay.py draws it.
"use strict";
granary.heat = (() => {
  const PERCENTILE = 0.99;
  const STRENGTH = 0.85;
  const SIDE = 256; // pixels of the longer side of smooth heat
  let table = null; // 256 colours, three bytes each

  async function open() {
    table = granary.packed.numbers(await granary.load("colours"), "u1");
  }

  // What is drawn hottest: the 99th percentile of the positive values, linear between ranks; 1 where there is none.
  function scale(heats) {
    const positive = Float32Array.from(heats.flatMap((values) => [...values].filter((value) => value > 0))).sort();
    if (!positive.length) return 1;
    const place = PERCENTILE * (positive.length - 1);
    const low = Math.floor(place);
    const high = Math.min(low + 1, positive.length - 1);
    return positive[low] + (positive[high] - positive[low]) * (place - low);
  }

  // Bicubic (a = -0.5) from `from` samples to `to`: for each pixel its first sample and four weights.
  function taps(from, to) {
    return Array.from({ length: to }, (_, pixel) => {
      const centre = ((pixel + 0.5) * from) / to;
      const first = Math.floor(centre - 0.5) - 1;
      const weights = [0, 1, 2, 3].map((k) => (first + k < 0 || first + k >= from ? 0 : cubic(centre - 0.5 - (first + k))));
      const sum = weights.reduce((a, b) => a + b, 0);
      return { first, weights: weights.map((weight) => weight / sum) };
    });
  }

  function cubic(distance) {
    const x = Math.abs(distance);
    if (x < 1) return 1.5 * x ** 3 - 2.5 * x ** 2 + 1;
    return x < 2 ? -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 : 0;
  }

  function enlarged(values, rows, columns, height, width) {
    const across = taps(columns, width);
    const wide = new Float32Array(rows * width);
    for (let r = 0; r < rows; r++) {
      for (let x = 0; x < width; x++) {
        const { first, weights } = across[x];
        for (let k = 0; k < 4; k++) if (weights[k]) wide[r * width + x] += weights[k] * values[r * columns + first + k];
      }
    }
    const found = new Float32Array(height * width);
    taps(rows, height).forEach(({ first, weights }, y) => {
      for (let k = 0; k < 4; k++) {
        if (!weights[k]) continue;
        for (let x = 0; x < width; x++) found[y * width + x] += weights[k] * wide[(first + k) * width + x];
      }
    });
    return found;
  }

  // A canvas of the heat alone, to lie over a picture; it covers the picture exactly.
  function canvas(values, [rows, columns], hottest, smooth) {
    const grow = smooth ? Math.max(1, SIDE / Math.max(rows, columns)) : 1;
    const height = Math.round(rows * grow);
    const width = Math.round(columns * grow);
    const pixels = smooth ? enlarged(values, rows, columns, height, width) : values;
    const element = granary.h("canvas", { width, height, class: smooth ? "heat" : "heat patches", "aria-hidden": "true" });
    const image = new ImageData(width, height);
    for (let i = 0; i < pixels.length; i++) {
      const strength = Math.min(1, Math.max(0, pixels[i] / hottest));
      const colour = 3 * Math.round(255 * strength);
      image.data.set([table[colour], table[colour + 1], table[colour + 2], 255 * STRENGTH * strength ** 0.7], 4 * i);
    }
    element.getContext("2d").putImageData(image, 0, 0);
    return element;
  }

  // A prompt, its tokens marked by their heat.
  function words(pieces, values, hottest) {
    const found = granary.h("span", { class: "pieces" });
    pieces.forEach((piece, place) => {
      const heat = Math.min(1, (values[place] || 0) / hottest);
      const text = piece.trimStart();
      if (piece.startsWith(" ") && place > 0) found.append(" ");
      const title = `z ${granary.show.number(values[place] || 0)}`;
      if (heat > 0.02) found.append(granary.h("mark", { style: { "--heat": heat.toFixed(2) }, title }, text));
      else found.append(text === "⟨end⟩" ? granary.h("i", {}, text) : text);
    });
    return found;
  }

  return { open, scale, canvas, words };
})();
