"""`python -m analyze steer`: pictures plain and under interventions, drawn by the model itself, and how far they lie apart.

1. Flags or file become an experiment; everything that can be refused is refused.  With --plan its cost is printed, and that is all.
2. The model is loaded, unless everything is drawn already, and every variant drawn, batch by batch: plain first.
3. Pictures and latents are compared with plain; table, summary and grids are written.
"""

import platform
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from analyze.features.clip import TINY_FLUX, TINY_FLUX_CLIP, Clip, load_clip
from analyze.pictures.drawing import png_bytes
from analyze.steering.collages import grid
from analyze.steering.comparing import Compared, aligned, compare, distance_lines, judge_lines, markdown
from analyze.steering.drawing import Painter, open_painter, weights_of
from analyze.steering.edits import Intervention, exact
from analyze.steering.experiment import NONE, Experiment, peak_arrays
from analyze.steering.resolving import Resolved, resolve
from analyze.steering.results import Results, record_of
from analyze.steering.settings import SteerSettings
from analyze.steering.shelf import checked_against, nameless
from analyze.steering.wording import splice_text
from harvest.capture import Captured
from store.errors import MismatchError
from store.files import read_json, write_bytes, write_json
from store.layout import runs_folder
from store.sites import spans
from store.sizes import human_size, many, picture_size
from store.tables import write_table
from train.claim import claimed

GRID_SHOTS = 16
"""shots on a page of the grid"""
LABEL_CHARACTERS = 90
DISTANCES = "Medians over the shots, each against its plain picture:"
JUDGED = "What tiny-flux's judge reads, of the pictures that it was asked about:"


@dataclass(frozen=True)
class Steered:
    """What a run of `steer` drew and found, or, with `--plan`, what it would."""

    experiment: Experiment
    table: pa.Table | None
    """what `OUT/results.parquet` holds; None with --plan"""
    transformer_runs: int
    """of this run of the command: what was there already costs none"""
    seconds: float = field(compare=False)


def run(settings: SteerSettings) -> Steered:
    """Draw what is not there yet, compare, and write what `analyze.steering.results` lists.

    Same bytes: an experiment file gives the same bytes wherever and whenever it is run, stopped and gone on with or not, on the same kind
    of device and with the same versions of the libraries, which `run.json` names.

    Errors: `UsageError` and `MismatchError` for what cannot be drawn or does not belong together, before the model is loaded;
    `MismatchError` for weights other than the store's; `NonFiniteError` where a strength drives the model to NaN.
    """
    from harvest.models.model import choose_device

    started = time.monotonic()
    device = choose_device(settings.device)
    resolved = resolve(settings)
    clip = _clip(settings, resolved.experiment)
    experiment = replace(
        resolved.experiment, clip=None if clip is None else {"name": clip[0], "identity": clip[1].identity}
    )
    results = Results(settings.out, experiment)
    results.check_claim(record := record_of(experiment, device.type))
    for note in _notes(resolved):
        print(note)
    _announce(results, resolved)
    if settings.plan:
        return Steered(experiment, None, 0, time.monotonic() - started)
    with claimed(settings.out, runs_folder(settings.out), "process draws into"):
        results.check_claim(record)  # another process may have had the lock
        results, forwards, drawing = _draw(results, resolved, settings, device.type)
        compared = _finish(results, None if clip is None else clip[1])
    done = Steered(results.experiment, compared.table, forwards, time.monotonic() - started)
    _record(settings, done, drawing)
    print(_sentence(settings, done))
    return done


def _clip(settings: SteerSettings, experiment: Experiment) -> tuple[str, Clip] | None:
    """The CLIP model that compares pictures, as (name, model); None where there is none.  `MismatchError` where the file names another."""
    asked = experiment.clip
    name = settings.clip or (asked or {}).get("name")
    own = name in (None, TINY_FLUX) and experiment.canvas.model_name == TINY_FLUX and TINY_FLUX_CLIP.exists()
    if name == NONE or (name is None and not own):
        return None
    found = load_clip(str(TINY_FLUX_CLIP) if own else str(name), settings.device)
    if asked is not None and asked.get("identity") not in (None, found.identity):
        raise MismatchError(
            f"the experiment was compared by CLIP model {asked.get('name')} {str(asked['identity'])[:16]}…, {name} is "
            f"{found.identity[:16]}…: give that one with --clip, or take the key clip out of the file"
        )
    return (TINY_FLUX if own else _lasting(str(name))), found


def _lasting(name: str) -> str:
    """What a CLIP model is called in a file that others read: its id, or its folder's name."""
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) else name


