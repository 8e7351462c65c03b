"""`python -m analyze steer`: pictures plain and changed, the same bytes again, gone on with where it was stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from analyze.features.clip import Clip
from analyze.steering import command
from analyze.steering.distances import measured_by
from analyze.steering.documents import read_document
from analyze.steering.drawing import Painter, Shot, open_painter, shots_of
from analyze.steering.edits import FeatureEdit, Intervention, StreamOff
from analyze.steering.experiment import PLAIN
from analyze.steering.results import Results
from analyze.steering.settings import SteerSettings
from harvest.models.embeddings import bytes_of
from store import Site, open_store
from store.errors import MismatchError, NonFiniteError, UsageError
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.config import Parent

IMG, TXT = Site.parse("img_1"), Site.parse("txt_0")
Steer = Callable[..., command.Steered]


@pytest.fixture(scope="module")
def painter(traced_flux: Path) -> Painter:
    return open_painter(open_store(traced_flux / "store"), dictionaries=traced_flux / "dictionaries")


@pytest.fixture
def steer(traced_flux: Path, tmp_path: Path, painter: Painter, monkeypatch: pytest.MonkeyPatch) -> Steer:
    """Runs the command on the small store; the model is loaded once for all tests, and asked for as often as the command does."""
    painter.forwards = 0

    def opened(_store: Any, **choices: Any) -> Painter:
        painter.batch_size, painter.peaks = choices["batch_size"], choices["peaks"]
        painter.dictionaries, painter.canvas = choices["dictionaries"], choices["canvas"]
        painter.forwards = 0
        return painter

    monkeypatch.setattr(command, "open_painter", opened)

    def run(out: str = "out", **choices: Any) -> command.Steered:
        given: dict[str, Any] = {
            "store": traced_flux / "store",
            "dictionaries": traced_flux / "dictionaries",
            "clip": "none",
        }
        return command.run(SteerSettings(out=tmp_path / out, **{**given, **choices}))

    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def sweep(**choices: Any) -> dict[str, Any]:
    return {"images": "0-2", "edit": ("amplify img_1:3,5,8", "amplify txt_0:3,4,9"), "strengths": "1,0,8", **choices}


def test_plain_pictures_drawn_again_are_those_of_the_store(traced_flux: Path, painter: Painter) -> None:
    store = open_store(traced_flux / "store")
    painter.batch_size = store.meta.batch_size
    found = painter.draw(shots_of(store, range(3)))
    assert found.pictures is not None
    for image, picture in enumerate(found.pictures):
        stored = store.picture(image)
        assert stored is not None and np.array_equal(np.asarray(picture), np.asarray(stored)), image
    assert found.latents.dtype == torch.float32 and found.latents.shape[:2] == (3, 64)


def test_an_intervention_that_changes_nothing_leaves_the_latents_bit_equal(traced_flux: Path, painter: Painter) -> None:
    shots = shots_of(open_store(traced_flux / "store"), [0, 1])
    plain = painter.draw(shots, pictures=False)
    assert plain.pictures is None
    same = (
        Intervention("nothing"),
        Intervention("times one", (FeatureEdit(IMG, (3, 5), "amplify", 1.0),)),
        Intervention("nothing added", (FeatureEdit(TXT, (3,), "add", 0.0),)),
    )
    for intervention in same:
        assert torch.equal(painter.draw(shots, intervention, pictures=False).latents, plain.latents), intervention.name


def test_every_shot_of_a_batch_gets_its_own_intervention_and_nobody_elses(traced_flux: Path, painter: Painter) -> None:
    shots = shots_of(open_store(traced_flux / "store"), [0, 1, 2])
    painter.batch_size = 3
    strong = Intervention(
        "strong", (FeatureEdit(IMG, (3, 5, 8), "amplify", 30.0), FeatureEdit(TXT, (4, 9), "set", 5.0))
    )
    off = Intervention("off", off=(StreamOff("txt", (0, 1), (0,)),))
    plain, all_strong, all_off = (painter.draw(shots, each, pictures=False).latents for each in (None, strong, off))
    mixed = painter.draw(shots, [strong, None, off], pictures=False).latents
    assert torch.equal(mixed, torch.stack([all_strong[0], plain[1], all_off[2]]))
    assert not torch.equal(all_strong[0], plain[0]) and not torch.equal(all_off[2], plain[2])
    with pytest.raises(UsageError, match="1 intervention for 3 shots"):
        painter.draw(shots, [strong])


def test_transformer_runs_are_counted_one_a_picture_and_step(painter: Painter) -> None:
    rows: list[int] = []
    hook = painter.sampler.pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    painter.batch_size, painter.forwards = 2, 0
    seen: list[tuple[int, int]] = []
    try:
        painter.draw(
            [Shot("a red ring", seed) for seed in range(3)], on_step=lambda first, step, _: seen.append((first, step))
        )
    finally:
        hook.remove()
    assert painter.forwards == sum(rows) == 3 * painter.num_steps
    assert seen == [(first, step) for first in (0, 2) for step in range(painter.num_steps)]


def test_each_prompt_is_encoded_once_and_only_so_many_are_kept(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvest.models import text

    encoded: list[str] = []
    encode = text.encode

    def counted(pipe: Any, prompts: Any, length: int) -> Any:
        encoded.extend(prompts)
        return encode(pipe, prompts, length)

    monkeypatch.setattr(text, "encode", counted)
    embeddings = painter.sampler.embeddings
    assert embeddings is not None
    embeddings.forget()
    monkeypatch.setattr(embeddings, "bound", 2 * bytes_of(encode(painter.sampler.pipe, ["a red ring"], 16)))
    painter.batch_size = 2
    first = painter.draw([Shot("a red ring", 0), Shot("a red ring", 1), Shot("a blue ring", 2)], pictures=False)
    assert encoded == ["a red ring", "a blue ring"]
    painter.draw([Shot("a green ring", 0), Shot("a blue ring", 0)], pictures=False)
    assert encoded[2:] == ["a green ring"] and embeddings.kept == ("a green ring", "a blue ring")
    again = painter.draw([Shot("a red ring", 0), Shot("a red ring", 1), Shot("a blue ring", 2)], pictures=False)
    assert encoded[3:] == ["a red ring"] and torch.equal(first.latents, again.latents)


def test_latents_that_are_not_finite_are_refused_by_site_and_step(painter: Painter) -> None:
    with pytest.raises(NonFiniteError, match=r"img_1 at step \d holds a NaN"):
        painter.draw([Shot("a red ring", 0)], Intervention("too strong", (FeatureEdit(IMG, (3,), "set", 3e38),)))
    painter.draw([Shot("a red ring", 0)])  # and the model is as it was


def test_a_sweep_draws_plain_and_a_variant_a_strength_and_says_how_far_apart_they_are(
    steer: Steer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = steer(**sweep(judge="colour"))
    out, said = tmp_path / "out", capsys.readouterr().out
    assert done.transformer_runs == 3 * 4 * 4 == done.experiment.forwards
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert [(row["shot"], row["variant"]) for row in table[:5]] == [
        (0, PLAIN), (0, "strength 1"), (0, "strength 0"), (0, "strength 8"), (1, PLAIN)
    ]  # fmt: skip
    for row in table:
        assert (out / row["picture"]).is_file()
        if row["variant"] == PLAIN:
            assert row["psnr"] is None and row["kept_colour"] is None
            continue
        assert np.array_equal(pixels(out / row["picture"]), pixels(out / table[4 * row["shot"]]["picture"])) == (
            row["psnr"] == float("inf")
        )
        if row["variant"] == "strength 1":  # z' = z
            assert (row["psnr"], row["latent_mse"], row["kept_colour"], row["changed"]) == (
                float("inf"),
                0,
                True,
                False,
            )
    mse = {row["variant"]: row["latent_mse"] for row in table if row["shot"] == 0}
    assert 0 < mse["strength 0"] < mse["strength 8"]  # one step away from 1, and seven
    assert "plan: 12 pictures of 64 x 64 pixels by tiny-flux: 3 shots, plain and 3 variants" in said
    assert "48 transformer runs" in said and "strength 8" in (out / "summary.md").read_text()
    assert (out / "grid.png").is_file() and not (out / "grid-2.png").exists()


def test_the_experiment_that_was_written_draws_the_same_bytes_again_without_the_store(
    steer: Steer, tmp_path: Path
) -> None:
    steer("first", **sweep(off=("txt 2 @steps=1",), judge="none"))
    steer("second", experiment=tmp_path / "first" / "experiment.yaml", store=None)
    first, second = tree(tmp_path / "first"), tree(tmp_path / "second")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert json.loads(first["run.json"])["transformer_runs"] == 48


@pytest.mark.slow  # that what is missing is drawn, and nothing else, the next test shows
def test_a_run_that_was_stopped_goes_on_with_the_first_batch_that_is_missing(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steer("whole", **sweep(judge="none"))
    whole, kept = tree(tmp_path / "whole"), Results.keep
    calls: list[tuple[int, int]] = []

    def stopped(results: Any, batch: int, variant: int, drawing: Any) -> None:
        calls.append((batch, variant))
        if len(calls) == 4:
            raise KeyboardInterrupt
        kept(results, batch, variant, drawing)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Results, "keep", stopped)
        steer("out", **sweep(judge="none"))
    assert not (tmp_path / "out" / "results.parquet").exists()
    done = steer("out", **sweep(judge="none"))
    assert done.transformer_runs == (12 - 2 - 1 - 2) * 4  # batches of 2 and 1 shots: three were done
    assert tree(tmp_path / "out") == whole


def test_a_picture_that_was_damaged_since_is_drawn_again_and_a_whole_run_loads_no_model(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steer(**sweep(judge="none"))
    out = tmp_path / "out"
    whole = tree(out)
    (out / "pictures" / "0002" / "02-strength-0.png").write_bytes(b"no picture")
    (out / "latents" / "00-plain" / "0000.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert steer(**sweep(judge="none")).transformer_runs == (1 + 2) * 4
    assert "9 are there already" in capsys.readouterr().out
    assert tree(out) == whole

    def loads(*_: Any, **__: Any) -> Painter:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command, "open_painter", loads)
    done = steer(**sweep(judge="none"))
    assert done.transformer_runs == 0 and tree(out) == whole


def test_a_plan_says_what_it_costs_and_neither_draws_nor_writes(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "open_painter", lambda *_, **__: pytest.fail("the model was loaded"))
    done = steer(**sweep(plan=True))
    said = capsys.readouterr().out
    assert "plan: 12 pictures" in said and "48 transformer runs" in said and "time unknown" in said
    assert "  strength 8: amplify:8 img_1:3,5,8 + amplify:8 txt_0:3-4,9 (difference)" in said
    assert done.table is None and done.experiment.pictures == 12
    assert list(tmp_path.iterdir()) == []


def test_a_strength_in_peaks_is_that_share_of_the_greatest_activation(steer: Steer, tmp_path: Path) -> None:
    begin, same = "images: [0]\njudge: none\nname: same\n", "pictures/0000/01-same.png"
    (tmp_path / "peaks.yaml").write_text(
        f"{begin}edits: ['set:0.5 img_1:3,5 @unit=peak']\npeaks: {{transcoder_img_1: {{3: 2.5, 5: 6, 9: 1}}}}\n"
    )
    (tmp_path / "plain.yaml").write_text(f"{begin}edits: ['set:1.25 img_1:3', 'set:3 img_1:5']\n")
    for name in ("peaks", "plain"):
        steer(name, experiment=tmp_path / f"{name}.yaml")
    assert (tmp_path / "peaks" / same).read_bytes() == (tmp_path / "plain" / same).read_bytes()
    assert read_document(tmp_path / "peaks" / "experiment.yaml")["peaks"] == {"transcoder_img_1": {3: 2.5, 5: 6.0}}


def test_prompts_with_seeds_need_no_store_and_the_weights_that_drew_them_are_written_down(
    steer: Steer, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"store": None, "model": "tiny-flux", "prompt": ("a red ring",), "seeds": "0-1"}
    steer(**asked, edit=("zero img_0:3",))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    weights = read_document(tmp_path / "out" / "experiment.yaml")["drawing"]["weights_sha256"]
    assert (
        record["store"] is None and record["model"]["weights_sha256"] == weights and len(weights["transformer"]) == 64
    )
    table = pq.read_table(tmp_path / "out" / "results.parquet")
    assert {"flip", "kept_shape"} <= set(table.column_names) and table["image"].null_count == 4
    assert steer(**asked, edit=("zero img_0:3",)).transformer_runs == 0


def test_dictionaries_of_another_model_are_refused_once_it_is_loaded_and_before_anything_is_written(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analyze.steering.resolving.transformer_of_files", lambda _: None)  # as of one of the hub
    made = transcoder("img_0", parent=Parent("p", "s", {"id": "m", "weights_sha256": {"transformer": "0" * 64}}))
    save_dictionary(tmp_path / "d" / made.name, made, None, [])
    asked = {"store": None, "model": "tiny-flux", "prompt": ("a",), "dictionaries": tmp_path / "d"}
    with pytest.raises(MismatchError, match=r"transcoder_img_0 is of m .*which is another model"):
        steer(**asked, edit=("zero img_0:3",))
    said = capsys.readouterr().out
    assert "that transcoder_img_0 belong to tiny-flux is checked when its weights are loaded" in said
    assert not (tmp_path / "out").exists()


def test_the_kind_of_a_dictionary_is_said_where_it_is_not_a_transcoder(
    steer: Steer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dictionary(tmp_path / "d" / "sae_img_0", transcoder("img_0", kind="sae"), None, [])
    steer(images="0", dictionaries=tmp_path / "d", edit=("zero img_0:3",), plan=True)
    assert "  zero img_0:3: zero img_0:3 @kind=sae (difference)" in capsys.readouterr().out


def test_the_record_names_what_measures_and_draws_the_results_and_other_versions_are_refused(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"images": "0", "off": ("txt 0",), "judge": "none"}
    steer(**asked)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {"scikit-image", "flip-evaluator", "matplotlib", "torch", "Pillow"} <= set(record["versions"])
    assert "lpips" in record
    versions, _ = measured_by()
    lpips = {"version": "0.1.4", "weights_sha256": "0" * 64}
    monkeypatch.setattr("analyze.steering.results.measured_by", lambda: (versions, lpips))
    with pytest.raises(UsageError, match="begun with another lpips: None, now"):
        steer(**asked)


def test_a_clip_model_compares_the_pictures_and_another_one_is_refused(
    steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Colours:
        """In place of a CLIP model: the mean colour."""

        def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)) for image in images])}

    class Means(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return SimpleNamespace(image_embeds=pixel_values.float().mean((1, 2)))

    monkeypatch.setattr(
        command, "load_clip", lambda name, _device: Clip(Means(), Colours(), name, f"hash of {name[-4:]}")
    )
    choices = {"images": "0", "off": ("txt all",), "judge": "none", "clip": None}
    steer(**choices)
    values = pq.read_table(tmp_path / "out" / "results.parquet")["clip"].to_pylist()
    assert values[0] is None and 0 < values[1] < 1
    said = read_document(tmp_path / "out" / "experiment.yaml")["clip"]
    assert said == {"name": "tiny-flux", "identity": "hash of clip"}
    with pytest.raises(MismatchError, match="was compared by CLIP model tiny-flux"):
        steer("other", experiment=tmp_path / "out" / "experiment.yaml", clip="some/other")
    with pytest.raises(UsageError, match="begun with another clip"):
        steer(**{**choices, "clip": "none"})


def test_a_painter_refuses_weights_that_are_not_the_stores(
    traced_flux: Path, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvest.models.loading.load_pipeline", lambda *_: painter.sampler.pipe)
    weight = painter.sampler.pipe.transformer.proj_out.bias
    with torch.no_grad():
        weight += 1
    try:
        with pytest.raises(MismatchError, match="the transformer of tiny-flux has weights"):
            open_painter(open_store(traced_flux / "store"))
    finally:
        with torch.no_grad():
            weight -= 1
