"""The tab where features are found: a dictionary, a step, words; the list; one feature with its top images."""

from typing import Any

from analyze.explore import html
from analyze.explore.catalogue import ORDERS, Catalogue
from analyze.explore.desk import Desk, rows_in, told
from analyze.explore.steer_tab import QUIET, SteerTab, with_feature
from store.errors import UsageError
from store.sites import Site

LISTED = 60
ON_PRESS = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('[data-feature]');
  if (row) trigger('click', { feature: Number(row.dataset.feature) });
});
"""
ORDER_NAMES = {
    "match": "best match", "interest": "interest", "max": "greatest activation", "density": "share of tokens",
    "coherence": "coherence of the top images", "number": "number",
}  # fmt: skip


def build(gradio: Any, catalogue: Catalogue, desk: Desk, into: "list[Any]") -> Any:
    """The tab, built into the gradio context that is open; `wire` connects it with the other.  `into` gets its parts."""
    name = first_dictionary(catalogue)
    step, steps = catalogue.there[name][-1], catalogue.there[name]
    begin = catalogue.listing(name, step)
    found, total = begin.found("", "match", LISTED)
    chosen = found[0].feature if found else None
    with gradio.Row(equal_height=False):
        with gradio.Column(scale=6, min_width=330):
            with gradio.Row():
                dictionary = gradio.Dropdown(
                    list(catalogue.there),
                    value=name,
                    label="Dictionary",
                    min_width=130,
                    filterable=False,
                    elem_id="dictionary",
                )
                at = gradio.Dropdown(
                    list(steps), value=step, label="Step", min_width=80, filterable=False, elem_id="step"
                )
                order = gradio.Dropdown(
                    [(ORDER_NAMES[each], each) for each in ORDERS], value="match", label="Order", min_width=130, filterable=False,
                    elem_id="order",
                )  # fmt: skip
            text = gradio.Textbox(
                label="Search",
                placeholder="red, circle, a label, a word of the prompt, a number",
                max_lines=1,
                elem_id="search",
            )
            table = gradio.HTML(
                html.listing(found, total, begin, chosen), elem_id="table", js_on_load=ON_PRESS, apply_default_css=False
            )
        with gradio.Column(scale=7, min_width=330):
            title, images = shown_feature(catalogue, name, step, chosen)
            shown = gradio.HTML(title, elem_id="feature", apply_default_css=False)
            steer = gradio.Button("Steer by this feature", variant="primary", elem_id="steer")
            warned = gradio.HTML("", elem_id="warned", apply_default_css=False)
            top = gradio.HTML(images, elem_id="top-images", apply_default_css=False)
    number = gradio.State(chosen)
    into += [dictionary, at, order, text, table, shown, top, steer, warned, number]
    return into


def wire(gradio: Any, catalogue: Catalogue, desk: Desk, parts: "list[Any]", tab: SteerTab, tabs: Any) -> None:
    """What happens when something is chosen, searched or pressed."""
    dictionary, at, order, text, table, shown, top, steer, warned, number = parts

    def listed(name: str, step: int, order: Any, text: str | None, chosen: int | None) -> Any:
        def act() -> str:
            listing = catalogue.listing(name, step)
            return html.listing(*listing.found(text or "", order, LISTED), listing, chosen)

        return told(act, lambda message: message)

    def moved(name: str, step: int, order: Any, text: str | None) -> list[Any]:
        steps = catalogue.there[name]
        step = step if step in steps else steps[-1]

        def act() -> list[Any]:
            listing = catalogue.listing(name, step)
            found, total = listing.found(text or "", order, LISTED)
            chosen = found[0].feature if found else None
            there = gradio.Dropdown(choices=list(steps), value=step)
            return [
                there,
                html.listing(found, total, listing, chosen),
                *shown_feature(catalogue, name, step, chosen),
                chosen,
                "",
            ]

        return told(act, lambda message: [gradio.skip(), message, "", "", None, ""])  # type: ignore[no-any-return]

    def pressed(name: str, step: int, order: Any, text: str | None, event: gradio.EventData) -> list[Any]:
        feature = int(event.feature)

        def act() -> list[Any]:
            rows = listed(name, step, order, text, feature)
            return [*shown_feature(catalogue, name, step, feature), rows, feature, ""]

        return told(act, lambda message: [message, "", gradio.skip(), None, ""])  # type: ignore[no-any-return]

    def steered(name: str, chosen: int | None, rows_shown: int, *values: Any) -> list[Any]:
        def act() -> list[Any]:
            subject = catalogue.subject(name)
            refuse_single(subject.site)
            several = subject.name != str(subject.site)
            feature = f"{subject.name if several else subject.site}:{chosen}"
            rows = with_feature(rows_in(values, rows_shown), feature, desk.unit)
            return [gradio.Tabs(selected="steer"), "", *tab.put_rows(rows)]

        if chosen is None:
            return [gradio.skip()] * (2 + len(tab.outputs))
        return told(act, lambda message: [gradio.skip(), message, *[gradio.skip()] * len(tab.outputs)])  # type: ignore[no-any-return]

    where = [dictionary, at, order, text]
    gradio.on(
        [dictionary.input, at.input, order.input, text.change], moved, where, [at, table, shown, top, number, warned],
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    table.click(pressed, where, [shown, top, table, number, warned], **QUIET)
    tab.draw(steer.click(steered, [dictionary, number, tab.shown, *tab.inputs], [tabs, warned, *tab.outputs], **QUIET))


def refuse_single(site: Site) -> None:
    """`UsageError` for a site whose features can be looked at here and not changed."""
    if site.kind != "double":
        raise UsageError(
            f"{site}: features of single-stream blocks cannot be changed yet, only looked at: choose one of img_0, txt_0, …"
        )


def first_dictionary(catalogue: Catalogue) -> str:
    """What the page begins with: the last dictionary of the picture's stream, where colours and shapes are."""
    images = [name for name in catalogue.there if catalogue.subject(name).site.stream == "img"]
    return (images or list(catalogue.there))[-1]


def shown_feature(catalogue: Catalogue, name: str, step: int, feature: int | None) -> tuple[str, str]:
    """One feature and its top images, as HTML."""
    if feature is None:
        return "", ""
    listing = catalogue.listing(name, step)
    examples = catalogue.examples(name, step, feature)
    return html.feature(listing.entry(feature), listing), html.top_images(listing, examples, catalogue.analysis.store)
