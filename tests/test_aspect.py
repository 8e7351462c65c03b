"""A picture that is wider than high: the same grid in harvest, pack, scores and overlays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from analyze.pictures.overlay import token_grid
from analyze.pictures.settings import SheetSettings
from analyze.pictures.sheets import run as sheet
from analyze.scoring.scores import run as scores
from analyze.scoring.settings import ScoresSettings
from harvest import HarvestSettings, run
from harvest.planning.plan import make_plan
from store import Site, Store, open_store
from store.care.verify import verify
from store.pack import PackSettings
from store.pack import run as pack
from store.shards import open_pack
from tests.small_models import flux_dev
from tests.traced_tiny_flux import transcoder
from train.dictionaries.checkpoint import save_dictionary

ROWS, COLUMNS = 8, 12
SITE = Site.parse("img_1")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = flux_dev(tmp_path_factory.mktemp("wide") / "model")
    return {
        "model": str(model), "prompts": "builtin:shapes", "images": 24, "batch_size": 12, "height": 8 * ROWS, "width": 8 * COLUMNS,
        "max_sequence_length": 16, "num_inference_steps": 1, "guidance": 0.0, "layers": "1", "streams": "img", "threads": 1,
        "store_dtype": "float32",
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(asked: dict[str, Any]) -> Store:
    out = Path(asked["model"]).parent / "store"
    run(HarvestSettings(out=out, **asked))
    return open_store(out)


def test_tokens_are_the_grid_row_by_row_as_the_transformer_has_them(asked: dict[str, Any], store: Store) -> None:
    verify(store.path)
    assert store.meta.grid == (ROWS, COLUMNS) and store.meta.tokens["img"].total == ROWS * COLUMNS
    picture = store.picture(0)
    assert picture is not None and picture.size == (8 * COLUMNS, 8 * ROWS)
    ids: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []

    def step_ended(_step: int, taken: Any) -> None:
        ids.append(taken.inputs["img_ids"])
        rows.append(taken.values[SITE, "mlp_in"])

    plan = make_plan(HarvestSettings(plan=True, **asked))
    batch = range(12)
    plan.sampler.draw([plan.prompts.prompts[i].text for i in batch], [*batch], step_ended)
    expected = [(0, row, column) for row in range(ROWS) for column in range(COLUMNS)]
    assert ids[0].tolist() == [list(map(float, each)) for each in expected]
    np.testing.assert_array_equal(store.read(SITE, 0, "mlp_in", 0, 12), rows[0].numpy())


def test_pack_scores_and_overlays_have_the_same_grid(store: Store, tmp_path: Path) -> None:
    made = pack(PackSettings(store=store.path, out=tmp_path / "pack", memory="100MB"))
    assert made is not None
    tokens = [shard.columns("token")["token"] for shard in open_pack(tmp_path / "pack").shards(SITE)]
    assert sorted(set(np.concatenate(tokens).tolist())) == list(range(ROWS * COLUMNS))
    dictionary = transcoder(str(SITE), store.meta.d_model, 24)
    save_dictionary(tmp_path / "d" / dictionary.name, dictionary, None, [])
    given: dict[str, Any] = {"store": Path(store.path), "dictionaries": tmp_path / "d"}
    scores(ScoresSettings(**given, out=tmp_path / "a"))
    values = torch.from_numpy(store.read(SITE, 0, "mlp_in", 0, store.n_images).astype(np.float32))
    sigma = torch.from_numpy(np.array(store.prompt_columns("sigma").column("sigma").to_pylist(), np.float32))[:, 0]
    with torch.no_grad():
        z = torch.stack([dictionary.encode(v, s.expand(len(v))) for v, s in zip(values, sigma, strict=True)]).numpy()
    where = zarr.open_array(tmp_path / "a" / str(SITE) / "step.0" / "argmax_token", mode="r")[:]
    live = z.max(1) > 0
    np.testing.assert_array_equal(np.asarray(where)[live], z.argmax(1)[live])
    image, feature = np.unravel_index(z.max(1).argmax(), live.shape)
    heat = token_grid(z[image, :, feature], np.arange(ROWS * COLUMNS), store.meta.grid)
    row, column = divmod(int(z[image, :, feature].argmax()), COLUMNS)
    assert heat.shape == (ROWS, COLUMNS) and heat[row, column] == heat.max()
    drawn = sheet(SheetSettings(**given, out=tmp_path / "a", sites=str(SITE), features=str(feature)))
    with Image.open(drawn[0]) as picture:
        assert picture.width > picture.height / 4