def _notes(resolved: Resolved) -> list[str]:
    """What is not known of the dictionaries that are used, and why."""
    used = [resolved.shelf.outlines[key] for key in resolved.experiment.identities]
    unchecked = [outline for outline in used if outline.name in resolved.shelf.unchecked]
    mute = [outline.name for outline in unchecked if nameless(outline)]
    later = [outline.name for outline in unchecked if not nameless(outline)]
    what, notes = f"belong to {resolved.experiment.canvas.model_name}", []
    if mute:
        reason = "not checked: they do not say what they come from (parent: unknown)"
        notes.append(f"note: that {', '.join(mute)} {what} is {reason}")
    if later:
        store = "not checked: the store does not say which weights drew it"
        reason = (
            store if resolved.store is not None else "checked when its weights are loaded, before anything is written"
        )
        notes.append(f"note: that {', '.join(later)} {what} is {reason}")
    return notes


def _announce(results: Results, resolved: Resolved) -> None:
    """Say what is drawn and what it costs."""
    experiment, missing = results.experiment, results.missing()
    canvas = experiment.canvas
    left = sum(len(results.shots(batch)) for _, batch in missing)
    there = f"; {experiment.pictures - left:,} are there already" if left < experiment.pictures else ""
    known = _rate(results)
    forwards = left * canvas.num_inference_steps
    duration = (
        "time unknown until a batch is drawn"
        if known is None
        else f"about {forwards / known:.0f} s at the last run's rate"
    )
    tokens = canvas.grid[0] * canvas.grid[1]
    latent_bytes = 4 * tokens * _latent_channels(canvas.pixels_per_token)
    most = left * (3 * canvas.height * canvas.width + latent_bytes)
    print(
        f"plan: {many(experiment.pictures, 'picture')} of {picture_size(canvas.width, canvas.height, ' x ')} by {canvas.model_name}: "
        f"{many(len(experiment.shots), 'shot')}, plain and {many(len(experiment.variants), 'variant')}{there}\n"
        f"  {many(forwards, 'transformer run')} ({canvas.num_inference_steps} steps a picture, {experiment.batch_size} pictures at once), "
        f"{duration}; at most {human_size(most)} written",
        flush=True,
    )
    kinds = _kinds(experiment)
    for variant in experiment.variants:
        print(f"  {variant.name}: {_told(variant.intervention, kinds)}")


def _latent_channels(pixels_per_token: int) -> int:
    """Channels of a token's latent at most: 16 of the VAE in 2 x 2 places, or those of a VAE that shrinks less."""
    return 64 if pixels_per_token >= 16 else 32


def _kinds(experiment: Experiment) -> bool:
    """Whether kinds of dictionaries are said: where not all of them are transcoders."""
    return any(kind == "sae" for _, kind in experiment.identities)


def _told(made: Intervention, kinds: bool) -> str:
    """An intervention in one line; `kinds`: with the kinds of its dictionaries."""
    words = []
    for edit in made.edits:
        strength = "" if edit.mode == "zero" else f":{exact(edit.strength)}"
        said = [f"{edit.mode}{strength} {edit.site}:{_cut(spans(sorted(edit.features)))}{_steps(edit.steps)}"]
        said += [] if str(edit.tokens) == "all" else [f"@tokens={_cut(str(edit.tokens))}"]
        said += [f"@kind={edit.kind}"] if kinds else []
        said += [] if edit.unit == "absolute" else [f"@unit={edit.unit}"]
        words.append(" ".join([*said, *(["@normalised"] if edit.normalised else [])]))
    words += [
        f"{off.stream} {spans(sorted(off.layers))} off ({', '.join(off.parts)}){_steps(off.steps)}" for off in made.off
    ]
    if made.splice:
        words.append(f"dictionaries for the MLPs of {', '.join(map(splice_text, made.splice))}")
    return " + ".join(words) + (f" ({made.method})" if made.edits else "")


def _steps(steps: tuple[int, ...] | None) -> str:
    return "" if steps is None else f" @steps={spans(sorted(steps))}"


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"


def _rate(results: Results) -> float | None:
    """Transformer runs a second of the last run that drew into OUT; None where there was none."""
    file = runs_folder(results.out) / "steer.json"
    if not file.exists():
        return None
    found = read_json(file).get("transformer_runs_per_second")
    return found if isinstance(found, float) and found > 0 else None


