"""The report's page of steering: what three commands left, shown whole, linked, and refused where it does not belong."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from analyze.faithfulness import command as faithfulness
from analyze.faithfulness.settings import FaithfulnessSettings
from analyze.guided import command as guided_command
from analyze.guided.results import PICTURES, rates_table
from analyze.inputs import open_analysis
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.report.steering import VERSIONS, check_steering, planned
from analyze.report.steering_experiments import Names, figure, picture_bytes, slug_of, variant_parts
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.steering import command as steer
from analyze.steering import results
from analyze.steering.settings import SteerSettings
from store import open_store
from store.errors import DamagedError, ForeignError, MismatchError, UnfinishedError, UsageError
from store.files import write_json
from store.tables import write_table

SITES = "img_1,txt_1"


def guided_folder(out: Path, store: Path, dictionaries: dict[str, str]) -> Path:
    """What `analyze guided` leaves, of pictures of which so many are made up to have changed."""
    same: dict[str, Any] = {
        "value": "red", "prompt": "a red ring", "own_strength": False, "strength": 3.0, "features": 2, "asked": True, "lost": False,
        **{name: True for name in PICTURES.names if name.startswith("kept_")},
        **{name: ["x"] for name in PICTURES.names if name.startswith(("plain_", "read_"))},
    }  # fmt: skip
    rows = [
        {**same, "image": image, "seed": image, "arm": arm, "changed": image < changed}
        for arm, changed in (("circuit", 9), ("single", 2))
        for image in range(10)
    ]
    write_table(out / "rates.parquet", rates_table([pa.Table.from_pylist(rows, schema=PICTURES)], "colour"))
    (out / "values").mkdir()
    Image.new("RGB", (300, 200), "red").save(out / "values" / "red.png")
    model = open_store(store).meta.model
    settings = {
        "attribute": "colour", "mode": "invert", "strength": 3.0, "steps": "all", "tokens": "all", "by": "txt",
    }  # fmt: skip
    circuits = {"red": {"graphs": 3, "targets": ["img_1:5"], "features": ["txt_1:7", "img_0:3"]}}
    record = {"format": "granary guided steering", "version": 2, "model": model, "dictionaries": dictionaries}
    write_json(out / "run.json", {**record, "settings": settings, "circuits": circuits})
    return out


@pytest.fixture(scope="module")
def settings(traced_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> ReportSettings:
    """A report over small results of all three commands."""
    folder = tmp_path_factory.mktemp("steered")
    store, dictionaries = traced_flux / "store", traced_flux / "dictionaries"
    inputs = {"store": store, "dictionaries": dictionaries, "out": folder / "analysis", "sites": SITES}
    scores.run(ScoresSettings(**inputs, workers=1, top=3))
    steer.run(
        SteerSettings(
            store=store,
            dictionaries=dictionaries,
            out=folder / "steer",
            images="0-1",
            strengths="1,8",
            edit=("amplify img_1:3,5 @steps=1 @tokens=above:0.5", "zero img_0:2"),
            name="More <of> it",
            clip="none",
        )
    )
    faithfulness.run(
        FaithfulnessSettings(
            store=store,
            dictionaries=(dictionaries,),
            out=folder / "faith",
            images="0",
            sites="img_1",
            scope="site",
            exact=1,
        )
    )
    named = {subject.outline.name: subject.identity for subject in open_analysis(ReportSettings(**inputs)).subjects}
    guided_folder(folder / "guided", store, named)
    return ReportSettings(
        **inputs,
        best=1,
        top=2,
        heat_features=1,
        steering=(folder / "steer", folder / "guided"),
        faithfulness=folder / "faith",
    )


@pytest.fixture(scope="module")
def page(settings: ReportSettings) -> str:
    """The page of that report."""
    report.run(settings)
    return (settings.out / "report" / "steering.html").read_text()


def test_the_page_shows_every_variant_with_its_distances_and_what_the_judge_reads(
    page: str, settings: ReportSettings
) -> None:
    table = pq.read_table(settings.steering[0] / "results.parquet")
    assert "More &lt;of&gt; it" in page and "2 shots, plain and 2 variants" in page and "24 transformer runs" in page
    assert "at steps 1 at tokens above:0.5" in page and "What the judge reads" in page
    for name in ("strength 1", "strength 8"):
        psnr = table.filter(pa.compute.equal(table["variant"], name))["psnr"].to_numpy()
        row = re.search(rf'<tr><th scope="row">{name}</th><td class="num">([^<]+)</td>', page)
        assert row is not None and row[1] == figure("psnr", float(np.median(psnr)))
    assert all(f'alt="{prompt}, seed' in page for prompt in set(table["prompt"].to_pylist()))


def test_the_page_compares_the_arms_and_says_which_reaches_the_goal(page: str) -> None:
    assert "Circuit wins: 90 % of 10 pictures have another colour and the same shape and position; single 20 %." in page
    circuit, single = (re.search(rf'<th scope="row">{arm}<.*?</tr>', page, re.DOTALL) for arm in ("circuit", "single"))
    assert circuit is not None and single is not None
    changed = '<td class="num reached"><b>90 %</b><small>60–98</small></td>'  # Wilson's interval of 9 of 10
    assert changed in circuit[0] and '<td class="num"><b>20 %</b>' in single[0]


def test_features_are_linked_where_the_report_shows_their_dictionary(page: str) -> None:
    assert '<a href="index.html#/feature/img_1/1/3">3</a>' in page  # at the step of the edit
    assert '<a href="index.html#/feature/txt_1/0/7">txt_1:7</a>' in page
    assert "zero img_0: 2" in re.sub(r"\s+", " ", page) and "#/feature/img_0" not in page  # not in this report


def test_the_page_shows_faithfulness_with_its_plots(page: str, settings: ReportSettings) -> None:
    assert settings.faithfulness is not None
    found = pq.read_table(settings.faithfulness / "faithfulness.parquet").to_pylist()
    assert all(row["group"] in page for row in found) and "img_1 alone" in page
    assert "With errors added back the final latents differ from the plain ones by" in page
    plots = [path.name for path in settings.faithfulness.glob("*.png")]
    assert plots and all(f"pictures/steering/faithfulness/{name}" in page for name in plots)


def test_everything_that_the_page_names_is_there_and_it_is_linked(page: str, settings: ReportSettings) -> None:
    folder = settings.out / "report"
    targets = set(re.findall(r'(?:href|src)="([^"]+)"', page))
    assert len(targets) > 10
    for target in targets:
        assert not re.match(r"(https?:)?//", target), target
        if target.startswith("#"):
            assert target == "#main" or f'id="{target[1:]}"' in page
        elif not target.startswith("data:"):
            assert (folder / target.partition("#")[0]).is_file(), target
    assert '<a href="steering.html">Steering</a>' in (folder / "index.html").read_text()
    with Image.open(folder / "pictures/steering/more-of-it/0001-00.webp") as shown:
        plain = np.asarray(shown.convert("RGB"))
    with Image.open(sorted((settings.steering[0] / "pictures" / "0001").glob("00-*.png"))[0]) as kept:
        assert (np.asarray(kept.convert("RGB")) == plain).all()  # small pictures lose nothing


def test_the_page_is_the_same_bytes_again_and_goes_with_a_report_without_it(
    page: str, settings: ReportSettings, tmp_path: Path
) -> None:
    folder = settings.out / "report"
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    files, size = planned(settings.steering, settings.faithfulness)
    mine = [path for path in before if "steering" in str(path.relative_to(folder))]
    assert files == len(mine) and size > 0
    moved = tmp_path / "elsewhere"
    shutil.copytree(settings.steering[0], moved)
    report.run(replace(settings, steering=(moved, settings.steering[1])))
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    report.run(replace(settings, steering=(), faithfulness=None))
    assert not any(path.exists() for path in mine)
    assert "steering.html" not in (folder / "index.html").read_text()


def changed_record(place: Path, out: Path, **changes: Any) -> Path:
    """A copy of results whose record says something else."""
    shutil.copytree(place, out)
    write_json(out / "run.json", {**json.loads((out / "run.json").read_text()), **changes})
    return out


def test_what_does_not_belong_is_refused_before_a_report_is_touched(
    page: str, settings: ReportSettings, tmp_path: Path
) -> None:
    steered, guided = settings.steering
    store = open_store(settings.store)
    other = changed_record(steered, tmp_path / "other", model={"weights_sha256": {"transformer": "0" * 64}})
    newer = changed_record(guided, tmp_path / "newer", version=9)
    begun = changed_record(steered, tmp_path / "begun")
    (begun / "results.parquet").unlink()
    wrong: list[tuple[tuple[Path, ...], Path | None, type[Exception], str]] = [
        ((tmp_path / "nowhere",), None, UsageError, "there is no run.json; give what analyze steer or analyze guided"),
        ((settings.faithfulness or tmp_path,), None, UsageError, "holds granary faithfulness: give what analyze steer"),
        ((), steered, UsageError, "--faithfulness .* holds granary steering: give what analyze faithfulness"),
        ((other,), None, MismatchError, "made with another model"),
        ((newer,), None, ForeignError, "version 9"),
        ((begun,), None, UnfinishedError, "not finished, results.parquet is not there yet"),
    ]
    for steering, faith, error, said in wrong:
        with pytest.raises(error, match=said):
            check_steering(steering, faith, store)
    index = settings.out / "report" / "index.html"
    before = index.read_bytes()
    with pytest.raises(MismatchError):
        report.run(replace(settings, steering=(other,)))
    assert index.read_bytes() == before


def test_the_formats_that_are_read_are_those_that_are_written() -> None:
    written = {
        results.FORMAT: results.VERSION,
        guided_command.FORMAT: guided_command.VERSION,
        faithfulness.RUN_FORMAT: faithfulness.RUN_VERSION,
    }
    assert written == VERSIONS


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(DamagedError, match=r"x\.png cannot be read"):
        picture_bytes(tmp_path / "x.png", 64)
    Image.new("RGB", (400, 200)).save(tmp_path / "large.png")
    (tmp_path / "large.webp").write_bytes(picture_bytes(tmp_path / "large.png", 256))
    with Image.open(tmp_path / "large.webp") as shown:
        assert shown.size == (256, 128)


def test_names_are_told_apart_and_streams_that_are_off_are_said() -> None:
    taken: set[str] = set()
    assert [slug_of(name, taken) for name in ("Red!", "red", "…")] == ["red", "red-2", "experiment"]
    variant = {"off": [{"stream": "txt", "layers": [0, 1, 2], "steps": [0], "parts": ["mlp"]}], "splice": ["img_3"]}
    parts = variant_parts(variant, {}, Names({}, (0,)))
    assert [part["before"] for part in parts] == [
        "txt stream off in blocks 0-2 (mlp) at steps 0",
        "the dictionary of img_3 in the place of its MLP",
    ]
    two = {
        "edits": [{"mode": "zero", "site": "img_2", "kind": "sae", "features": [5]}],
        "splice": ["img_3", "sae_txt_0"],
    }
    edit, spliced = variant_parts(two, {"dictionaries": {"sae_img_2": "a", "transcoder_img_2": "b"}}, Names({}, (0,)))
    assert edit["before"] == "zero sae_img_2:"
    assert spliced["before"] == "the dictionaries of img_3, sae_txt_0 in the place of their MLPs"
    near = [figure("ssim", value) for value in (0.9912, 0.99951, 0.9999998, 1 - 1e-9, 1.0)]
    assert near == ["0.991", "0.9995", "0.9999998", "0.999999999", "equal"]
    assert [figure("psnr", value) for value in (20.04, np.inf, np.nan)] == ["20.0", "equal", "–"]
