"""`python -m analyze features`: which features to look at first, by one of five ranks, chosen by how often they are active.

Everything but coherence comes from the feature tables that `scores` left: nothing is computed again.
"""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from jaxtyping import Float

from analyze.features.coherence import coherence_table
from analyze.features.listing import listing
from analyze.features.selection import globally_unique
from analyze.features.settings import FeaturesSettings, parse_categories
from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.labels.book import LabelBook
from store.errors import UsageError
from store.files import write_bytes
from store.tables import write_table

COLUMN = {"interest": "interest", "max": "max", "density": "density", "share": "image_share", "coherence": "coherence"}
EXAMPLES = 6
"""images named with a feature, unless otherwise asked for"""
PROFILES = ("density", "mean_active")


def run(settings: FeaturesSettings) -> pa.Table:
    """Print the best features of every dictionary and step, and return them as one table, best first within each.

    Its columns: dictionary, step, rank, feature, label (null where nobody gave one), those of `features.parquet`, coherence (null where
    it was not computed), profile_density and profile_mean_active (one value for each step asked for), example_images.
    """
    analysis = open_analysis(settings)
    kept = int(check_output(analysis)["top"])
    examples = settings.examples or min(EXAMPLES, kept)
    if examples > kept:
        raise UsageError(
            f"--examples is {examples}, but this analysis keeps {kept} top images of each feature: compute scores with --top {examples}"
        )
    found = []
    for subject in analysis.subjects:
        tables = feature_tables(analysis, subject)
        profile = step_profile(analysis, subject, tables)
        coherence = coherence_table(analysis, subject)
        book = LabelBook.of(subject)
        for step in analysis.steps:
            table = with_coherence(tables[step], coherence, step)
            chosen = ranked(table, settings, f"{subject.name} step {step}")
            best = _described(*_shown(chosen, settings, examples), subject, step, profile, book)
            found.append(best)
            print(_heading(table, chosen, best, subject, step, settings))
            print(listing(best, subject, book, analysis.steps))
    everything = pa.concat_tables(found)
    _write(everything, settings)
    return everything


def feature_tables(analysis: Analysis, subject: Subject) -> dict[int, pa.Table]:
    """Step -> the feature table of a dictionary, for all steps of the analysis."""
    return {step: analysis.matrix(subject, step).features() for step in analysis.steps}


def step_profile(
    analysis: Analysis, subject: Subject, tables: dict[int, pa.Table] | None = None
) -> dict[str, Float[np.ndarray, "step feature"]]:
    """How a dictionary's features change over the denoising steps: `density` and `mean_active`, a row for each of `analysis.steps`."""
    tables = feature_tables(analysis, subject) if tables is None else tables
    return {
        name: np.stack([tables[step][name].to_numpy().astype(np.float64) for step in analysis.steps])
        for name in PROFILES
    }


def with_coherence(table: pa.Table, coherence: pa.Table | None, step: int) -> pa.Table:
    """A feature table with the column `coherence`: null where it was not computed."""
    column: pa.Array | pa.ChunkedArray = pa.nulls(len(table), pa.float64())
    if coherence is not None:
        here = coherence.filter(pc.equal(coherence["step"], step))
        column = here["coherence"] if len(here) == len(table) else column
    return table.append_column("coherence", column)


def ranked(table: pa.Table, settings: FeaturesSettings, where: str) -> pa.Table:
    """The features of a table that the settings choose, best first; equal ones by number.  Features without a rank are left out.

    `UsageError` when the coherence that is asked for was not computed.
    """
    column = COLUMN[settings.rank]
    if settings.rank == "coherence" and table["coherence"].null_count == len(table):
        raise UsageError(
            f"there is no coherence of {where}: run python -m analyze coherence with the same flags first, or --rank interest"
        )
    rows = parse_categories(settings.category, "--category")
    images = parse_categories(settings.image_category, "--image-category")
    wanted = pc.and_(
        pc.is_in(table["density_category"], pa.array(rows)), pc.is_in(table["image_category"], pa.array(images))
    )
    if not (settings.category != "all" and "dead" in rows) and not (
        settings.image_category != "all" and "dead" in images
    ):
        wanted = pc.and_(wanted, table["alive"])
    if settings.min_density is not None:
        wanted = pc.and_(wanted, pc.greater_equal(table["density"], settings.min_density))
    if settings.max_density is not None:
        wanted = pc.and_(wanted, pc.less_equal(table["density"], settings.max_density))
    chosen = table.filter(pc.and_(wanted, pc.is_valid(table[column])))
    return chosen.sort_by([(column, "descending"), ("feature", "ascending")])


