"""How the page looks: the colours of the report, the fonts of the reader's own machine; nothing is loaded for it."""

from pathlib import Path
from typing import Any

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
ACCENT = (
    "#fdf4e7",
    "#fae5c6",
    "#f5cf9a",
    "#efb45f",
    "#dd9539",
    "#b0620f",
    "#8a4b08",
    "#703d09",
    "#5a320b",
    "#47290c",
    "#2b1806",
)
GREYS = (
    "#fbfaf7",
    "#f3efe7",
    "#e4dfd6",
    "#cbc4b8",
    "#a09788",
    "#7b7368",
    "#5f5a52",
    "#464139",
    "#2c2925",
    "#1f1d1a",
    "#161513",
)
STYLE = Path(__file__).with_name("explore.css")
SCRIPT = """
() => {
  const dark = document.body.classList, key = 'granary theme';
  try { const kept = localStorage.getItem(key); if (kept) dark.toggle('dark', kept === 'dark'); } catch (_) { /* private */ }
  document.addEventListener('click', (event) => {
    if (!event.target.closest('.head .theme')) return;
    dark.toggle('dark');
    try { localStorage.setItem(key, dark.contains('dark') ? 'dark' : 'light'); } catch (_) { /* private */ }
  });
}
"""


def head() -> str:
    """The styles, for the head of the page: what gradio is given as `css` it rewrites, so that it reaches only parts of the page."""
    return f"<style>\n{STYLE.read_text()}</style>"


def theme(gradio: Any) -> Any:
    """The theme, of the report's colours."""
    names = ("c50", "c100", "c200", "c300", "c400", "c500", "c600", "c700", "c800", "c900", "c950")

    def hue(name: str, values: tuple[str, ...]) -> Any:
        return gradio.themes.Color(name=name, **dict(zip(names, values, strict=True)))

    return gradio.themes.Base(
        primary_hue=hue("grain", ACCENT),
        secondary_hue=hue("grain", ACCENT),
        neutral_hue=hue("stone", GREYS),
        font=FONTS,
        font_mono=MONO,
        radius_size=gradio.themes.sizes.radius_md,
    ).set(
        body_background_fill=GREYS[0],
        body_background_fill_dark=GREYS[10],
        body_text_color="#1d1b18",
        body_text_color_dark="#eeeae2",
        body_text_color_subdued=GREYS[6],
        body_text_color_subdued_dark="#b4ac9f",
        background_fill_primary="#ffffff",
        background_fill_primary_dark=GREYS[9],
        background_fill_secondary=GREYS[1],
        background_fill_secondary_dark="#25221e",
        border_color_primary=GREYS[2],
        border_color_primary_dark="#37332d",
        block_background_fill="#ffffff",
        block_background_fill_dark=GREYS[9],
        block_border_color=GREYS[2],
        block_border_color_dark="#37332d",
        block_label_text_color=GREYS[6],
        block_label_text_color_dark="#b4ac9f",
        block_title_text_color=GREYS[6],
        block_title_text_color_dark="#b4ac9f",
        input_background_fill=GREYS[0],
        input_background_fill_dark=GREYS[10],
        input_border_color=GREYS[2],
        input_border_color_dark="#37332d",
        color_accent=ACCENT[6],
        color_accent_soft=ACCENT[0],
        color_accent_soft_dark="#3a2f1f",
        checkbox_background_color_selected=ACCENT[6],
        checkbox_background_color_selected_dark=ACCENT[4],
        checkbox_border_color_selected=ACCENT[6],
        checkbox_border_color_selected_dark=ACCENT[4],
        slider_color=ACCENT[5],
        slider_color_dark=ACCENT[3],
        button_primary_background_fill=ACCENT[6],
        button_primary_background_fill_hover=ACCENT[7],
        button_primary_background_fill_dark=ACCENT[3],
        button_primary_background_fill_hover_dark=ACCENT[2],
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#1d1b18",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover=GREYS[1],
        button_secondary_background_fill_dark=GREYS[9],
        button_secondary_background_fill_hover_dark="#25221e",
    )
