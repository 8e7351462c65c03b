"""SD3 and SD3.5 are harvested: the conditional half of a guided batch, at the sites that they have, through the whole line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyze.settings import AllSettings
from harvest import HarvestSettings, run
from harvest.__main__ import COMMANDS
from harvest.capture import Captured
from harvest.models.architectures import SD3
from harvest.models.loading import load_pipeline
from harvest.planning.plan import make_outline
from harvest.sample import Sampler
from harvest.settings import SD35_LARGE, SD35_MEDIUM
from store import Site, Store, open_store
from store.care.verify import verify
from store.command import program
from store.errors import UsageError
from store.info import describe
from store.pack import PackSettings
from store.pack import run as pack
from store.shards import open_pack
from store.strata import RealText
from tests import small_models
from tests.sd3_by_hand import sd3_mlps
from tests.test_store import tree
from train import TrainSettings
from train import run as train

PROMPTS = ["a small red circle on a blue background", "green cross"]
SITES = tuple(Site.parse(name) for name in ("img_0", "img_1", "img_2", "txt_0", "txt_1"))
LENGTH, STEPS, GUIDANCE = 16, 3, 4.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: `sd35`, with dual attention and normalised queries, and `sd3`, without them and without T5."""
    folder = tmp_path_factory.mktemp("sd3-models")
    small_models.sd3(folder / "sd35")
    small_models.sd3(folder / "sd3", with_t5=False, dual=())
    return folder


def harvest(models: Path, out: Path, model: str = "sd35", **options: Any) -> Store:
    defaults: dict[str, Any] = {
        "prompts": "builtin:shapes", "images": 6, "resolution": 32, "num_inference_steps": STEPS, "guidance": GUIDANCE,
        "max_sequence_length": LENGTH, "batch_size": 4, "threads": 1, "pictures": "png",
    }  # fmt: skip
    run(HarvestSettings(out=out, model=str(models / model), **{**defaults, **options}))
    return open_store(out)


