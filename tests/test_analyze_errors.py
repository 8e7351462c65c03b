"""Whatever cannot give a meaningful result is refused with a sentence that says what to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from analyze.__main__ import main
from analyze.inputs import open_analysis
from analyze.pictures import sheets
from analyze.pictures.settings import SheetSettings
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings
from store.errors import DamagedError, ForeignError, GranaryError, MismatchError, UsageError
from store.files import write_json
from tests.analyze_planted import MODEL, Plan, planted_dictionaries, planted_store, reading_dictionary
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.config import Parent

PLAN = Plan(n_images=6, steps=1, chunk_images=4)


@dataclass
class Case:
    """A store with dictionaries and an output folder, and the settings that point to them."""

    folder: Path
    plan: Plan = field(default_factory=lambda: PLAN)

    def __post_init__(self) -> None:
        planted_store(self.folder / "store", self.plan)
        planted_dictionaries(self.folder / "dictionaries", self.plan)

    def where(self, **more: Any) -> dict[str, Any]:
        return {
            "store": self.folder / "store",
            "dictionaries": self.folder / "dictionaries",
            "out": self.folder / "out",
            **more,
        }


def test_a_dictionary_of_a_site_that_the_store_lacks(tmp_path: Path) -> None:
    case = Case(tmp_path)
    save_dictionary(tmp_path / "dictionaries" / "transcoder_img_7", reading_dictionary("img_7"), None, [])
    with pytest.raises(MismatchError, match=r"img_7, which store .*store has not; it has img_0, txt_0"):
        scores.run(ScoresSettings(**case.where()))
    scores.run(ScoresSettings(**case.where(sites="img_0,txt_0")))  # the others can be chosen


def test_a_dictionary_of_another_width(tmp_path: Path) -> None:
    case = Case(tmp_path)
    save_dictionary(tmp_path / "other" / "transcoder_img_0", reading_dictionary("img_0", d_model=16), None, [])
    with pytest.raises(MismatchError, match=r"d_model 16, the activations of store .*store have 32"):
        scores.run(ScoresSettings(**case.where(dictionaries=tmp_path / "other")))


def test_a_dictionary_trained_on_another_model(tmp_path: Path) -> None:
    planted_store(tmp_path / "store", PLAN)
    other = {**MODEL, "weights_sha256": {"transformer": "cd" * 32}}
    planted_dictionaries(tmp_path / "dictionaries", PLAN, parent=Parent("sha256-p", "sha256-s", other))
    with pytest.raises(
        MismatchError, match=r"planted \(transformer cdcd.*is of planted \(transformer abab.*another model"
    ):
        scores.run(
            ScoresSettings(store=tmp_path / "store", dictionaries=tmp_path / "dictionaries", out=tmp_path / "out")
        )
    planted_dictionaries(tmp_path / "same", PLAN, parent=Parent("sha256-p", "sha256-s", MODEL))
    scores.run(ScoresSettings(store=tmp_path / "store", dictionaries=tmp_path / "same", out=tmp_path / "out"))


def test_selections_that_choose_nothing(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(UsageError, match="has no img_5"):
        scores.run(ScoresSettings(**case.where(sites="img_5")))
    with pytest.raises(UsageError, match="there is no step 3"):
        scores.run(ScoresSettings(**case.where(steps="3")))
    with pytest.raises(UsageError, match="names no sites"):
        scores.run(ScoresSettings(**case.where(sites="everything")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no dictionary"):
        scores.run(ScoresSettings(**case.where(dictionaries=tmp_path / "empty")))


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(ForeignError, match="no store at"):
        scores.run(ScoresSettings(**case.where(store=tmp_path / "nowhere")))


def test_an_output_folder_that_holds_another_run(tmp_path: Path) -> None:
    case = Case(tmp_path)
    scores.run(ScoresSettings(**case.where()))
    with pytest.raises(UsageError, match="holds another run"):
        scores.run(ScoresSettings(**case.where(padding=True)))
    save_dictionary(tmp_path / "changed" / "transcoder_img_0", reading_dictionary("img_0", seed=5), None, [])
    with pytest.raises(MismatchError, match="scores of another dictionary: transcoder_img_0"):
        scores.run(ScoresSettings(**case.where(dictionaries=tmp_path / "changed")))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to mother.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds no analysis: choose another --out"):
        scores.run(ScoresSettings(**case.where(out=tmp_path / "letters")))


def test_results_that_are_not_there_yet(tmp_path: Path) -> None:
    case = Case(tmp_path)
    for run, settings in ((truth.run, TruthSettings), (sheets.run, SheetSettings), (report.run, ReportSettings)):
        with pytest.raises(UsageError, match="run python -m analyze scores"):
            run(settings(**case.where()))
    scores.run(ScoresSettings(**case.where(sites="img_0")))
    with pytest.raises(UsageError, match=r"no scores in .*txt_0"):
        report.run(ReportSettings(**case.where()))


def test_a_store_without_pictures_has_no_sheets_of_image_features(tmp_path: Path) -> None:
    case = Case(tmp_path, Plan(n_images=6, steps=1, pictures=False))
    scores.run(ScoresSettings(**case.where()))
    with pytest.raises(UsageError, match="holds no pictures"):
        sheets.run(SheetSettings(**case.where()))
    assert sheets.run(SheetSettings(**case.where(sites="txt_0")))


def test_a_store_without_truth_has_no_truth_table_but_a_report(tmp_path: Path) -> None:
    case = Case(tmp_path, Plan(n_images=6, steps=1, truth=False))
    scores.run(ScoresSettings(**case.where()))
    with pytest.raises(UsageError, match="builtin:shapes"):
        truth.run(TruthSettings(**case.where()))
    made = report.run(ReportSettings(**case.where(best=2)))
    assert len(made.findings) == 4
    assert "Truth table" not in made.index.read_text().split("<main")[0]


def test_more_images_than_were_kept_and_features_that_do_not_exist(tmp_path: Path) -> None:
    case = Case(tmp_path)
    scores.run(ScoresSettings(**case.where(top=4)))
    with pytest.raises(UsageError, match="keeps 4 top images"):
        sheets.run(SheetSettings(**case.where(top=8)))
    with pytest.raises(UsageError, match="there is no feature 48"):
        sheets.run(SheetSettings(**case.where(features="3,48", top=4)))


def test_damaged_results_are_not_shown(tmp_path: Path) -> None:
    case = Case(tmp_path)
    scores.run(ScoresSettings(**case.where()))
    table = tmp_path / "out" / "img_0" / "step.0" / "features.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(DamagedError, match="compute it again"):
        report.run(ReportSettings(**case.where()))
    write_json(tmp_path / "out" / "run.json", {"format": "something else"})
    with pytest.raises(ForeignError, match="not the record of an analysis"):
        report.run(ReportSettings(**case.where()))


def test_a_flipped_bit_in_a_score_matrix_is_found(tmp_path: Path) -> None:
    case = Case(tmp_path)
    scores.run(ScoresSettings(**case.where()))
    chunk = next(
        path for path in sorted((tmp_path / "out" / "img_0" / "step.0" / "scores" / "c").rglob("*")) if path.is_file()
    )
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(bytes(data))
    analysis = open_analysis(Inputs(**case.where()))
    with pytest.raises(DamagedError, match="is damaged"):
        analysis.matrix(analysis.subjects[0], 0).scores()


@pytest.mark.parametrize("words", [["--top", "0"], ["--padding", "7"], ["--nonsense"]])
def test_the_command_line_ends_with_2_for_wrong_flags(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["scores", "--store", "s", "--dictionaries", "d", "--out", str(tmp_path / "o"), *words]
    assert main(flags) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_line_gives_1_or_2_with_one_message_and_0_when_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path)
    flags = [word for key, value in case.where().items() for word in (f"--{key}", str(value))]
    assert main(["truth", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "python -m analyze scores" in error
    assert main(["scores", *flags]) == 0
    assert main(["scores", *flags[2:], "--store", str(tmp_path / "no")]) == 1
    assert main(["paint"]) == 2


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (TruthSettings, {"threshold": 0.4}), (TruthSettings, {"seed": -1}), (SheetSettings, {"best": 0}), (ReportSettings, {"top": 0}),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_when_they_are_made(
    settings: type[Any], options: dict[str, Any]
) -> None:
    with pytest.raises(GranaryError):
        settings(store=Path("s"), dictionaries=Path("d"), out=Path("o"), **options)
