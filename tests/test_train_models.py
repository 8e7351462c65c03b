"""A run is a list of models that share one read: which they are, where they lie, and that none sees another."""

from pathlib import Path
from typing import Any

import pytest
import torch

import train.plan
import train.trainer
from store.errors import StoreError, UsageError
from store.shards import open_pack
from tests.small_training import Packs, digests, small_run
from train import TrainSettings, load_dictionaries
from train.models import Model, models_of
from train.rows.loader import Loader
from train.settings import SWEPT

pytestmark = pytest.mark.usefixtures("without_pictures")


EVERYTHING = """
- {activation: [topk, batchtopk], k: 8}
- {activation: jumprelu, l1: 1e-3}
- {activation: relu, dead: auxk, dead_rows: 2000}
- {activation: topk, k: 8, nested: [0.25, 0.5], skip: true, dead: auxk, dead_rows: 500}
- {activation: topk, k: 4, kind: sae, dead: resample, resample_rows: 3000, dead_rows: 2000, autocast: bfloat16}
- {kind: sae, family: flux-sae, activation: relu, l1: 1e-3, time_embed_dim: null, loss: mse, decoder_bias: mean}
- {activation: topk, k: 16, lr_warmup_rows: 2000, l1_warmup_rows: 1000, l1: 1e-4, project: true, seed: [3, 4]}
"""
"""every activation, way with dead features, family and option, in a list of nine models"""


def everything(folder: Path) -> Path:
    """`EVERYTHING` as a file."""
    path = folder / "models.yaml"
    path.write_text(EVERYTHING)
    return path


def models(packs: Packs, **changes: Any) -> tuple[Model, ...]:
    return models_of(
        TrainSettings(**{"pack": packs[0], "out": Path("out"), "sites": "img_0", **changes}), open_pack(packs[0])
    )


def names(packs: Packs, **changes: Any) -> list[str]:
    return [model.name for model in models(packs, **changes)]


def test_one_model_a_site_lies_in_out_itself_and_several_in_folders_that_say_what_differs(packs: Packs) -> None:
    assert names(packs, sites="all") == ["transcoder_img_0", "transcoder_txt_0"]
    assert names(packs, kind="transcoder,sae") == ["transcoder_img_0", "sae_img_0"]
    assert names(packs, sites="all", l1="1e-4,3e-4", seed="0,1") == [
        f"l1-{l1}_seed-{seed}/transcoder_{site}"
        for site in ("img_0", "txt_0")
        for l1 in ("0.0001", "0.0003")
        for seed in (0, 1)
    ]
    assert names(packs, activation="topk", k=(2, 4), expansion="8,16", lr=[1e-3, 2e-4]) == [
        f"k-{k}_expansion-{expansion}_lr-{lr}/transcoder_img_0"
        for k in (2, 4)
        for expansion in (8, 16)
        for lr in ("0.001", "0.0002")
    ]


def test_a_k_goes_only_with_the_activations_that_need_one(packs: Packs) -> None:
    assert names(packs, activation="relu,topk", k="2,4") == [
        "activation-relu/transcoder_img_0",
        "activation-topk_k-2/transcoder_img_0",
        "activation-topk_k-4/transcoder_img_0",
    ]


def test_l1_defaults_are_those_of_record_for_each_stream_and_none_where_k_decides(packs: Packs) -> None:
    assert [model.recipe.l1 for model in models(packs, sites="all")] == [3e-4, 5e-5]
    assert [model.recipe.l1 for model in models(packs, activation="topk,batchtopk", k=4)] == [0.0, 0.0]
    assert [model.recipe.l1 for model in models(packs, sites="all", l1=7e-4)] == [7e-4, 7e-4]


