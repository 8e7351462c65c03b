"""The page: its head and its tabs."""

from collections.abc import Mapping
from typing import Any

from analyze.explore import browse_tab, html, steer_tab
from analyze.explore.catalogue import Catalogue
from analyze.explore.desk import Desk
from analyze.explore.rows import changeable, spans_of
from store.sizes import picture_size


def build(gradio: Any, desk: Desk, catalogue: Catalogue | None, links: Mapping[str, str]) -> Any:
    """The page as `gradio.Blocks`; `links`: names and addresses of other pages to look at."""
    with gradio.Blocks(title="Granary · explore", analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(html.header(facts(desk), links), elem_id="head", apply_default_css=False)
        if catalogue is None:
            steer_tab.build(gradio, desk)
            return page
        parts: list[Any] = []
        with gradio.Tabs(elem_id="tabs") as tabs:
            with gradio.Tab("Find a feature", id="find", elem_id="find"):
                browse_tab.build(gradio, catalogue, desk, parts)
            with gradio.Tab("Steer", id="steer", elem_id="steering"):
                tab = steer_tab.build(gradio, desk)
        browse_tab.wire(gradio, catalogue, desk, parts, tab, tabs)
    return page


def facts(desk: Desk) -> dict[str, str]:
    """What the head of the page says."""
    canvas, shelf = desk.studio.canvas, desk.studio.shelf
    return {
        "model": canvas.model_name,
        "pictures": f"{picture_size(canvas.width, canvas.height, ' × ')}, {canvas.num_inference_steps} steps",
        "dictionaries": f"{len(changeable(shelf.outlines))}: {spans_of(shelf.outlines)}",
        "store": str(desk.settings.store),
    }