@pytest.fixture(scope="module")
def stored(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six images of `sd35`, all that can be kept."""
    return harvest(models, tmp_path_factory.mktemp("sd3") / "store", store_dtype="float32")


@pytest.fixture(scope="module")
def without(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two images of `sd3`, real text tokens."""
    return harvest(models, tmp_path_factory.mktemp("sd3") / "store", "sd3", images=2, text_tokens="real", steps="1")


def pipeline(models: Path, model: str) -> Any:
    settings = HarvestSettings(out=Path("unused"), model=str(models / model))
    return load_pipeline(settings, torch.device("cpu"), "float32")


@pytest.mark.parametrize("model", ["sd35", "sd3"])
@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_what_is_captured_is_the_conditional_half_of_a_forward_written_by_hand(
    models: Path, model: str, guidance: float
) -> None:
    pipe = pipeline(models, model)
    seen: list[Captured] = []
    sampler = Sampler(pipe, SITES, 32, 24, STEPS, LENGTH, guidance, False)
    drawn = sampler.draw(PROMPTS, [0, 1], lambda _step, captured: seen.append(captured))
    assert len(seen) == STEPS
    for step, captured in enumerate(seen):
        assert captured.inputs is not None and captured.sigma is not None
        assert len(captured.inputs["timestep"]) == len(PROMPTS) * (1 + (guidance > 1))
        with torch.no_grad():
            expected = sd3_mlps(pipe.transformer, captured.inputs)
        assert set(expected) == {(str(site), point) for site, point in captured.values}
        for (site, point), values in captured.values.items():
            assert len(values) == len(PROMPTS)
            torch.testing.assert_close(values, expected[str(site), point][-len(PROMPTS) :], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(captured.sigma, captured.inputs["timestep"][-len(PROMPTS) :] / 1000)
        np.testing.assert_allclose(drawn.sigma[:, step], drawn.scheduler_sigma[:, step], rtol=1e-6)


def test_the_store_holds_the_picture_that_the_plain_pipeline_draws(models: Path, stored: Store) -> None:
    rows = stored.prompts()
    drawn = pipeline(models, "sd35")(
        rows.column("prompt")[3].as_py(),
        height=32,
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=LENGTH,
        generator=torch.Generator("cpu").manual_seed(rows.column("seed")[3].as_py()),
    ).images[0]
    picture = stored.picture(3)
    assert picture is not None
    assert np.abs(np.asarray(drawn, int) - np.asarray(picture, int)).max() <= 1


def test_the_text_has_clips_places_and_after_them_t5s_real_tokens_and_knows_the_padding_among_them(
    models: Path, tmp_path: Path, stored: Store, without: Store
) -> None:
    store = harvest(models, tmp_path / "store", text_tokens="real", steps="1", streams="txt", store_dtype="float32")
    rows, policy, txt = store.prompts(), store.meta.tokens["txt"], Site.parse("txt_1")
    assert policy.total == 77 + LENGTH > 2 * policy.kept
    for image in range(6):
        pieces, length = rows.column("text_pieces")[image].as_py(), rows.column("text_length")[image].as_py()
        first = f"▁{rows.column('prompt')[image].as_py().split()[0].strip(':')}"
        assert pieces[0] == "⟨start⟩" and pieces[1] == pieces[77] == first
        assert pieces[76] == "·" and pieces[-1] == "</s>" and len(pieces) == length > 78
        real = [place for place, piece in enumerate(pieces) if piece != "·"]
        assert rows.column("text_padding")[image].as_py() == [place for place in range(length) if place not in real]
        assert [place for place in store.tokens("txt", 1)[image] if place >= 0] == real
        kept = store.read(txt, 1, "mlp_in")[image]
        np.testing.assert_array_equal(kept[: len(real)], stored.read(txt, 1, "mlp_in")[image][real])
    found = without.prompts()
    of_clip = [77 - len(padding) for padding in found.column("text_padding").to_pylist()]
    assert found.column("text_length").to_pylist() == [77, 77] and without.meta.tokens["txt"].total == 77 + LENGTH
    assert (without.tokens("txt", 1) >= 0).sum(axis=1).tolist() == of_clip
    assert f"kept at a step: {sum(of_clip)} real, 0 padding" in describe(without)


def test_sites_sizes_and_components_are_the_models(stored: Store, without: Store) -> None:
    meta = stored.meta
    assert stored.sites == SITES
    assert (meta.d_model, meta.pixels_per_token, meta.grid, meta.guidance) == (32, 8, (4, 4), GUIDANCE)
    assert meta.model["architecture"] == "sd3" and set(meta.model["weights_sha256"]) == set(SD3.parts)
    there = {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert set(without.meta.model["weights_sha256"]) == there


def test_recomputed_targets_are_the_stored_ones(models: Path, tmp_path: Path, stored: Store) -> None:
    from safetensors.torch import load

    short = harvest(models, tmp_path / "recomputed", targets="recomputed", store_dtype="float32")
    for site in SITES:
        weights = load(short.weights_file(site) or b"")
        x = torch.from_numpy(short.read(site, 2, "mlp_in"))
        hidden = torch.nn.functional.gelu(
            x @ weights["net.0.proj.weight"].T + weights["net.0.proj.bias"], approximate="tanh"
        )
        y = hidden @ weights["net.2.weight"].T + weights["net.2.bias"]
        np.testing.assert_allclose(stored.read(site, 2, "mlp_out"), y.numpy(), atol=2e-5)


def test_the_whole_line_runs(models: Path, tmp_path: Path) -> None:
    """Harvest, verify, pack, train, scores, report and sheets, with recomputed targets."""
    from analyze import everything
    from analyze.pictures import sheets
    from analyze.pictures.settings import SheetSettings

    store = harvest(models, tmp_path / "store", images=40, targets="recomputed", text_tokens="real+2", batch_size=20)
    assert not verify(store.path).findings
    for split in ("train", "val"):
        pack(PackSettings(store=store.path, out=tmp_path / split, split=split))
    learned = train(
        TrainSettings(
            pack=tmp_path / "train", val=tmp_path / "val", out=tmp_path / "d", sites="img_2,txt_1", activation="topk", k=8,
            expansion=2, batch=512, epochs=1, lr=5e-3, threads=1, time_embed_dim=16,
        )
    )  # fmt: skip
    assert [str(dictionary.config.site) for dictionary in learned] == ["img_2", "txt_1"]
    real = RealText.of(store.prompts()).count(store.meta.text_tokens)
    for split in ("train", "val"):
        here = real[np.array(store.prompts()["split"].to_pylist()) == split].sum() * STEPS
        assert open_pack(tmp_path / split).group_rows(Site.parse("txt_1"))["real"] == here
    found = everything.run(
        AllSettings(store=Path(store.path), dictionaries=tmp_path / "d", out=tmp_path / "a", images="all")
    )
    assert found.scores.computed == 2 * STEPS
    assert found.report is not None and found.report.index.exists()
    assert "tiny-flux's own size, 64 x 64 pixels; these are 32 wide and 32 high" in found.left_out["truth"]
    report = "".join(
        file.read_text() for file in (tmp_path / "a" / "report").rglob("*.js") if "static" not in file.parts
    )
    assert "⟨start⟩" in report and '"·"' not in report
    sheets.run(
        SheetSettings(
            store=Path(store.path),
            dictionaries=tmp_path / "d",
            out=tmp_path / "a",
            sites="txt_1",
            steps="1",
            features="0",
            top=2,
        )
    )
    assert list((tmp_path / "a" / "sheets").rglob("*.png"))


def test_text_encoders_that_go_first_give_the_same_store(models: Path, tmp_path: Path, without: Store) -> None:
    asked = {"images": 2, "text_tokens": "real", "steps": "1"}
    first = harvest(models, tmp_path / "first", "sd3", text_encoders="first", **asked)
    assert tree(first.path) == tree(without.path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"trace": True}, "circuits know only FLUX.1's double blocks"),
        ({"layers": "single:0"}, "no single blocks"),
        ({"layers": "2", "streams": "txt"}, "has no txt_2"),
        ({"resolution": 72}, "positions up to 64 pixels a side"),
        ({"resolution": 36}, "multiples of 8"),
    ],
)
def test_what_it_has_not_is_refused_before_its_weights_are_read(
    models: Path, tmp_path: Path, asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvest.planning.plan.load_weights", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(UsageError, match=message):
        harvest(models, tmp_path / "store", **asked)


def test_what_draws_it_again_and_what_explains_it_refuse_in_one_sentence(
    models: Path, tmp_path: Path, stored: Store
) -> None:
    from analyze.circuits.inquiry import open_inquiry
    from analyze.circuits.settings import GraphSettings
    from analyze.steering.canvas import canvas_of_model, canvas_of_store

    with pytest.raises(UsageError, match="are drawn again"):
        canvas_of_store(stored)
    with pytest.raises(UsageError, match="are drawn again"):
        canvas_of_model(str(models / "sd35"))
    asked = GraphSettings(
        store=Path(stored.path), dictionaries=tmp_path, out=tmp_path / "g", image="0", step="0", target=("img_0:max:0",)
    )
    with pytest.raises(UsageError, match="graphs are made of the double blocks"):
        open_inquiry(asked)


def test_a_plan_of_published_models_needs_no_weights() -> None:
    medium = make_outline(
        HarvestSettings(plan=True, model=SD35_MEDIUM, prompts="builtin:shapes", images=10, guidance=2.0)
    )
    assert (medium.meta.d_model, medium.meta.grid, medium.meta.pixels_per_token) == (1536, (64, 64), 16)
    assert (medium.meta.num_inference_steps, medium.meta.guidance) == (40, 2.0)
    assert medium.meta.tokens["txt"].total == 77 + 256 > 2 * medium.longest
    assert any("no column truth" in remark and "64 x 64 pixels alone" in remark for remark in medium.remarks)
    assert [sum(site.startswith(stream) for site in medium.meta.sites) for stream in ("img", "txt")] == [24, 23]
    large = make_outline(HarvestSettings(plan=True, model=SD35_LARGE, prompts="builtin:shapes", images=10, layers="37"))
    assert large.meta.sites == ("img_37",) and large.meta.d_model == 2432 and large.meta.guidance == 3.5


def test_another_pipeline_is_refused_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    asked = ["--model", str(tmp_path), "--prompts", "builtin:shapes", "--images", "1", "--out", str(tmp_path / "s")]
    assert program("harvest", COMMANDS, asked, default="harvest") == 2
    assert (
        "is a StableDiffusionPipeline; Granary harvests a FluxPipeline, StableDiffusion3Pipeline"
        in capsys.readouterr().err
    )