def test_a_recipe_gives_defaults_and_flags_go_before_it(packs: Packs) -> None:
    (model,) = models(packs, recipe="flux-sae", k=8)
    assert (model.config.family, model.config.kind, model.recipe.loss) == ("flux-sae", "sae", "mse")
    assert (model.config.activation, model.config.time_embed_dim) == ("topk", None)
    (model,) = models(packs, recipe="flux-sae", activation="relu", l1=1e-3, loss="record")
    assert (model.config.family, model.config.activation, model.recipe.loss) == ("flux-sae", "relu", "record")
    with pytest.raises(UsageError, match="flux-sae family has only SAEs"):
        models(packs, recipe="flux-sae", k=8, time_embed_dim=64)


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "none"),
        ({}, "none"),
    ],
)
def test_auto_rounds_products_only_where_a_cpu_has_matrix_units(
    packs: Packs, units: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert [model.recipe.autocast for model in models(packs, autocast="auto")] == [expected]
    assert [model.recipe.autocast for model in models(packs, autocast="bfloat16")] == ["bfloat16"]


def test_numbers_words_and_tuples_are_the_same_settings() -> None:
    where = {"pack": Path("p"), "out": Path("o")}
    given: list[dict[str, Any]] = [
        {"l1": 3e-4, "k": 8, "activation": "topk", "seed": 1},
        {"l1": "3e-4", "k": "8", "activation": ["topk"], "seed": "1"},
        {"l1": (0.0003,), "k": (8,), "activation": ("topk",), "seed": [1]},
    ]
    assert len({str(TrainSettings(**where, **settings)) for settings in given}) == 1
    assert set(SWEPT) <= set(TrainSettings.__dataclass_fields__)


def test_a_list_of_models_takes_from_the_flags_what_it_leaves_out(packs: Packs, tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("- {activation: topk, k: [2, 4]}\n- {l1: 1e-4, skip: true}\n- {}\n")
    found = models(packs, models=path, expansion=4, seed="0,1")
    assert [model.folder.parent.name for model in found[::2]] == [
        "activation-topk_k-2_seed-0",
        "activation-topk_k-4_seed-0",
        "activation-relu_l1-0.0001_seed-0_skip-true",
        "activation-relu_seed-0",
    ]
    assert {model.recipe.expansion for model in found} == {4} and [model.recipe.seed for model in found] == [0, 1] * 4
    assert len(models(packs, models=everything(tmp_path))) == 9


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- {layers: 3}", "model 1: a model has no layers; it has kind, family"),
        ("- {}\n- {batch: 3}", r"model 2: a model has no batch; .*belong to the whole run"),
        ("{k: 3}", "must hold a list of mappings"),
        ("- [", "is no YAML"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
        ("- {activation: topk}", "model 1: --activation topk needs --k"),
        ("- {lr: fast}", "model 1: --lr 'fast' is not a number"),
        ("- {skip: 3}", "model 1: --skip 3 must be true or false"),
        ("- {l1: 3e-4}\n- {}", "transcoder_img_0 is asked for twice with the same settings"),
    ],
)
def test_a_list_of_models_that_cannot_be_is_refused(packs: Packs, tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=reason):
        models(packs, models=path)


def test_a_model_trained_with_others_is_byte_equal_to_the_same_trained_alone(packs: Packs, tmp_path: Path) -> None:
    path = everything(tmp_path)
    small = {"models": path, "activation": None, "k": None, "rows": 3000, "checkpoint_steps": 5}
    together = small_run(packs, tmp_path / "all", **small)
    assert len(together) == 9 and len(load_dictionaries(tmp_path / "all" / "activation-topk_k-8_seed-0")) == 1
    one_by_one = small_run(packs, tmp_path / "apart", together=1, **small)
    assert digests(tmp_path / "apart") == digests(tmp_path / "all")
    assert [d.metrics for d in one_by_one] == [d.metrics for d in together]
    (alone,) = small_run(packs, tmp_path / "alone", **{**small, "models": None, "activation": "batchtopk", "k": 8})
    assert digests(tmp_path / "alone" / alone.name) == digests(
        tmp_path / "all" / "activation-batchtopk_k-8_seed-0" / alone.name
    )


def test_all_models_of_a_site_share_one_read(packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, ...]] = []
    batches = Loader.batches

    def counted(self: Loader, first: int, last: int) -> Any:
        begun.append((str(self.site), *self.columns))
        return batches(self, first, last)

    monkeypatch.setattr(Loader, "batches", counted)
    small_run(packs, tmp_path / "all", sites="all", kind="transcoder,sae", k="2,4", rows=512)
    assert begun == [("img_0", "mlp_in", "mlp_out"), ("txt_0", "mlp_in", "mlp_out")]
    begun.clear()
    small_run(packs, tmp_path / "two", k="2,4,8", rows=512, together=2)
    assert [site for site, *_ in begun] == ["img_0", "img_0"]


def test_finished_models_are_left_and_those_that_were_added_are_trained(
    packs: Packs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run(packs, tmp_path, k="2,4", rows=512)
    before = digests(tmp_path)
    capsys.readouterr()
    assert len(small_run(packs, tmp_path, k="2,4,8", rows=512)) == 3
    out = capsys.readouterr().out
    assert out.count("is complete already") == 2 and "2 of them complete already" in out
    assert {name: found for name, found in digests(tmp_path).items() if name in before} == before
    with pytest.raises(UsageError, match=r"--lr: there 0.005, asked for 0.1"):
        small_run(packs, tmp_path, k="2,4", rows=512, lr=0.1)


def test_the_plan_says_what_a_run_takes_and_what_cannot_fit_is_refused(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run(packs, tmp_path / "out", k="2,4", plan=True, checkpoint_steps=20) == []
    out = capsys.readouterr().out
    for words in (
        "2 models at 1 site", "k-2/transcoder_img_0: 64 features, topk, k 2, seed 0, 1,912 parameters",
        "each row once for up to 2 models", "104 of 256 rows; 6 checkpoints", "45.9 KB weights and moments",
    ):  # fmt: skip
        assert words in out
    monkeypatch.setattr(train.plan, "_available", lambda *_: 100_000)
    with pytest.raises(
        UsageError, match=r"2 models of img_0 at once need about .* use --together 1, a smaller --batch"
    ):
        small_run(packs, tmp_path / "out", k="2,4")
    monkeypatch.undo()
    monkeypatch.setattr(train.plan.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StoreError, match="1 KB are free on that disk: make room"):
        small_run(packs, tmp_path / "out", k="2,4")
    assert not (tmp_path / "out").exists()


def test_another_training_that_was_begun_there_is_refused_before_any_other_is_trained(
    packs: Packs, tmp_path: Path
) -> None:
    small_run(packs, tmp_path, sites="txt_0", rows=512)
    with pytest.raises(UsageError, match=r"--lr: there 0.005, asked for 0.1"):
        small_run(packs, tmp_path, sites="img_0,txt_0", rows=512, lr=0.1)
    assert not (tmp_path / "transcoder_img_0").exists()
