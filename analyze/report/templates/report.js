"use strict";
// Filter and order of the feature cards. Without this script the page shows all of them as chosen.
(function () {
  const form = document.getElementById("filter");
  const sections = [...document.querySelectorAll("section.dictionary")];
  const cards = new Map(sections.map((section) => [section, [...section.querySelectorAll("article.card")]]));
  const nothing = document.getElementById("nothing");

  function apply() {
    const stream = form.elements.stream.value;
    const dictionary = form.elements.dictionary.value;
    const order = form.elements.order.value;
    const words = form.elements.find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    let total = 0;
    for (const [section, own] of cards) {
      const here = (!stream || section.dataset.stream === stream) && (!dictionary || section.dataset.dictionary === dictionary);
      let visible = 0;
      for (const card of own) {
        const text = `${card.dataset.text} ${section.dataset.dictionary}`.toLowerCase();
        card.hidden = !(here && words.every((word) => text.includes(word)));
        visible += card.hidden ? 0 : 1;
      }
      section.hidden = !here || (visible === 0 && words.length > 0);
      const ordered = order ? [...own].sort((a, b) => Number(b.dataset[order]) - Number(a.dataset[order])) : own;
      section.querySelector(".cards").append(...ordered);
      shown += visible;
      total += own.length;
    }
    form.elements.count.value = shown === total ? `${total} features` : `${shown} of ${total} features`;
    nothing.hidden = shown > 0 || total === 0;
  }

  // A link to a card that the filter hides shows it again.
  function reveal() {
    const target = location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
    if (target && target.closest("[hidden]")) {
      form.reset();
      apply();
      target.scrollIntoView();
    }
  }

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", reveal);
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      form.elements.find.focus();
    }
  });
  apply();
  reveal();
})();
