// Numbers and words as people read them, colours as the page has them now, light or dark.
"use strict";
granary.show = (() => {
  // `2.1 %`, with as many digits as say something.
  function percent(share) {
    const value = 100 * share;
    if (value === 0) return "0 %";
    if (value < 0.001) return "< 0.001 %";
    return `${value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
  }

  const number = (value, digits = 3) =>
    value === null || value === undefined || Number.isNaN(value) ? "–" : value === 0 ? "0" : String(Number(value.toPrecision(digits)));
  const whole = (value) => value.toLocaleString("en");

  // A colour of the style sheet as #rrggbb, as it is now: `light-dark()` is resolved by the browser, not by us.
  function colour(name) {
    const probe = granary.h("i", { style: { color: `var(--${name})`, display: "none" } });
    document.body.append(probe);
    const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    probe.remove();
    return `#${parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("")}`;
  }

  // The file of an image's picture, from the page.
  function picture(image, report) {
    const same = report.pictures.same[image];
    const number = same === undefined ? image : same;
    return `${document.documentElement.dataset.base || ""}pictures/${String(Math.floor(number / report.pictures.folder_images)).padStart(3, "0")}/${number}.webp`;
  }

  // At most so many signs; one that takes two places is not cut in two.
  function short(text, most) {
    const signs = [...text];
    return signs.length <= most ? text : `${signs.slice(0, most - 1).join("").trimEnd()}…`;
  }

  return { percent, number, whole, colour, picture, short };
})();
