"""The report's files: they say what was run, hold each thing once, and depend on nothing but the results."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float

import tests.analyze_planted as planted
from analyze.inputs import open_analysis
from analyze.labels.book import LabelBook
from analyze.pictures.heat import heats
from analyze.prompts import prompt_texts
from analyze.report import building as report
from analyze.report.building import Report
from analyze.report.libraries import classic_script
from analyze.report.packing import packed_heat, unpacked_heat
from analyze.report.planning import Plan as ReportPlan
from analyze.report.settings import ReportSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings
from store.errors import UsageError
from tests.analyze_planted import Plan, planted_dictionaries, planted_store
from tests.synthetic_analysis import synthetic_analysis

METRICS: dict[str, Any] = {
    "fvu": 0.08, "l0": 3.1, "density": 0.065, "dead": 0.02, "cosine": 0.97, "rows": 900,
    "steps": {"0": {"fvu": 0.08}}, "pack": "sha256-x", "split": "val",
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A report and the settings that made it."""

    report: Report
    settings: ReportSettings

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.report.index.parent

    def files(self) -> dict[str, bytes]:
        """Everything in its folder."""
        return {
            p.relative_to(self.folder).as_posix(): p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()
        }

    def value(self, name: str) -> Any:
        """What `data/NAME.js` hands over."""
        text = (self.folder / "data" / f"{name}.js").read_text()
        match = re.fullmatch(r'granary\.take\("([^"]+)",(.*)\);\n', text, re.DOTALL)
        assert match is not None
        assert match[1] == name
        return json.loads(match[2])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    plan = Plan(n_images=120, noise=0.8, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "METRICS", METRICS)
        planted_store(folder / "store", plan)
        planted_dictionaries(folder / "dictionaries", plan)
    inputs = {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out"}
    scores.run(ScoresSettings(**inputs))
    truth.run(TruthSettings(**inputs, images="all"))
    return made_with(ReportSettings(**inputs, best=3, top=3, title="What <b>planted</b> features see"))


def made_with(settings: ReportSettings) -> Made:
    written = report.run(settings)
    assert isinstance(written, Report)
    return Made(written, settings)


def test_the_report_says_what_was_run_and_escapes_what_it_is_given(made: Made) -> None:
    page = made.report.index.read_text()
    assert "What &lt;b&gt;planted&lt;/b&gt; features see" in page
    assert "120 of 72 × 48 pixels (width × height), 9 × 6 image tokens" in page
    assert "0.080" in page  # FVU of the dictionaries
    assert re.search(r"img: \d+ of \d+ attributes have a feature", page)


def test_everything_that_the_page_names_is_there_and_nothing_comes_from_elsewhere(made: Made) -> None:
    page = made.report.index.read_text()
    targets = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(targets) > 40
    for target in targets:
        assert not re.match(r"(https?:)?//", target), target
        if not target.startswith(("#", "data:")):
            assert (made.folder / target).is_file(), target
    names = {subject["name"]: subject["features"] for subject in made.value("report")["dictionaries"]}
    for dictionary, step, feature in re.findall(r'href="#/feature/(\w+)/(\d+)/(\d+)"', page):
        assert int(feature) < names[dictionary]
        assert step == "0"
    for name in ("LICENSE-bokeh.txt", "LICENSE-itables.txt"):
        assert "Copyright" in (made.folder / "libraries" / name).read_text()


def test_the_report_is_the_same_bytes_again_after_another_and_after_one_that_was_not_finished(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    first = made.files()
    foreign = made.folder / "pictures" / "000" / "for-my-talk.webp"
    foreign.write_bytes(b"not the report's")
    other = made_with(replace(made.settings, top=1, heat_features=0))
    assert other.report.files < len(first)
    assert foreign.exists()
    foreign.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_images", fails)
        with pytest.raises(KeyboardInterrupt):
            report.run(made.settings)
    assert not made.report.index.exists()  # nothing that could be opened
    report.run(made.settings)
    assert made.files() == first


def test_the_five_findings_are_sentences_with_their_numbers(made: Made) -> None:
    assert len(made.report.findings) == 5
    for finding in made.report.findings:
        assert re.match(r"(img|txt)_0/\d+ at step \d+ fires on .+: AUROC [01]\.\d\d over images", finding), finding
    assert any("object tokens" in finding for finding in made.report.findings)


def test_examples_hold_the_figures_of_the_tables_and_the_heat_of_the_store(made: Made) -> None:
    analysis = open_analysis(made.settings)
    subject = analysis.subjects[0]
    table = analysis.matrix(subject, 0).features().to_pylist()
    written = made.value(f"examples/{subject.name}/step.0/0")
    alive = [row["feature"] for row in table if row["alive"]]
    drawn = heats(analysis, subject, 0, {feature: table[feature]["unique_image"][:3] for feature in alive})
    for feature in alive:
        row = table[feature]
        assert written["figures"]["frac_nonzero"][feature] == pytest.approx(row["density"], rel=1e-3)
        assert written["figures"]["maxActApprox"][feature] == pytest.approx(row["max"], rel=1e-3)
        first, *counts = written["freq_hist_data_bar_heights"][feature]
        assert counts == row["histogram"][first : first + len(counts)]
        assert sum(counts) == row["rows_active"]
        assert written["activations"]["image"][feature] == row["unique_image"][:3]
        assert written["activations"]["maxValueTokenIndex"][feature] == row["unique_token"][:3]
        for text, heat in zip(written["heat"][str(feature)], drawn[feature], strict=True):
            peak, levels = text.split(" ")
            values = np.zeros(54, np.float32)
            values[heat.positions] = heat.values
            assert np.abs(unpacked_heat(levels, float(peak), 54) - values).max() <= values.max() / 255 * 0.51


def test_features_that_attributes_chose_say_so_with_their_scores(made: Made) -> None:
    rows = json.loads((made.folder.parent / "truth.json").read_text())["attributes"]
    red = next(row for row in rows if (row["group"], row["value"]) == ("colour", "red"))["streams"]["img"]["images"]
    entries = made.value(f"examples/img_0/step.0/{red['feature'] // 64}")["stands_for"][str(red["feature"])]
    found = next(each for each in entries if each["value"] == "red")
    assert found["image_auroc"] == pytest.approx(red["auroc"])
    assert found["heat_inside"] > 0.5  # it was planted on the objects
    assert "colour red" in made.value("tables/img_0/step.0")["stands_for"][str(red["feature"])]


def test_labels_are_in_the_report_and_in_its_sentences(made: Made) -> None:
    from datetime import UTC, datetime

    finding = made.report.findings[0]
    name, feature = re.match(r"(\w+)/(\d+)", finding).groups()  # type: ignore[union-attr]
    subject = next(s for s in open_analysis(made.settings).subjects if s.name == name)
    book = LabelBook.of(subject)
    book.set(int(feature), "what <i>I</i> saw", "ada", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    book.save()
    again = made_with(made.settings)
    assert again.report.findings[0].startswith(f"{name}/{feature} · what <i>I</i> saw at step")
    assert "what &lt;i&gt;I&lt;/i&gt; saw" in again.report.index.read_text()
    expected = [{"feature": int(feature), "text": "what <i>I</i> saw", "author": "ada", "time": "2026-01-02T03:04:05Z"}]
    assert again.value("labels")[name] == expected


def test_a_report_of_bare_results_opens_too(tmp_path: Path) -> None:
    plan = Plan(n_images=30, steps=2, sites=("img_0",), pictures=False, truth=False)
    bare = made_with(ReportSettings(**synthetic_analysis(tmp_path, plan, 20)))
    page = bare.report.index.read_text()
    assert "The store keeps no pictures" in page
    assert 'id="truth"' not in page
    assert not (bare.folder / "pictures").exists()
    assert "coherence" not in bare.value("tables/img_0/step.1")["numbers"]
    assert bare.value("report")["dictionaries"][0]["fvu_value"] is None


def test_a_users_own_truth_is_shown_as_the_known_one_is(tmp_path: Path) -> None:
    plan = Plan(n_images=120, steps=1, sites=("img_0",), truth=False)
    store = planted_store(tmp_path / "store", plan)
    inputs = {
        "store": tmp_path / "store",
        "dictionaries": planted_dictionaries(tmp_path / "d", plan),
        "out": tmp_path / "out",
    }
    lines = [f"{image},{int('circle' in prompt)}" for image, prompt in enumerate(prompt_texts(store))]
    (tmp_path / "own.csv").write_text("image,ladybird\n" + "\n".join(lines) + "\n")
    scores.run(ScoresSettings(**inputs))
    truth.run(TruthSettings(**inputs, images="all", attributes=tmp_path / "own.csv"))
    own = made_with(ReportSettings(**inputs))
    assert own.report.findings[0].startswith("img_0/8 at step 0 fires on images that show ladybird: AUROC")
    assert "ladybird" in own.report.index.read_text()
    assert own.value("tables/img_0/step.0")["stands_for"]["8"] == "attribute ladybird"


def test_pictures_that_look_alike_are_stored_once(tmp_path: Path) -> None:
    plan = Plan(n_images=40, steps=1, sites=("img_0",), seeds_per_prompt=4, truth=False)
    twice = made_with(ReportSettings(**synthetic_analysis(tmp_path, plan, 20)))
    same = twice.value("report")["pictures"]["same"]
    kept = {int(path.stem) for path in twice.folder.glob("pictures/*/*.webp")}
    assert same
    assert kept.isdisjoint(map(int, same))
    assert set(same.values()) <= kept
    assert len(kept) == 10  # one a prompt: these stores draw what the prompt says


def test_the_plan_is_near_what_is_written_and_writes_nothing(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    plan = report.run(replace(made.settings, plan=True))
    assert isinstance(plan, ReportPlan)
    assert plan.files == pytest.approx(made.report.files, rel=0.1)
    assert plan.total == pytest.approx(made.report.bytes, rel=0.25)
    assert f"{plan.files:,} files" in capsys.readouterr().out


def test_without_a_limit_few_features_all_have_heat_and_a_limit_keeps_the_most_interesting(
    made: Made, tmp_path: Path
) -> None:
    plan = Plan(n_images=30, steps=1, sites=("img_0",), truth=False)
    settings = ReportSettings(**synthetic_analysis(tmp_path, plan, 40))
    assert len(heated(made_with(settings))) == len(alive(settings))
    assert heated(made_with(replace(settings, heat_features=5, best=1))) == set(alive(settings)[:5])
    assert heated(made_with(replace(settings, heat_features=0))) == set()


def heated(this: Made) -> set[int]:
    return set(map(int, this.value("examples/img_0/step.0/0").get("heat", {})))


def alive(settings: ReportSettings) -> list[int]:
    """Alive features, the most interesting first."""
    analysis = open_analysis(settings)
    table = analysis.matrix(analysis.subjects[0], 0).features()
    rows = table.filter(table["alive"]).sort_by([("interest", "descending"), ("feature", "ascending")])
    return list(rows["feature"].to_pylist())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"best": 0}, "at least 1 feature"),
        ({"heat_features": -1}, "say 0 for none"),
        ({"picture_side": 8}, "at least 32 pixels"),
        ({"similar": -2}, "say 0 for none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ReportSettings(store=tmp_path, dictionaries=tmp_path, out=tmp_path, **wrong)


@st.composite
def sparse_values(draw: st.DrawFn) -> Float[np.ndarray, " token"]:
    total = draw(st.integers(1, 700))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.gamma(1, 1, total).astype(np.float32)
    values[rng.random(total) > draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))] = 0
    return values


@given(sparse_values())
def test_packed_heat_is_within_half_a_level(values: Float[np.ndarray, " token"]) -> None:
    peak, text = packed_heat(values, np.arange(len(values)), len(values))
    assert peak == values.max()
    found = unpacked_heat(text, peak, len(values))
    assert np.abs(found - values).max() <= peak / 255 * 0.501
    assert len(text) <= 2 + 4 * -(-len(values) // 3)


def test_a_module_becomes_a_script_that_leaves_its_default_export() -> None:
    script = classic_script("var a=1,b=2;export{a as DataTable,b as default};\n/* licence */\n", "Table")
    assert script == "(() => {\nvar a=1,b=2;globalThis.Table=b;\n/* licence */\n\n})();\n"
    with pytest.raises(UsageError, match="does not end in one export"):
        classic_script("var a=1;", "Table")
