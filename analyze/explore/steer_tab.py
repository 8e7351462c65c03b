"""The tab where pictures change: a prompt, up to six rows of features with sliders, plain | changed | difference, saving and loading."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from analyze.explore import html
from analyze.explore.desk import BEGIN, MOST_SEED, Desk, methods, range_of, rows_in, told
from analyze.explore.files import load
from analyze.explore.rows import MOST_ROWS, EditRow
from analyze.steering.edits import MODES, OF_PEAKS, Mode, Unit
from store.errors import UsageError

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
DRAWS: dict[str, Any] = {
    "api_visibility": "private", "show_progress": "minimal", "trigger_mode": "always_last",
    "concurrency_id": "model", "concurrency_limit": 1,
}  # fmt: skip
"""one picture at a time, whoever asks; of what is asked meanwhile only the last is drawn"""
HINT = (
    '<p class="cost">Tokens: <b>all</b>, positions such as <b>3,7-9</b>, or <b>above:0.5</b>, those with half of its maximum. '
    "Steps: <b>all</b>, or such as <b>2-3</b>.</p>"
)


@dataclass
class Row:
    """The inputs of one row of the page."""

    group: Any
    features: Any
    mode: Any
    strength: Any
    tokens: Any
    steps: Any
    unit: Any
    remove: Any

    @property
    def inputs(self) -> list[Any]:
        """What is asked for, in the order of `EditRow`."""
        return [self.features, self.mode, self.strength, self.tokens, self.steps, self.unit]


@dataclass
class SteerTab:
    """The tab's parts that others press or fill."""

    shown: Any
    """how many rows are shown"""
    rows: list[Row]
    put_rows: Callable[[list[EditRow]], list[Any]]
    """what `outputs` become for these rows"""
    draw: Callable[[Any], Any]
    """draws after what an event did"""

    @property
    def inputs(self) -> list[Any]:
        """All inputs of all rows."""
        return [each for row in self.rows for each in row.inputs]

    @property
    def outputs(self) -> list[Any]:
        """How many rows are shown, then the group and the inputs of each."""
        return [self.shown, *(each for row in self.rows for each in (row.group, *row.inputs))]


