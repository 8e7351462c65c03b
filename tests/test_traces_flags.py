"""What `harvest --trace` is told: what cannot be traced is said first, and what is left open is written down."""

import json
from pathlib import Path

import pytest

from harvest import HarvestSettings
from harvest.runs import restored
from harvest.settings import OF_TRACES
from store import UsageError
from tests.test_harvest import command
from tests.test_traces import TRACE, harvest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trace_images": " "}, "--trace-images is empty: write numbers and ranges such as 0-3,7, or all, or leave"),
        ({"trace_blocks": "0-99"}, "--trace-blocks 0-99: there is no block 5-99; tiny-flux has double blocks 0 to 4$"),
        ({"trace_images": "3-5"}, "--trace-images 3-5: there is no image 5: there are 5.*--images"),
        (
            {"trace_images": "0-99999999999"},
            "--trace-images 0-99999999999: there is no image 5-99999999999: there are 5",
        ),
        ({"trace_images": "x"}, "--trace-images x: 'x' .*is no image"),
        ({"trace_steps": "2"}, "--trace-steps 2: there is no step 2"),
        ({"trace_steps": "0-1", "steps": "1"}, r"--trace-steps 0-1: step 0 is not harvested, only 1 are \(--steps\)"),
        ({"trace_blocks": "1-2"}, "--trace-blocks 1-2: .*from 0 without a gap: write --trace-blocks 0-2"),
        ({"trace_blocks": "0-40"}, "--trace-blocks 0-40: there is no block .*tiny-flux has double blocks 0 to"),
        ({"trace_blocks": "single:0-3"}, "only double blocks can be traced"),
        (
            {"layers": "single:0"},
            "only single ones are harvested; .*say which with --trace-blocks 0-4, or leave --trace out",
        ),
    ],
)
def test_what_cannot_be_traced_is_said_before_anything_is_written(
    tmp_path: Path, options: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        harvest(tmp_path / "store", **{**TRACE, **options})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", OF_TRACES)
def test_flags_of_traces_want_trace(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} says what to trace: give --trace as well"):
        HarvestSettings(plan=True, **{name: "float32" if name == "trace_dtype" else "0"})  # type: ignore[arg-type]


def test_the_command_line_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", str(tmp_path / "store"), "--trace-images", "0") == 2
    assert "give --trace as well" in capsys.readouterr().err


def test_blocks_beyond_the_layers_can_be_traced_and_defaults_are_written_down(tmp_path: Path) -> None:
    store = harvest(
        tmp_path / "store", images=2, layers="0", streams="img", steps="1", trace=True, trace_blocks="0-1",
        trace_dtype="bfloat16",
    )  # fmt: skip
    assert store.traced is not None
    assert store.traced.text() == "images 0-1 at step 1, blocks 0-1, bfloat16"
    found = store.trace_block(1, 1, 1)
    assert found["mlp_in.txt"].shape[0] == 16 and found["mlp_in.img"].shape[0] == 48
    again = restored(HarvestSettings(resume=tmp_path / "store"))
    assert (again.trace, again.trace_images, again.trace_blocks) == (True, "0-1", "0-1")
    facts = json.loads((tmp_path / "store" / "zarr.json").read_bytes())["attributes"]["granary"]["traces"]
    assert (facts["images"], facts["steps"], facts["blocks"], facts["dtype"]) == ("0-1", [1], [0, 1], "bfloat16")