def _shown(chosen: pa.Table, settings: FeaturesSettings, examples: int) -> tuple[pa.Table, list[list[int]]]:
    """The features to list, and the images to name with each."""
    if settings.unique_examples:
        picked = globally_unique(chosen["unique_image"].to_pylist(), examples, settings.best)
        return chosen.take(pa.array([place for place, _ in picked], pa.int64())), [images for _, images in picked]
    best = chosen.slice(0, settings.best)
    return best, [images[:examples] for images in best["unique_image"].to_pylist()]


def _described(
    best: pa.Table,
    examples: list[list[int]],
    subject: Subject,
    step: int,
    profile: dict[str, Float[np.ndarray, "step feature"]],
    book: LabelBook,
) -> pa.Table:
    """The listed features with all that is said of each."""
    features = best["feature"].to_numpy()
    first = {
        "dictionary": pa.array([subject.name] * len(best), pa.string()),
        "step": pa.array([step] * len(best), pa.int32()),
        "rank": pa.array(range(1, len(best) + 1), pa.int32()),
        "feature": best["feature"],
        "label": pa.array([book.text(int(feature)) for feature in features], pa.string()),
    }
    last = {
        **{
            f"profile_{name}": pa.array(profile[name][:, features].T.tolist(), pa.list_(pa.float64()))
            for name in PROFILES
        },
        "example_images": pa.array(examples, pa.list_(pa.int64())),
    }
    words = {
        name: best[name] if name in best.column_names else pa.array([[]] * len(best), kind)
        for name, kind in (("word", pa.list_(pa.string())), ("word_score", pa.list_(pa.float32())))
    }
    middle = {name: best[name] for name in best.column_names if name != "feature" and name not in words}
    return pa.table({**first, **middle, **words, **last})


def _heading(
    table: pa.Table, chosen: pa.Table, best: pa.Table, subject: Subject, step: int, settings: FeaturesSettings
) -> str:
    alive = pc.sum(table["alive"]).as_py()
    lines = [f"\n{subject.name} step {step}: {alive} of {len(table)} features alive"]
    for name, column in (("rows", "density_category"), ("images", "image_category")):
        counts = Counter(table[column].to_pylist())
        lines.append(
            f"  by {name + ':':<8}" + " · ".join(f"{counts[word]} {word}" for word in parse_categories("all", ""))
        )
    what = f"{len(best)} of the {len(chosen)} that match" if len(best) < len(chosen) else f"all {len(best)} that match"
    if settings.unique_examples:
        what += ", the best with images of their own"
    lines.append(f"  {what}, by {settings.rank}:" if len(best) else "  no feature matches")
    return "\n".join(lines)


def _write(table: pa.Table, settings: FeaturesSettings) -> None:
    if settings.csv is not None:
        write_bytes(settings.csv, csv_bytes(table))
        print(f"\nfeatures: {len(table)} rows -> {settings.csv}")
    if settings.parquet is not None:
        write_table(settings.parquet, table.replace_schema_metadata(None))
        print(f"\nfeatures: {len(table)} rows -> {settings.parquet}")


def csv_bytes(table: pa.Table) -> bytes:
    """A table as CSV: the values of a list stand in one field, a space between them."""
    columns = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type):
            column = pa.array([" ".join(map(str, values or [])) for values in column.to_pylist()], pa.string())
        columns[name] = column
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(pa.table(columns), buffer)
    return buffer.getvalue()