def _draw(results: Results, resolved: Resolved, settings: SteerSettings, device: str) -> tuple[Results, int, float]:
    """Draw what is missing; the results (with the weights that draw, where no store names them), transformer runs and seconds."""
    experiment, missing = results.experiment, results.missing()
    if not missing:
        return results, 0, 0.0
    painter = open_painter(
        resolved.store,
        device=settings.device,
        batch_size=experiment.batch_size,
        dictionaries=resolved.shelf,
        peaks=peak_arrays(experiment.peaks, resolved.shelf.outlines),
        canvas=experiment.canvas,
    )
    if not experiment.canvas.weights:
        weights = weights_of(painter)
        checked_against(resolved.shelf, experiment.identities, experiment.canvas, weights["transformer"])
        experiment = replace(experiment, canvas=replace(experiment.canvas, weights=weights))
        results = Results(results.out, experiment)
    record = record_of(experiment, device)
    results.check_claim(record)
    results.claim(record)
    _tell_cuts(painter, experiment)
    started = time.monotonic()
    left = sum(len(results.shots(batch)) for _, batch in missing)
    with tqdm(total=left * painter.num_steps, desc="steer", unit="run", mininterval=0.5) as progress:
        for variant, batch in missing:
            shots = [experiment.shots[shot] for shot in results.shots(batch)]
            made = experiment.interventions[variant]
            drawn = painter.draw(shots, made, on_step=partial(_advance, progress, len(shots)))
            results.keep(batch, variant, drawn)
    return results, painter.forwards, time.monotonic() - started


def _advance(progress: Any, count: int, _first: int, _step: int, _captured: Captured) -> None:
    """Move the bar by the transformer runs of a step."""
    progress.update(count)


def _tell_cuts(painter: Painter, experiment: Experiment) -> None:
    """Say once how many prompts are longer than what the text encoders read."""
    from harvest.models.text import tokenize

    prompts = list(dict.fromkeys(shot.prompt for shot in experiment.shots))
    length = experiment.canvas.max_sequence_length
    cut = sum(found.cut for found in tokenize(painter.sampler.pipe, prompts, length))
    if cut:
        print(f"note: {cut} of {many(len(prompts), 'different prompt')} are cut at {length} text tokens")


def _finish(results: Results, clip: Clip | None) -> Compared:
    """Table, summary and grids, of the pictures that lie in OUT."""
    compared = compare(results, clip)
    about = {"experiment": results.experiment.name, "store": str(results.experiment.store)}
    write_table(results.out / "results.parquet", compared.table.replace_schema_metadata(about))
    tables = [(DISTANCES, distance_lines(results, compared))]
    if compared.rates:
        tables.append((JUDGED, judge_lines(results, compared)))
    text = "\n".join(f"{what}\n\n{markdown(lines)}" for what, lines in tables)
    write_bytes(results.out / "summary.md", f"# {results.experiment.name}\n\n{text}".encode())
    _write_grids(results)
    for what, lines in tables:
        print(f"{what}\n{aligned(lines)}")
    return compared


def _write_grids(results: Results) -> None:
    """`grid.png`, and `grid-2.png` and on where there are more shots than fit on a page."""
    experiment = results.experiment
    count = len(experiment.shots)
    notes = _legend(experiment)
    for page, first in enumerate(range(0, count, GRID_SHOTS)):
        shots = range(first, min(first + GRID_SHOTS, count))
        rows = [[results.picture(shot, number) for number in range(len(results.files))] for shot in shots]
        labels = [_row_label(experiment, shot) for shot in shots]
        picture = grid(rows, labels, experiment.names, title=experiment.name, notes=notes)
        write_bytes(results.out / ("grid.png" if page == 0 else f"grid-{page + 1}.png"), png_bytes(picture))


def _legend(experiment: Experiment) -> list[str]:
    """What the variants do, for readers of the grid: the first, where they differ in a strength only."""
    kinds = _kinds(experiment)
    told = [(variant.name, _told(variant.intervention, kinds)) for variant in experiment.variants]
    if all(variant.strength is not None for variant in experiment.variants) and len(told) > 1:
        told = told[:1]
    return [f"{name}: {what}"[: 2 * LABEL_CHARACTERS] for name, what in told[:6]]


def _row_label(experiment: Experiment, shot: int) -> str:
    drawn = experiment.shots[shot]
    image = "" if drawn.image is None else f"image {drawn.image}: "
    return f"{image}{_cut(drawn.prompt)} (seed {drawn.seed})"


def _sentence(settings: SteerSettings, done: Steered) -> str:
    experiment = done.experiment
    variants = many(len(experiment.variants), "variant")
    what = f"{many(experiment.pictures, 'picture')} of {many(len(experiment.shots), 'shot')} and {variants}"
    return f"steer: {what}, {many(done.transformer_runs, 'transformer run')}, in {done.seconds:.1f} s -> {settings.out / 'grid.png'}"


def _record(settings: SteerSettings, done: Steered, drawing: float) -> None:
    """Note beside OUT how it was computed."""
    rate = done.transformer_runs / drawing if drawing else None
    before = runs_folder(settings.out) / "steer.json"
    if rate is None and before.exists():
        rate = read_json(before).get("transformer_runs_per_second")
    about = {
        "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": done.seconds,
        "transformer_runs": done.transformer_runs, "transformer_runs_per_second": rate,
    }  # fmt: skip
    write_json(before, about)
