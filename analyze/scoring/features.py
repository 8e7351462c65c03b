"""What each feature does over the whole store: how often it is active, how strongly, where most; and a ranking.

Active means z > 0, everywhere.  Over rows: `density`, `mean_active`, `deviation_active`.  Over images: `images_active`,
`image_share`; a feature is alive when it is active on at least one image.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyze.inputs import check_output, open_analysis
from analyze.scoring.matrices import ScoreMatrix
from analyze.scoring.settings import FeaturesSettings
from store.split import normalise


class RowStatistics:
    """Sums over all counted rows, per feature: float32 within a block of some hundred rows, float64 over blocks."""

    def __init__(self, n_features: int) -> None:
        self.rows = 0
        self.active = torch.zeros(n_features, dtype=torch.int64)
        self.total = torch.zeros(n_features, dtype=torch.float64)
        self.squares = torch.zeros(n_features, dtype=torch.float64)

    def add(self, z: Float[Tensor, "row feature"]) -> None:
        """Count a block of activations."""
        self.rows += len(z)
        self.active += (
            torch.sign(z).sum(dim=0).long()
        )  # z >= 0; exact below 2**24 rows, and six times faster than counting
        self.total += z.sum(dim=0).double()
        self.squares += (z * z).sum(dim=0).double()

    def mean_active(self) -> Float[np.ndarray, " feature"]:
        """Mean activation over the rows where the feature is active; 0 where there are none."""
        return (self.total / self.active.clamp(min=1)).numpy()

    def deviation_active(self) -> Float[np.ndarray, " feature"]:
        """Standard deviation of the activation over the rows where the feature is active."""
        mean = self.total / self.active.clamp(min=1)
        return (self.squares / self.active.clamp(min=1) - mean * mean).clamp(min=0).sqrt().numpy()


def interest(
    mean_active: Float[np.ndarray, " feature"], image_share: Float[np.ndarray, " feature"]
) -> Float[np.ndarray, " feature"]:
    """DifFRACT's dashboard ranking, z-score times root of frequency: strong among its peers, and on more than a few images.

    The z-score is that of a feature's mean activation (over the rows where it is active) among the alive features of
    its dictionary and step; the frequency is the share of images.  0 for dead features.
    """
    alive = image_share > 0
    if not alive.any():
        return np.zeros(len(mean_active))
    deviation = mean_active[alive].std()
    score = (mean_active - mean_active[alive].mean()) / (deviation if deviation > 0 else 1.0)
    return np.where(alive, score * np.sqrt(image_share), 0.0)


def feature_table(matrix: ScoreMatrix, statistics: RowStatistics, prompts: Sequence[str], top: int) -> pa.Table:
    """One row a feature; reads the matrix by blocks of features.

    `top_*` are the images of the highest scores, `unique_*` those with one image a prompt (equal but for case, spaces and
    flags); only images where the feature is active stand there.
    """
    groups = prompt_groups(prompts)
    columns: dict[str, list[np.ndarray]] = {"images_active": [], "max": []}
    lists: dict[str, list[list[float]]] = {
        f"{kind}_{what}": [] for kind in ("top", "unique") for what in ("image", "token", "score")
    }
    for block in matrix.blocks():
        scores, tokens = matrix.scores(block), matrix.tokens(block)
        columns["images_active"].append(np.count_nonzero(scores > 0, axis=0))
        columns["max"].append(scores.max(axis=0))
        for kind, order in (("top", top_images(scores, top)), ("unique", top_unique(scores, groups, top))):
            for feature, images in enumerate(order.T):
                images = images[scores[images, feature] > 0]
                lists[f"{kind}_image"].append(images.tolist())
                lists[f"{kind}_token"].append(tokens[images, feature].tolist())
                lists[f"{kind}_score"].append(scores[images, feature].tolist())
    images_active = np.concatenate(columns["images_active"])
    share = images_active / max(matrix.n_images, 1)
    return pa.table(
        {
            "feature": np.arange(matrix.n_features, dtype=np.int32),
            "rows_active": statistics.active.numpy(),
            "density": statistics.active.numpy() / max(statistics.rows, 1),
            "images_active": images_active.astype(np.int64),
            "image_share": share,
            "alive": images_active > 0,
            "mean_active": statistics.mean_active(),
            "deviation_active": statistics.deviation_active(),
            "max": np.concatenate(columns["max"]),
            "interest": interest(statistics.mean_active(), share),
            **{name: pa.array(values, _list_type(name)) for name, values in lists.items()},
        }
    ).replace_schema_metadata({"rows": str(statistics.rows), "images": str(matrix.n_images)})


def _list_type(name: str) -> pa.ListType:
    return pa.list_({"image": pa.int64(), "token": pa.int32(), "score": pa.float32()}[name.split("_")[1]])


def prompt_groups(prompts: Sequence[str]) -> Int[np.ndarray, " image"]:
    """A number for each image, equal for equal prompts (normalised as the split normalises them)."""
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(normalise(prompt), len(numbers)) for prompt in prompts], np.int64)


def top_images(scores: Float[np.ndarray, "image feature"], top: int) -> Int[np.ndarray, "rank feature"]:
    """The images of the highest scores of each feature; ties go to the lower image."""
    return np.argsort(-scores, axis=0, kind="stable")[:top]


def top_unique(
    scores: Float[np.ndarray, "image feature"], groups: Int[np.ndarray, " image"], top: int
) -> Int[np.ndarray, "rank feature"]:
    """The images of the highest scores of each feature, at most one of a group; ties go to the lower image of a group."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.concatenate(([True], np.diff(groups[order]) > 0)))
    sizes = np.diff(np.append(starts, len(order)))
    best = np.maximum.reduceat(scores[order], starts, axis=0)
    chosen = np.argsort(-best, axis=0, kind="stable")[:top]
    feature = np.arange(scores.shape[1])
    image = order[starts[chosen]]
    for place in range(int(sizes.max()) - 1, -1, -1):
        candidate = order[starts[chosen] + np.minimum(place, sizes[chosen] - 1)]
        image = np.where(scores[candidate, feature] == best[chosen, feature], candidate, image)
    return image


def run(settings: FeaturesSettings) -> pa.Table:
    """Print the best features of every site and step, and return them as one table."""
    analysis = open_analysis(settings)
    check_output(analysis)
    found = []
    for subject in analysis.subjects:
        for step in analysis.steps:
            table = analysis.matrix(subject, step).features()
            alive = table.filter(table["alive"])
            column = {"interest": "interest", "max": "max", "share": "image_share"}[settings.rank]
            best = alive.sort_by([(column, "descending"), ("feature", "ascending")]).slice(0, settings.best)
            best = best.add_column(0, "step", pa.array([step] * len(best), pa.int32()))
            found.append(best.add_column(0, "dictionary", pa.array([subject.name] * len(best), pa.string())))
            print(f"\n{subject.name} step {step}: {len(alive)} of {len(table)} features alive")
            print(_lines(best))
    return pa.concat_tables(found)


def _lines(table: pa.Table) -> str:
    lines = [f"  {'feature':>8} {'interest':>9} {'density':>9} {'images':>8} {'mean':>8} {'max':>8}   top images"]
    for row in table.to_pylist():
        images = " ".join(map(str, row["unique_image"][:6]))
        lines.append(
            f"  {row['feature']:>8} {row['interest']:>9.2f} {row['density']:>9.2%} {row['image_share']:>8.1%} "
            f"{row['mean_active']:>8.3f} {row['max']:>8.3f}   {images}"
        )
    return "\n".join(lines)
