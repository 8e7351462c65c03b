"""`all`: every part that the store allows, the others left out with their reason, and the same command goes on."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze import everything
from analyze.settings import AllSettings
from store.errors import ForeignError, UsageError
from tests.analyze_planted import Plan, planted_dictionaries, planted_store
from tests.object_server import tree

PLAN = Plan(n_images=48, steps=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with pictures and a truth, its dictionaries, and embeddings of its pictures."""
    folder = tmp_path_factory.mktemp("everything")
    planted_store(folder / "store", PLAN)
    planted_dictionaries(folder / "dictionaries", PLAN)
    np.save(folder / "embeddings.npy", np.random.default_rng(0).standard_normal((PLAN.n_images, 8)))
    return folder


def settings(made: Path, out: Path, **more: Any) -> AllSettings:
    return AllSettings(**{"store": made / "store", "dictionaries": made / "dictionaries", "out": out, **more})


def test_all_parts_run_and_the_same_command_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(made, tmp_path / "out", embeddings=str(made / "embeddings.npy"), images="all")
    first = everything.run(asked)
    assert first.left_out == {}
    assert (first.scores.computed, first.scores.found) == (2, 0)
    assert first.coherence is not None and first.truth is not None and first.report is not None
    assert first.report.index.exists()
    said = capsys.readouterr().out.split("all: ")[-1]
    assert "2 matrices (2 dictionaries x 1 steps) of 48 images" in said
    assert "unrelated pictures have" in said and "attributes have a feature" in said and "index.html" in said
    assert "left out" not in said
    before = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "txt_0")
    shutil.rmtree(tmp_path / "out" / "report")
    again = everything.run(asked)
    assert (again.scores.computed, again.scores.found) == (1, 1)
    assert tree(tmp_path / "out") == before


def test_a_part_that_the_store_does_not_allow_is_left_out_and_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(n_images=6, steps=1, pictures=False, truth=False, sites=("txt_0",))
    planted_store(tmp_path / "store", plan)
    dictionaries = tmp_path / "my dictionaries; true"
    planted_dictionaries(dictionaries, plan)
    found = everything.run(settings(tmp_path, tmp_path / "out", dictionaries=dictionaries))
    assert found.coherence is None and found.truth is None
    assert set(found.left_out) == {"coherence", "truth"}
    said = capsys.readouterr().out
    assert said.startswith("all: no coherence: ") and "holds no pictures to embed" in said.split("\n")[0]
    assert "truth      left out: what is in the pictures is known only in stores of --prompts builtin:shapes" in said
    assert f"label --dictionaries '{dictionaries}' " in said


def test_other_pictures_have_no_coherence_unless_a_clip_is_named(made: Path, tmp_path: Path) -> None:
    found = everything.run(settings(made, tmp_path / "out"))
    assert "--clip openai/clip-vit-base-patch32" in found.left_out["coherence"]
    assert "at least 20 images of held-out prompts" in found.left_out["truth"]  # the others are for training


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ({"clip": "HERE"}, ForeignError, "is no CLIP model"), ({"clip": "HERE/no"}, UsageError, "there is no such folder"),
        ({"embeddings": "HERE/no.npy"}, UsageError, "no.npy"),
        ({"top": 4}, UsageError, "--top-m is 10, and --top keeps 4"),
    ],
)  # fmt: skip
def test_what_is_asked_for_by_name_and_cannot_be_is_refused_before_scores_are_paid_for(
    made: Path, tmp_path: Path, asked: dict[str, Any], kind: type[Exception], message: str
) -> None:
    options = {
        key: value.replace("HERE", str(made)) if isinstance(value, str) else value for key, value in asked.items()
    }
    with pytest.raises(kind, match=message):
        everything.run(settings(made, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