def build(gradio: Any, desk: Desk) -> SteerTab:
    """The tab, built into the gradio context that is open."""
    first, shown, last = desk.first, gradio.State(1), gradio.State(None)
    with gradio.Row(equal_height=False):
        with gradio.Column(scale=5, min_width=330):
            prompt = gradio.Textbox(first.prompt, label="Prompt", lines=2, max_lines=6, elem_id="prompt")
            with gradio.Row(elem_classes="in-line"):
                seed = gradio.Number(
                    first.seed, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, min_width=90, elem_id="seed"
                )
                another = gradio.Button("Next seed", min_width=120, scale=0, elem_id="next-seed")
            choices = desk.choices()
            image = gradio.Dropdown(
                choices, value=first.image if first.image is not None and first.image < len(choices) else None, filterable=True,
                label="Or take prompt and seed of an image of the store", visible=bool(choices), elem_id="image",
            )  # fmt: skip
            rows = [_row(gradio, desk, number) for number in range(MOST_ROWS)]
            gradio.HTML(HINT, apply_default_css=False)
            with gradio.Row(equal_height=True):
                more = gradio.Button("Add features", elem_id="more", min_width=120)
                go = gradio.Button("Draw", variant="primary", elem_id="draw", min_width=120)
            live = gradio.Checkbox(True, label="Draw whenever something changes", container=False, elem_id="live")
            with gradio.Accordion("Method, and streams that are off", open=False):
                method = gradio.Radio(
                    methods(), value="difference", label="How a change enters the model", elem_id="method"
                )
                off = gradio.Textbox(
                    label="Streams off", placeholder="txt 0-3 @steps=0", elem_id="off", max_lines=1,
                    info="a stream's MLPs write nothing at these layers; several with ; between them",
                )  # fmt: skip
        with gradio.Column(scale=8, min_width=330, elem_id="result"):
            pictures = gradio.HTML(desk.begin(), elem_id="pictures", apply_default_css=False)
            said = gradio.HTML(
                html.message("Name a feature and move its slider, or press Draw.", "note"),
                elem_id="said",
                apply_default_css=False,
            )
            with gradio.Row(elem_classes="in-line"):
                name = gradio.Textbox(
                    "explored", label="Name of the experiment", max_lines=1, elem_id="name", min_width=160
                )
                save = gradio.Button("Save", elem_id="save", min_width=90, scale=0)
                upload = gradio.UploadButton(
                    "Load a file", file_types=[".yaml", ".yml", ".json"], elem_id="load", min_width=130, scale=0
                )
            kept = gradio.HTML("", elem_id="kept", apply_default_css=False)
            file = gradio.File(label="Experiment file", visible=False, elem_id="file", interactive=False)
    inputs = [prompt, seed, method, off, shown, *(each for row in rows for each in row.inputs)]

    def asked(
        title: str | None, prompt: str | None, seed: Any, method: str, off: str | None, shown: int, *values: Any
    ) -> tuple[Any, Any]:
        return desk.shot(prompt, seed), desk.intervention(title, rows_in(values, shown), method, off)

    def drawn(last: Any, *values: Any) -> tuple[Any, Any, Any]:
        def act() -> tuple[Any, Any, Any]:
            found = asked("explored", *values)
            if repr(found) == last:
                return gradio.skip(), gradio.skip(), gradio.skip()
            return (*desk.draw(*found), repr(found))

        return told(act, lambda message: (gradio.skip(), message, None))  # type: ignore[no-any-return]

    def drawn_live(live: bool, last: Any, *values: Any) -> tuple[Any, Any, Any]:
        return drawn(last, *values) if live else (gradio.skip(), gradio.skip(), gradio.skip())

    outputs = [pictures, said, last]
    go.click(lambda *values: drawn(None, *values), inputs, outputs, **DRAWS)
    changes = [prompt.submit, prompt.blur, seed.change, method.input, off.submit, off.blur]
    for row in rows:
        changes += [row.features.submit, row.features.blur, row.strength.release, row.unit.input]
        changes += [row.tokens.submit, row.tokens.blur, row.steps.submit, row.steps.blur]

    def drawn_moving(live: bool, last: Any, *values: Any) -> tuple[Any, Any, Any]:
        return drawn_live(live and desk.quick, last, *values)

    gradio.on([row.strength.change for row in rows], drawn_moving, [live, last, *inputs], outputs, **DRAWS)
    gradio.on(changes, drawn_live, [live, last, *inputs], outputs, **DRAWS)

    def draw(event: Any) -> Any:
        return event.then(drawn_live, [live, last, *inputs], outputs, **DRAWS)

    tab = SteerTab(shown, rows, partial(_put_rows, gradio), draw)
    _wire_rows(gradio, desk, tab, more)
    another.click(lambda seed: int(seed or 0) + 1, seed, seed, **QUIET)
    by_number = {number: shot for shot, number in desk.images.items()}
    image.input(lambda number: by_number.get(number, (gradio.skip(), gradio.skip())), image, [prompt, seed], **QUIET)

    def keep(title: str | None, *values: Any) -> tuple[Any, Any]:
        def act() -> tuple[Any, Any]:
            path, text = desk.keep(title or "", *asked(title, *values))
            return text, gradio.File(value=str(path), visible=True)

        return told(act, lambda message: (message, gradio.File(visible=False)))  # type: ignore[no-any-return]

    save.click(keep, [name, *inputs], [kept, file], **QUIET)

    def opened(path: str) -> list[Any]:
        def act() -> list[Any]:
            found = load(Path(path), desk.studio, desk.settings)
            text = "; ".join([f"Loaded {found.name}", *found.notes])
            return [
                html.message(text, "good"), found.shot.prompt, found.shot.seed, found.method, found.off, found.name,
                *tab.put_rows(found.rows),
            ]  # fmt: skip

        return told(act, lambda message: [message, *[gradio.skip()] * (5 + len(tab.outputs))])  # type: ignore[no-any-return]

    draw(upload.upload(opened, upload, [kept, prompt, seed, method, off, name, *tab.outputs], **QUIET))
    return tab


