"""The pass over a store against a slow one in NumPy, exactly, on small whole numbers, so that ties abound.

Where bytes are compared activations and weights are random floats, so that the order of a sum can be seen in its last bit.
"""

import contextlib
import fcntl
import math
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from analyze.inputs import Subject, open_analysis
from analyze.scoring import announcing, cluster, encoding, matrices, plan, scores, work
from analyze.scoring.findings import Findings
from analyze.scoring.matrices import ScoreMatrix
from analyze.scoring.reduction import Pane, maxima, row_blocks
from analyze.scoring.settings import ScoresSettings
from analyze.scoring.statistics import HISTOGRAM_EDGES, interest
from analyze.scoring.work import Hands
from bench.scores import CASES, random_dictionary, random_store
from store import Store, files, open_store
from store.errors import DamagedError, MismatchError, NonFiniteError, StoreError, UsageError
from store.format import StreamTokens
from store.sites import Site
from store.split import normalise
from store.writer import StoreWriter
from tests.small_store import small_meta, small_part
from train import Dictionary, DictionaryConfig
from train.dictionaries.checkpoint import frozen, save_dictionary
from train.dictionaries.dictionary import build

ROOT = Path(__file__).parent.parent
D_MODEL, FEATURES = 8, 22
ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu")


def whole_store(
    path: Path,
    seed: int = 0,
    n_images: int = 11,
    lengths: Sequence[int] | None = None,
    rough: bool = False,
    **changes: Any,
) -> Store:
    """A store whose activations are whole numbers from -3 to 3, or `rough`, of few different prompts."""
    rng = np.random.default_rng(seed)
    meta = small_meta(n_images, d_model=D_MODEL, pictures="none", seed=seed, **changes)
    words = [str(rng.choice(["a", "A ", "b", "c --ar 16:9", "c"])) for _ in range(n_images)]
    values = {
        (site, step, point): (rng.normal(size=shape) if rough else rng.integers(-3, 4, shape)).astype(meta.carrier.logical)
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
        for shape in [(n_images, meta.tokens[site.stream].kept, D_MODEL)]
    }  # fmt: skip
    writer = StoreWriter.open_or_create(path, meta)
    for part in writer.missing():
        writer.write_part(part, small_part(meta, part, values, words, None, lengths))
    assert writer.seal()
    return open_store(path)


def whole_dictionary(
    site: str, seed: int, kind: str = "transcoder", n_features: int = FEATURES, **changes: Any
) -> Dictionary:
    """A dictionary of whole numbers, but that no two features of a row are ever equal: so TopK has no ties to break."""
    dictionary = build(DictionaryConfig(kind, Site.parse(site), D_MODEL, n_features, **changes))  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high + 1, shape).astype(np.float32))

    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.zero_()
        dictionary.encoder.weight.copy_(whole(-1, 1, n_features, D_MODEL))
        dictionary.encoder.bias.copy_(whole(-4, 1, n_features) + torch.arange(n_features) / 1024)
        dictionary.decoder.weight.copy_(whole(-1, 1, D_MODEL, n_features))
        if dictionary.config.time_embed_dim is not None:
            dictionary.mod_linear.bias.copy_(torch.cat([whole(0, 1, D_MODEL), whole(-1, 1, D_MODEL)]))
        if dictionary.config.family == "flux-sae":
            dictionary.pre_bias.copy_(whole(-1, 1, D_MODEL))
        if dictionary.config.activation == "batchtopk":
            dictionary.threshold.fill_(1.5 + 1 / 2048)
        if dictionary.config.activation == "jumprelu":
            dictionary.log_threshold.fill_(float(np.log(2.5 + 1 / 2048)))
    return frozen(dictionary)


def rough_dictionary(*words: Any, **changes: Any) -> Dictionary:
    """The same with random encoder weights, which are no whole numbers."""
    dictionary = whole_dictionary(*words, **changes)
    with torch.no_grad():
        dictionary.encoder.weight.normal_(generator=torch.Generator().manual_seed(0))
    return dictionary