def _row(gradio: Any, desk: Desk, number: int) -> Row:
    """One row; only the first is shown at the beginning."""
    slider = range_of("amplify", desk.unit)
    with gradio.Column(visible=number == 0, elem_classes="row-of-edit", elem_id=f"row-{number}") as group:
        with gradio.Row(equal_height=False):
            features = gradio.Textbox(
                label=f"Features {number + 1}", placeholder="img_3:66 or img_3:66,70+txt_2:5", max_lines=1, scale=4, min_width=150,
                elem_id=f"features-{number}",
            )  # fmt: skip
            mode = gradio.Dropdown(
                list(MODES),
                value="amplify",
                label="Mode",
                scale=2,
                min_width=100,
                filterable=False,
                elem_id=f"mode-{number}",
            )
            remove = gradio.Button("✕", elem_classes="remove", min_width=30, scale=0, elem_id=f"remove-{number}")
        strength = gradio.Slider(
            slider.low, slider.high, value=BEGIN["amplify"], step=slider.step, label=f"Strength, {slider.label}",
            elem_id=f"strength-{number}",
        )  # fmt: skip
        with gradio.Row():
            tokens = gradio.Textbox("all", label="Tokens", max_lines=1, min_width=110, elem_id=f"tokens-{number}")
            steps = gradio.Textbox("all", label="Steps", max_lines=1, min_width=90, elem_id=f"steps-{number}")
            unit = gradio.Dropdown(
                [("peaks", "peak"), ("activations", "absolute")], value=desk.unit, label="Counted in", visible=False, min_width=100,
                filterable=False, elem_id=f"unit-{number}",
            )  # fmt: skip
    return Row(group, features, mode, strength, tokens, steps, unit, remove)


def _slider(gradio: Any, mode: Mode, unit: Unit, strength: float) -> Any:
    found = range_of(mode, unit, strength)
    return gradio.Slider(
        found.low, found.high, value=strength, step=found.step, label=f"Strength, {found.label}", visible=mode != "zero"
    )


def _put_rows(gradio: Any, rows: list[EditRow]) -> list[Any]:
    """What `SteerTab.outputs` become: these rows, at least one, and the others hidden."""
    shown = max(1, len(rows))
    found: list[Any] = [shown]
    for number in range(MOST_ROWS):
        row = rows[number] if number < len(rows) else EditRow(mode="amplify", strength=BEGIN["amplify"])
        found += [
            gradio.Column(visible=number < shown), row.features, row.mode, _slider(gradio, row.mode, row.unit, row.strength),
            row.tokens, row.steps, gradio.Dropdown(value=row.unit, visible=row.mode in OF_PEAKS),
        ]  # fmt: skip
    return found


def _wire_rows(gradio: Any, desk: Desk, tab: SteerTab, more: Any) -> None:
    """Adding and removing rows; sliders that follow their mode."""
    everything = [tab.shown, *tab.inputs]

    def added(shown: int, *values: Any) -> list[Any]:
        rows = rows_in(values, shown)
        return tab.put_rows([*rows, EditRow(mode="amplify", strength=BEGIN["amplify"], unit=desk.unit)][:MOST_ROWS])

    def removed(number: int, shown: int, *values: Any) -> list[Any]:
        rows = rows_in(values, shown)
        return tab.put_rows(rows[:number] + rows[number + 1 :])

    def followed(mode: Mode, unit: Unit) -> tuple[Any, Any]:
        return _slider(gradio, mode, unit, BEGIN[mode]), gradio.Dropdown(visible=mode in OF_PEAKS)

    more.click(added, everything, tab.outputs, **QUIET)
    for number, row in enumerate(tab.rows):
        tab.draw(row.remove.click(partial(removed, number), everything, tab.outputs, **QUIET))
        tab.draw(row.mode.input(followed, [row.mode, row.unit], [row.strength, row.unit], **QUIET))


def with_feature(rows: list[EditRow], features: str, unit: Unit) -> list[EditRow]:
    """The rows with one more feature, in the first row without one; `UsageError` where all six are taken."""
    new = EditRow(features, "amplify", BEGIN["amplify"], unit=unit)
    for number, row in enumerate(rows):
        if not row.features.strip():
            return [*rows[:number], new, *rows[number + 1 :]]
    if len(rows) == MOST_ROWS:
        raise UsageError(f"all {MOST_ROWS} rows have features: take one out first")
    return [*rows, new]