def slow_z(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """z of one row, float64, as the formulas say it."""
    p = {name: value.numpy().astype(np.float64) for name, value in dictionary.state_dict().items()}
    config = dictionary.config
    if config.family == "flux-sae":
        x = x - p["pre_bias"]
    elif config.time_embed_dim is not None:
        scale, shift = np.split(p["mod_linear.bias"], 2)
        x = x * (1 + scale) + shift
    pre = p["encoder.weight"] @ x + p["encoder.bias"]
    if config.activation == "jumprelu":
        return np.where(pre > np.exp(p["log_threshold"]), pre, 0)
    z = np.maximum(pre, 0)
    if config.activation == "batchtopk":
        return np.where(z > p["threshold"], z, 0)
    if config.k is not None:
        z[np.argsort(-z)[config.k :]] = 0
    return z


@dataclass
class Slow:
    """What the pass must find."""

    scores: np.ndarray
    tokens: np.ndarray
    table: dict[str, list[Any]]


def slow(store: Store, subject: Subject, step: int, options: ScoresSettings) -> Slow:
    """The same, row by row."""
    prompts, n_features = store.prompts().to_pylist(), subject.n_features
    x, positions = (
        store.read(subject.site, step, subject.point).astype(np.float64),
        store.tokens(subject.site.stream, step),
    )
    best = np.zeros((store.n_images, n_features))
    token = np.full((store.n_images, n_features), -1)
    rows: list[np.ndarray] = []
    words: list[dict[str, float]] = [{} for _ in range(n_features)]
    for image, prompt in enumerate(prompts):
        for slot, position in enumerate(positions[image]):
            real = position < prompt["text_length"]
            if position < 0 or (subject.site.stream == "txt" and not real and not options.padding):
                continue
            z = slow_z(subject.dictionary, x[image, slot])
            better = (z > best[image]) | (token[image] < 0)
            best[image], token[image] = np.where(better, z, best[image]), np.where(better, position, token[image])
            rows.append(z)
            for feature in np.flatnonzero(z > options.active_above) if subject.site.stream == "txt" and real else ():
                piece = prompt["text_pieces"][position]
                words[feature][piece] = max(words[feature].get(piece, 0.0), float(z[feature]))
    return Slow(
        best, token, slow_table(np.asarray(rows).reshape(-1, n_features), best, token, words, prompts, subject, options)
    )


def slow_table(
    z: np.ndarray, best: np.ndarray, token: np.ndarray, words: list[dict[str, float]], prompts: list[dict[str, Any]],
    subject: Subject, options: ScoresSettings,
) -> dict[str, list[Any]]:  # fmt: skip
    """The table, feature by feature."""
    table: dict[str, list[Any]] = {}
    edges = [-np.inf, *HISTOGRAM_EDGES, np.inf]
    for feature in range(subject.n_features):
        active = z[:, feature][z[:, feature] > options.active_above]
        order = [
            i for i in np.lexsort((np.arange(len(best)), -best[:, feature])) if best[i, feature] > options.active_above
        ]
        groups: dict[str, int] = {}
        for image in order:
            groups.setdefault(normalise(prompts[image]["prompt"]), int(image))
        top, unique = order[: options.top], list(groups.values())[: options.top]
        row = {
            "rows_active": len(active), "density": len(active) / max(len(z), 1), "images_active": len(order),
            "image_share": len(order) / len(best), "alive": bool(order),
            "mean_active": active.mean() if len(active) else 0, "deviation_active": active.std() if len(active) else 0,
            "max": best[:, feature].max(), "histogram": np.histogram(active, edges)[0].tolist(),
            "top_image": [int(i) for i in top], "top_token": token[top, feature].tolist(), "top_score": best[top, feature].tolist(),
            "unique_image": unique, "unique_token": token[unique, feature].tolist(), "unique_score": best[unique, feature].tolist(),
        }  # fmt: skip
        if subject.site.stream == "txt":
            ranked = sorted(words[feature].items(), key=lambda item: (-item[1], item[0]))[: options.top]
            row |= {"word": [word for word, _ in ranked], "word_score": [value for _, value in ranked]}
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    table["interest"] = interest(
        np.asarray(table["mean_active"], float), np.asarray(table["image_share"], float)
    ).tolist()
    return table


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 images, panes of 12 features, chunks of 4 by 6: so that a small store has several of each, and ragged ones."""
    for module in (matrices, plan):
        patch.setattr(module, "IMAGE_BLOCK", 4)
    for module in (encoding, plan):
        patch.setattr(module, "PANE", 12)
    patch.setattr(matrices, "FEATURE_BLOCK", 6)
    patch.setattr(encoding, "ROWS", 10)
    patch.setattr(matrices, "fsync_file", lambda _path: None)
    patch.setattr(files, "fsync_file", lambda _path: None)
    patch.setattr(files, "fsync_folder", lambda _path: None)


def digests(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


TEXT = {"all": StreamTokens("all", 8, 8), "real": StreamTokens("real+0", 8, 8), "real+2": StreamTokens("real+2", 8, 8)}


@settings(
    max_examples=3,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**16), n_images=st.integers(1, 11), sampled=st.booleans(), text=st.sampled_from(sorted(TEXT)),
    activation=st.sampled_from(ACTIVATIONS), difract_on_images=st.booleans(), padding=st.booleans(),
    above=st.sampled_from([0.0, 1.5, 2.0]), top=st.integers(1, 6), workers=st.integers(1, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]), lengths=st.lists(st.integers(0, 8), min_size=11, max_size=11),
)  # fmt: skip
@example(
    seed=0, n_images=11, sampled=False, text="all", activation="jumprelu", difract_on_images=False, padding=False, above=0.0, top=4,
    workers=1, dtype="float32", lengths=[0, 0, 0, 0, 2, 1, 3, 2, 4, 5, 3],
)  # fmt: skip
def test_every_figure_equals_a_slow_reading_of_the_store(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n_images: int, sampled: bool, text: str, activation: str,
    difract_on_images: bool, padding: bool, above: float, top: int, workers: int, dtype: Any, lengths: list[int],
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("scores")
    images = StreamTokens("sample", 5, 12) if sampled else StreamTokens("all", 12, 12)
    whole_store(folder / "s", seed, n_images, lengths, store_dtype=dtype, image_tokens=images, text_tokens=TEXT[text])
    sites = ("img_0", "txt_0") if difract_on_images else ("txt_0", "img_0")
    difract = whole_dictionary(
        sites[0], seed, activation=activation, time_embed_dim=8, **({"k": 3} if "topk" in activation else {})
    )
    kind = {"activation": "topk", "k": 3} if activation == "relu" else {"activation": "relu"}
    flux = whole_dictionary(sites[1], seed + 1, "sae", family="flux-sae", **kind)
    for dictionary in (difract, flux):
        save_dictionary(folder / "d" / dictionary.name, dictionary, None, [])
    options = ScoresSettings(
        store=folder / "s", dictionaries=folder / "d", out=folder / "out", padding=padding, active_above=above, top=top, workers=workers
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        scores.run(options)
    analysis = open_analysis(options)
    for subject in analysis.subjects:
        for step in analysis.steps:
            expected, matrix = slow(analysis.store, subject, step, options), analysis.matrix(subject, step)
            assert (matrix.scores() == expected.scores).all()
            assert not np.signbit(matrix.scores()).any()
            assert (matrix.tokens() == expected.tokens).all()
            table = matrix.features().to_pydict()
            assert set(table) - set(expected.table) == {"feature", "density_category", "image_category"}
            for name, values in expected.table.items():
                if name in ("mean_active", "deviation_active", "interest"):
                    np.testing.assert_allclose(table[name], values, rtol=1e-6, atol=1e-9, err_msg=name)
                else:
                    assert table[name] == values, name


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A store, two dictionaries of one site, and the bytes of their scores, computed by one thread in one go."""
    folder = tmp_path_factory.mktemp("scored")
    whole_store(folder / "s", n_images=11, rough=True, steps=(0,), sites=("txt_0",))
    for dictionary in (rough_dictionary("txt_0", 0, activation="topk", k=3), rough_dictionary("txt_0", 1, "sae")):
        save_dictionary(folder / "d" / dictionary.name, dictionary, None, [])
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        scores.run(options_of(folder, "alone", workers=1))
    return folder, digests(folder / "alone")


def options_of(folder: Path, out: str | Path, **changes: Any) -> ScoresSettings:
    return ScoresSettings(store=folder / "s", dictionaries=folder / "d", out=folder / out, **changes)


def test_two_workers_and_a_memory_for_one_pane_give_the_same_bytes(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder, expected = scored
    small_pieces(monkeypatch)
    scores.run(options_of(folder, tmp_path / "two", workers=2))
    assert digests(tmp_path / "two") == expected
    monkeypatch.setattr(plan, "MARGIN", 0)
    analysis = open_analysis(options_of(folder, "x"))
    every = [(subject, step) for subject in analysis.subjects for step in analysis.steps]
    least = plan.ScorePlan(analysis, options_of(folder, "x", workers=1), every).held_bytes()
    capsys.readouterr()
    scores.run(options_of(folder, tmp_path / "little", workers=2, memory=f"{least - 1}B"))
    assert digests(tmp_path / "little") == expected
    assert "is read up to" in capsys.readouterr().out


def test_a_run_that_is_killed_goes_on_from_its_blocks_and_ends_with_the_same_bytes(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = scored
    small_pieces(monkeypatch)
    publish, done = Hands._publish, 0

    def publish_until(last: int) -> Callable[..., None]:
        def counted(self: Hands, *words: Any) -> None:
            nonlocal done
            if done == last:
                raise KeyboardInterrupt
            publish(self, *words)
            done += 1

        return counted

    total = 2 * 2 * 3  # dictionaries, panes, blocks
    for last in (2, 7):
        monkeypatch.setattr(Hands, "_publish", publish_until(last))
        with pytest.raises(KeyboardInterrupt):
            scores.run(options_of(folder, tmp_path / "out", workers=1))
        assert not list((tmp_path / "out").glob("*_txt_0"))
    (tmp_path / "out/unfinished/sae_txt_0/step.0/matrix/scores/c/0/0.0123.partial").write_bytes(b"torn")
    monkeypatch.setattr(Hands, "_publish", publish_until(total + 1))
    scores.run(options_of(folder, tmp_path / "out", workers=2))
    assert done == total  # nothing twice
    assert digests(tmp_path / "out") == expected


def test_what_another_dictionary_left_unfinished_is_not_gone_on_with(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = scored
    small_pieces(monkeypatch)
    shutil.copytree(folder / "d", tmp_path / "d")
    shutil.rmtree(tmp_path / "d/sae_txt_0")
    save_dictionary(tmp_path / "d/sae_txt_0", whole_dictionary("txt_0", 5, "sae"), None, [])
    monkeypatch.setattr(Hands, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        scores.run(replace(options_of(folder, tmp_path / "out"), dictionaries=tmp_path / "d"))
    monkeypatch.undo()
    small_pieces(monkeypatch)
    scores.run(options_of(folder, tmp_path / "out"))
    assert digests(tmp_path / "out") == expected


def test_the_plan_gives_the_files_and_bytes_that_are_written_and_writes_nothing(
    scored: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    folder, expected = scored
    small_pieces(monkeypatch)
    summary = scores.run(options_of(folder, tmp_path / "out", plan=True))
    assert (summary.computed, list(tmp_path.iterdir())) == (0, [])
    said = capsys.readouterr().out
    analysis = open_analysis(options_of(folder, "alone"))
    planned = plan.ScorePlan(analysis, options_of(folder, "alone"), [(subject, 0) for subject in analysis.subjects])
    assert planned.files == len(expected) - 2  # run.json and images.parquet
    assert f"{planned.files} files" in said and "2 score matrices of 11 images, 2 dictionaries with 44 features" in said
    places = [
        folder / "alone" / s.name / "step.0" / name for s in analysis.subjects for name in ("scores", "argmax_token")
    ]
    arrays = [zarr.open_array(place, mode="r") for place in places]
    chunks = sum(math.prod(array.chunks) * math.prod(array.cdata_shape) * array.dtype.itemsize for array in arrays)
    assert planned.array_bytes == chunks
    tables = sum(len(content) for name, content in expected.items() if name.endswith("features.parquet"))
    assert tables <= planned.table_bytes
    assert planned.read_bytes == 11 * 8 * D_MODEL * 2 * 2  # images, tokens, bfloat16, two points
    assert planned.reads == 1
    assert planned.operations == 2 * 11 * 8 * D_MODEL * FEATURES * 2


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match=r"are to be written and 1 KB are free on that disk.*--dtype float16"):
        scores.run(options_of(scored[0], tmp_path / "out", plan=True))


def test_a_memory_that_is_too_little_says_how_much_would_do(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"--memory 1 MB is too little for .*; use --memory (\d+)MB or more"
    ) as refused:
        scores.run(options_of(scored[0], tmp_path / "out", memory="1MB", plan=True))
    enough = str(refused.value).split("use --memory ")[1].split()[0]
    scores.run(options_of(scored[0], tmp_path / "out", memory=enough, workers=1, plan=True))


def test_ten_times_the_images_take_no_more_memory_but_for_what_is_known_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    for module in (matrices, plan):
        monkeypatch.setattr(module, "IMAGE_BLOCK", 16)
    for module in (encoding, plan):
        monkeypatch.setattr(module, "PANE", 512)
    monkeypatch.setattr(matrices, "FEATURE_BLOCK", 512)
    monkeypatch.setattr(encoding, "ROWS", 256)
    dictionary = whole_dictionary("img_0", 0, n_features=1024)
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    peaks = []
    for images in (16, 160):
        whole_store(tmp_path / "s", n_images=images, steps=(0,), sites=("img_0",), chunk_images=16)
        tracemalloc.start()
        scores.run(options_of(tmp_path, f"{images}", workers=1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        shutil.rmtree(tmp_path / "s")
    scores_of_images = 144 * 1024 * 8
    assert peaks[1] - peaks[0] < scores_of_images / 4, peaks  # prompts, and what is known of each image


def test_float16_halves_the_scores_and_refuses_what_it_does_not_hold(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored
    small_pieces(monkeypatch)
    scores.run(options_of(folder, tmp_path / "half", dtype="float16"))
    whole, half = (ScoreMatrix.open(place / "sae_txt_0" / "step.0") for place in (folder / "alone", tmp_path / "half"))
    assert zarr.open_array(half.folder / "scores", mode="r").dtype == np.float16
    assert half.scores().dtype == np.float32
    assert (half.scores() == whole.scores().astype(np.float16).astype(np.float32)).all()
    assert (half.tokens() == whole.tokens()).all()
    dictionary = whole_dictionary("txt_0", 1, "sae")
    with torch.no_grad():
        dictionary.encoder.weight.mul_(1e5)
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    with pytest.raises(
        NonFiniteError, match=r"sae_txt_0 reaches \d+.* float16 holds 65504 at most: use --dtype float32"
    ):
        scores.run(replace(options_of(folder, tmp_path / "out", dtype="float16"), dictionaries=tmp_path / "d"))
    with pytest.raises(UsageError, match="holds another run \\(dtype 'float16', now 'float32'\\)"):
        scores.run(options_of(folder, tmp_path / "half"))


def test_with_float16_the_table_says_what_the_matrix_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    whole_store(tmp_path / "s", rough=True, steps=(0,), sites=("txt_0",))
    dictionary = rough_dictionary("txt_0", 1, "sae")
    with torch.no_grad():
        dictionary.encoder.weight[0] *= 1e-9  # below all that float16 holds
        dictionary.encoder.weight[1] *= 1e-7  # so small that many are equal
        dictionary.encoder.bias[:2] = 0
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    scores.run(options_of(tmp_path, "out", dtype="float16", top=11))
    matrix = ScoreMatrix.open(tmp_path / "out/txt_0/step.0")
    found, table = matrix.scores(), matrix.features().to_pydict()
    assert table["rows_active"][0] > 0 and not table["alive"][0]
    assert 0 < len(np.unique(found[:, 1])) < 11
    assert table["images_active"] == (found > 0).sum(axis=0).tolist()
    assert table["max"] == found.max(axis=0).tolist()
    for feature in range(FEATURES):
        best = [i for i in np.lexsort((np.arange(11), -found[:, feature])) if found[i, feature] > 0]
        assert table["top_image"][feature] == best
        assert table["top_score"][feature] == found[best, feature].tolist()


@pytest.mark.parametrize("sizes", [(4, 5, 3), (4, 4, 4), (1, 3, 2, 6), (12,)])
def test_the_maximum_and_its_token_are_found_in_segments_of_any_lengths(sizes: tuple[int, ...]) -> None:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(12, dtype=np.int32)
    (block,) = row_blocks(owner, position, None, 256)
    assert block.alike == (len(set(sizes)) == 1)
    for row in range(12):  # each has the maximum once
        z = torch.zeros(12, 1)
        z[row] = 9
        sparse, dense = (Pane(len(sizes), 1, 0.0, None, lambda _values: None) for _ in range(2))
        sparse.add(z, block)
        dense._dense(z, block, maxima(z, block))
        for pane in (sparse, dense):
            pane.finish()
            first = np.concatenate(([0], np.cumsum(sizes)[:-1]))
            assert pane.scores[:, 0].tolist() == [9 if image == owner[row] else 0 for image in range(len(sizes))]
            assert pane.tokens[:, 0].tolist() == [row if image == owner[row] else first[image] for image in range(len(sizes))]  # fmt: skip


def test_a_zero_that_jumprelu_leaves_has_no_sign() -> None:
    (block,) = row_blocks(np.zeros(3, np.int64), np.arange(3, dtype=np.int32), None, 256)
    pane = Pane(1, 2, 0.0, None, lambda _values: None)
    pane.add(torch.tensor([[-0.0, -0.0]] * 3), block)
    pane.finish()
    assert not np.signbit(pane.scores).any()


def test_a_missing_chunk_or_a_nan_is_damage_not_a_figure(scored: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _ = scored
    for name in ("scores", "argmax_token"):
        place = tmp_path / name
        shutil.copytree(folder / "alone/sae_txt_0/step.0", place)
        (place / name / "c/1/2").unlink()  # images 4 to 7, features 12 to 17
        matrix = ScoreMatrix.open(place)
        read = matrix.scores if name == "scores" else matrix.tokens
        for features in (12, slice(17, 19), slice(None)):
            with pytest.raises(DamagedError, match=rf"{name} is damaged \(its chunk c/1/2 is missing\): delete"):
                read(features)
        with pytest.raises(DamagedError):
            matrix.images(slice(4, 5))
        assert read(11).shape == (11,) and read(slice(18, 22)).shape == (11, 4)
        matrix.images(slice(8, 11))
    zarr.open_array(tmp_path / "argmax_token/scores", mode="r+")[3, 3] = np.nan
    with pytest.raises(DamagedError, match="scores is damaged \\(it holds NaN\\)"):
        ScoreMatrix.open(tmp_path / "argmax_token").scores()


def test_a_chunk_and_its_names_are_on_the_disk_before_its_block_is_said_to_be_done_and_there_at_the_end(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored
    small_pieces(monkeypatch)
    synced: list[Path] = []
    save, finish = Findings.save, Hands.finish

    def saved(self: Findings, path: Path) -> None:
        for name in ("scores", "argmax_token"):
            chunks = [p for p in (path.parents[1] / "matrix" / name).rglob("*") if not p.name.startswith("zarr")]
            assert len(chunks) > 2 and set(chunks) <= set(synced)
        save(self, path)

    def finished(self: Hands, subject: Subject, step: int) -> None:
        (tmp_path / "out/unfinished" / subject.name / f"step.{step}" / "matrix/argmax_token/c/2/1").unlink()
        finish(self, subject, step)

    monkeypatch.setattr(matrices, "fsync_file", synced.append)
    monkeypatch.setattr(Findings, "save", saved)
    monkeypatch.setattr(Hands, "finish", finished)
    with pytest.raises(DamagedError, match=r"c/2/1 was written and is not there any more: delete .*unfinished"):
        scores.run(options_of(folder, tmp_path / "out", workers=1))
    assert not list((tmp_path / "out").glob("*/step.0"))


def test_a_dictionary_that_is_replaced_during_a_run_is_refused(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored
    small_pieces(monkeypatch)
    shutil.copytree(folder / "d", tmp_path / "d")
    options = replace(options_of(folder, tmp_path / "out", workers=1), dictionaries=tmp_path / "d")
    claim = scores.claim_output

    def claimed(*words: Any) -> None:
        claim(*words)
        shutil.rmtree(tmp_path / "d/sae_txt_0")
        save_dictionary(tmp_path / "d/sae_txt_0", whole_dictionary("txt_0", 5, "sae"), None, [])

    monkeypatch.setattr(scores, "claim_output", claimed)
    with pytest.raises(MismatchError, match="sae_txt_0 holds another dictionary than when this command began"):
        scores.run(options)
    assert not list((tmp_path / "out").glob("*/step.0"))


def test_a_lock_that_is_taken_while_its_folder_goes_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = work.held(tmp_path / "out"), work.held(tmp_path / "out")
    first.__enter__()
    flock = fcntl.flock

    def late(file: int, how: int) -> None:
        monkeypatch.setattr(work.fcntl, "flock", flock)
        first.__exit__(None, None, None)  # between the second one's open and its lock
        assert not (tmp_path / "out/unfinished").exists()
        flock(file, how)

    monkeypatch.setattr(work.fcntl, "flock", late)
    with second, pytest.raises(StoreError, match="another process computes scores"), work.held(tmp_path / "out"):
        pass
    assert not (tmp_path / "out/unfinished").exists()


@pytest.mark.parametrize("moment", ["run.json", "last rename"])
def test_what_a_run_leaves_that_is_killed_at_its_beginning_or_end_is_cleaned_up_by_the_next(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder, expected = scored
    small_pieces(monkeypatch)
    out, left = tmp_path / "out", tmp_path / "out/unfinished/sae_txt_0/step.0/findings"
    if moment == "last rename":
        shutil.copytree(folder / "alone", out)
    left.mkdir(parents=True)
    (out / "unfinished/lock").touch()
    if moment == "run.json":
        (out / ".run.json.0badf00d.tmp").write_bytes(b"{")
    else:
        (left / "00000.0.found").write_bytes(b"of a result that is there")
    summary = scores.run(options_of(folder, out))
    assert summary.computed == (2 if moment == "run.json" else 0)
    assert digests(out) == expected
    assert not (out / "unfinished").exists()


def test_what_is_left_of_other_dictionaries_stays_to_be_gone_on_with(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    shutil.copytree(scored[0] / "alone", tmp_path / "out")
    left = tmp_path / "out/unfinished/img_3/step.0/findings/00000.0.found"
    left.parent.mkdir(parents=True)
    left.touch()
    scores.run(options_of(scored[0], tmp_path / "out"))
    assert left.exists()


def test_an_out_is_claimed_under_the_lock_and_a_folder_of_something_else_is_left_alone(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored
    small_pieces(monkeypatch)
    with work.held(tmp_path / "out"), pytest.raises(StoreError, match="another process computes scores"):
        scores.run(options_of(folder, tmp_path / "out"))
    assert not (tmp_path / "out/run.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(UsageError, match="is not empty and holds no analysis"):
        scores.run(options_of(folder, tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_scores_of_other_choices_are_refused_where_they_were_carried_into_an_out(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored
    small_pieces(monkeypatch)
    changes: dict[str, Any]
    for number, (changes, match) in enumerate(
        [
            ({"padding": True}, "padding_counted: True, expected False"),
            ({"active_above": 0.5}, r"active_above: 0\.5, expected 0\.0"),
            ({"dtype": "float16"}, "in float16, expected float32"),
        ]
    ):
        out, other = tmp_path / f"{number}", tmp_path / f"other{number}"
        shutil.copytree(folder / "alone", out)
        scores.run(options_of(folder, other, **changes))
        shutil.rmtree(out / "sae_txt_0")
        shutil.copytree(other / "sae_txt_0", out / "sae_txt_0")
        with pytest.raises(MismatchError, match=match):
            scores.run(options_of(folder, out))


def test_what_is_on_the_disk_of_a_run_that_goes_on_need_not_be_free_again(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = scored
    options = options_of(folder, tmp_path / "out", plan=True)
    analysis = open_analysis(options)
    planned = plan.ScorePlan(analysis, options, [(subject, 0) for subject in analysis.subjects])
    need = planned.array_bytes + planned.table_bytes + planned.scratch_bytes
    monkeypatch.setattr(announcing.shutil, "disk_usage", lambda _path: SimpleNamespace(free=need - 5000))
    with pytest.raises(StoreError, match="are to be written"):
        scores.run(options)
    there = tmp_path / "out/unfinished/sae_txt_0/step.0/matrix/scores/c/0/0"
    there.parent.mkdir(parents=True)
    there.write_bytes(bytes(5000))
    scores.run(options)
    there.write_bytes(bytes(4999))
    with pytest.raises(StoreError, match="are to be written"):
        scores.run(options)


def test_only_the_encoding_half_is_held_and_counted() -> None:
    dictionary = whole_dictionary("txt_0", 0, time_embed_dim=8, skip=True)
    encoder = encoding.Encoder(dictionary, torch.device("cpu"))
    held = encoder._dictionary.state_dict()
    assert not [name for name in held if name.startswith(("decoder", "skip"))]
    assert encoding.weight_bytes(dictionary) == sum(tensor.nbytes for tensor in held.values())
    every = sum(tensor.nbytes for tensor in dictionary.state_dict().values())
    assert encoding.weight_bytes(dictionary) + encoding.passing_bytes(dictionary) == every
    assert {"decoder", "skip"} <= set(dict(dictionary.named_children()))  # what was given is as it was
    x, sigma = torch.ones(2, D_MODEL), torch.ones(2)
    found = encoder.pane(encoder.prepared(x, sigma), slice(0, FEATURES), torch.empty(2, FEATURES))
    assert torch.equal(found, dictionary.encode(x, sigma))


def test_a_memory_that_is_too_little_for_several_dictionaries_is_refused_once(tmp_path: Path) -> None:
    whole_store(tmp_path / "s", steps=(0,), sites=("txt_0",))
    for kind, n_features in (("sae", 64), ("transcoder", 30_000)):
        dictionary = whole_dictionary("txt_0", 0, kind, n_features)
        save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    with pytest.raises(UsageError, match=r"for transcoder_txt_0 \(and for 1 more\): its encoder takes") as refused:
        scores.run(options_of(tmp_path, "out", memory="1MB", plan=True))
    enough = str(refused.value).split("use --memory ")[1].split()[0]
    scores.run(options_of(tmp_path, "out", memory=enough, workers=1, plan=True))


def test_groups_that_read_different_points_read_each_once(scored: tuple[Path, dict[str, bytes]]) -> None:
    options = options_of(scored[0], "x", workers=1)
    analysis = open_analysis(options)
    planned = plan.ScorePlan(analysis, options, [(subject, 0) for subject in analysis.subjects])
    together = planned.read_bytes
    planned.groups = {subject.site: [((each, (0,)),) for each in analysis.subjects] for subject in analysis.subjects}
    del planned.read_bytes
    assert (planned.reads, planned.read_bytes) == (1, together)
    planned.groups = {subject.site: 2 * groups for subject in analysis.subjects for groups in planned.groups.values()}
    assert planned.reads == 2


def test_a_plan_draws_nothing_from_the_random_numbers_of_the_process(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    scores.run(options_of(scored[0], tmp_path / "out", plan=True))
    assert torch.equal(before, torch.get_rng_state())


def test_dense_passes_find_what_the_lists_of_active_entries_find() -> None:
    rng = np.random.default_rng(0)
    z = torch.from_numpy(np.maximum(rng.integers(-3, 4, (40, 12)), 0).astype(np.float32))
    owner = np.repeat([0, 2, 3], [17, 3, 20])
    piece = rng.integers(-1, 5, 40).astype(np.int32)
    for above in (0.0, 1.0):
        for tokens in (np.full(40, 20), owner):  # segments alike, or not
            image = np.repeat([0, 1], 20) if tokens[0] == 20 else owner
            sparse, dense = (Pane(4, 12, above, 3, lambda _values: None) for _ in range(2))
            for block in row_blocks(image, np.arange(40, dtype=np.int32), piece, 20):
                sparse.add(z[block.rows], block)
                dense.rows.rows += block.count
                dense._dense(z[block.rows], block, maxima(z[block.rows], block))
            for name in ("scores", "tokens"):
                assert (getattr(sparse, name) == getattr(dense, name)).all()
            for name in ("rows", "histogram", "total", "squares"):
                assert np.array_equal(getattr(sparse.rows, name), getattr(dense.rows, name))
            assert all(
                np.array_equal(one, other)
                for one, other in zip(sparse.words.result(), dense.words.result(), strict=True)
            )  # type: ignore[union-attr]


def test_the_workers_of_a_cluster_write_the_same_bytes(
    scored: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distributed

    folder, expected = scored
    small_pieces(monkeypatch)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None, host="127.0.0.1",
        memory_limit=None,
    ) as there:  # fmt: skip
        settings = options_of(folder, tmp_path / "out", scheduler=there.scheduler_address)
        scores.run(settings)
        assert digests(tmp_path / "out") == expected
        assert not cluster._held
        monkeypatch.setattr(cluster, "LOADED", ("another",) * 2)
        job = cluster.job_of(plan.ScorePlan(open_analysis(settings), settings, ()))
        monkeypatch.undo()
        with pytest.raises(MismatchError, match="another version of Granary"):
            cluster._new_hands(job)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s", 1500, 16, 64)
    dictionary = random_dictionary(CASES[0], 64, 6000)
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    scores.run(options_of(tmp_path, "alone", workers=1))
    words = [
        sys.executable,
        "-m",
        "analyze",
        "scores",
        "--store",
        str(store),
        "--dictionaries",
        str(tmp_path / "d"),
        "--out",
    ]
    kills, chance = 0, np.random.default_rng(0)
    for attempt in range(5):
        process = subprocess.Popen(
            [*words, str(tmp_path / "out"), "--workers", str(1 + attempt % 2)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 60
        while not (tmp_path / "out/unfinished/img_0").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, 0.5))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    scores.run(options_of(tmp_path, "out"))
    assert kills > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
