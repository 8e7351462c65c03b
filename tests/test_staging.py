"""What is staged is what a plain selection and a plain copy give, on every lane, and nobody touches what is still on its way."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harvest.capture import Rows, select_tokens
from harvest.lanes import Direct, Ring, Traffic, lane_of, squared_errors
from harvest.planning.live_memory import peak_bytes
from harvest.staging import Staging, as_tensor, slot_bytes, slots_of
from harvest.waiting import Waiting
from store.errors import GranaryError
from store.format import StoreMeta, StreamTokens
from store.tokens import kept_positions
from tests.small_store import small_meta

BATCH, IMAGES = 4, 10  # the last batch is short


class Late:
    """A device whose copies are done at the last moment: when somebody waits for them."""

    def __init__(self) -> None:
        self.begun = self.waited = 0

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, -1.0, dtype=dtype)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        self.begun += 1
        return pairs

    def wait(self, copied: Any) -> None:
        self.waited += 1
        for source, target in copied:
            target.copy_(source)

    def mark(self) -> int:
        return self.begun

    def passed(self, mark: int) -> bool:
        return mark < self.begun  # when its copy has begun


def meta_of(few: bool = True, **options: Any) -> StoreMeta:
    """Of `few` tokens some are drawn, and text slots stay empty."""
    tokens = {"image_tokens": StreamTokens("sample", 5, 12), "text_tokens": StreamTokens("real+1", 6, 8)} if few else {}
    places: dict[str, Any] = {"n_images": IMAGES, "sites": ("img_0", "img_2", "txt_0"), "chunk_images": 16}
    return small_meta(**{**places, **tokens, **options})


def positions_of(meta: StoreMeta) -> dict[Any, np.ndarray]:
    """Some slots of text tokens stay empty."""
    return {
        (stream, step): np.stack(
            [kept_positions(meta.tokens[stream], 0, image, step, stream, 2 + image % 4) for image in range(IMAGES)]
        )
        for stream in meta.streams
        if not meta.tokens[stream].all_kept
        for step in meta.steps
    }


def model_values(meta: StoreMeta, width: int, dtype: torch.dtype = torch.float32) -> dict[Any, Tensor]:
    """(site, step, point) -> (image, token, width) of all tokens, and of steps that are not kept as well."""
    rng = torch.Generator().manual_seed(0)
    return {
        (site, step, point): torch.randn(IMAGES, meta.tokens[site.stream].total, width, generator=rng).to(dtype)
        for site in meta.site_objects
        for step in range(meta.num_inference_steps)
        for point in ("mlp_in", "mlp_out")
    }


def staged(
    meta: StoreMeta,
    values: dict[Any, Tensor],
    lane: Direct | Ring | None,
    project: Tensor | None = None,
    parts: int = 1,
) -> tuple[Any, Any]:
    """What comes out of a staging that the values go through as a model computes them, the last time."""
    then = None if project is None else (lambda rows: rows @ project)
    with Staging(meta, lane=lane) as staging:
        for _ in range(parts):
            staging.begin(IMAGES, positions_of(meta))
            for first in range(0, IMAGES, meta.batch_size):
                count = min(meta.batch_size, IMAGES - first)
                staging.batch(first, count)
                for step in range(meta.num_inference_steps):
                    with torch.inference_mode():
                        for site in meta.site_objects:
                            for point in ("mlp_in", "mlp_out"):
                                source = values[site, step, point][first : first + count].clone()
                                staging.keep(site, point, Rows(source, then))
                                source.fill_(float("inf"))  # the model goes on and uses its memory again
                        staging.step_ended(step)
            result = staging.finish()
    return result


def plainly(meta: StoreMeta, values: dict[Any, Tensor], project: Tensor | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """The same, image by image."""
    arrays, errors, positions = {}, {}, positions_of(meta)
    for site in meta.site_objects:
        for step in meta.steps:
            for point in meta.points:
                value, kept = values[site, step, point], positions.get((site.stream, step))
                chosen = value if kept is None else torch.stack(
                    [select_tokens(value[i : i + 1], torch.from_numpy(kept[i : i + 1]).long())[0] for i in range(IMAGES)]
                )  # fmt: skip
                chosen = chosen if project is None else chosen @ project
                arrays[site, step, point] = chosen.to(dtype)
                lost = chosen.to(dtype).double() - chosen.double()
                errors[site, step, point] = float(lost.square().nansum())
    return arrays, errors


LANES: dict[str, Callable[[], Direct | Ring]] = {"direct": Direct, "ring": lambda: Ring(Late())}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "float32"])
def test_what_arrives_is_a_plain_selection_and_conversion(lane: str, few: bool, store_dtype: Any) -> None:
    meta = meta_of(few, store_dtype=store_dtype, steps=(1,) if few else (0, 1))
    values = model_values(meta, meta.d_model)
    arrays, errors = staged(meta, values, LANES[lane](), parts=2)
    expected, lost = plainly(meta, values, None, getattr(torch, store_dtype))
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        assert array.dtype == meta.carrier.logical and array.flags.c_contiguous
        np.testing.assert_array_equal(as_tensor(array).float().numpy(), expected[key].float().numpy())
        assert errors[key] == pytest.approx(lost[key], rel=1e-6) and (store_dtype != "float32") == (errors[key] > 0)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("few", [True, False])
def test_a_store_that_is_wider_than_the_model_computes_holds_its_values_exactly(lane: str, few: bool) -> None:
    meta = meta_of(few, store_dtype="float32")
    values = model_values(meta, meta.d_model, torch.bfloat16)
    arrays, errors = staged(meta, values, LANES[lane]())
    for key, expected in plainly(meta, values, None, torch.float32)[0].items():
        np.testing.assert_array_equal(arrays[key], expected.numpy())
    assert set(errors.values()) == {0.0}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("images", [1, 7, 64])
def test_errors_on_a_cpu_have_the_bits_of_those_on_a_device(few: bool, images: int) -> None:
    exact = torch.randn(images, 65, 128, generator=torch.Generator().manual_seed(0))
    if few:
        exact[:, 3] = float("nan")
    into = torch.empty_like(exact, dtype=torch.bfloat16)
    found = Direct().put(into, exact, few)
    assert [found] == squared_errors(into[None], exact[None]).tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("lane", LANES)
def test_rows_that_are_computed_from_a_wider_layer_are_computed_after_the_selection(lane: str) -> None:
    meta = meta_of(store_dtype="float32")
    project = torch.randn(7, meta.d_model, generator=torch.Generator().manual_seed(1))
    values = model_values(meta, 7)
    arrays, _ = staged(meta, values, LANES[lane](), project)
    for key, expected in plainly(meta, values, project, torch.float32)[0].items():
        np.testing.assert_allclose(arrays[key], expected.numpy(), atol=1e-5)
        np.testing.assert_array_equal(np.isnan(arrays[key]), np.isnan(expected.numpy()))


def test_points_and_steps_that_the_store_does_not_hold_are_not_even_looked_at() -> None:
    meta = meta_of()

    def refuse(_rows: Tensor) -> Tensor:
        raise AssertionError("computed for nothing")

    with Staging(meta) as staging:
        staging.begin(IMAGES, positions_of(meta))
        staging.batch(0, BATCH)
        staging._step = max(meta.steps) + 1
        staging.keep(meta.site_objects[0], "mlp_in", Rows(torch.empty(0), refuse))
        assert staging._slot is None


def test_a_site_that_did_not_come_by_is_found_before_old_rows_pass_for_its_own() -> None:
    meta = meta_of()
    values = model_values(meta, meta.d_model)
    with Staging(meta) as staging:
        staging.begin(IMAGES, positions_of(meta))
        staging.batch(0, meta.batch_size)
        for site in meta.site_objects[1:]:
            for point in meta.points:
                staging.keep(site, point, Rows(values[site, 0, point][: meta.batch_size]))
        with pytest.raises(AssertionError, match=r"step 0: 4 of 6 points of sites came by"):
            staging.step_ended(0)


def test_a_part_that_was_given_up_in_a_step_leaves_nothing_behind() -> None:
    meta = meta_of()
    values = model_values(meta, meta.d_model)
    with Staging(meta, lane=Ring(Late())) as staging:
        for _ in range(5):  # more often than there are slots
            staging.begin(IMAGES, positions_of(meta))
            staging.batch(0, meta.batch_size)
            site = meta.site_objects[0]
            staging.keep(site, "mlp_in", Rows(values[site, 0, "mlp_in"][: meta.batch_size]))
        assert staging._traffic._unmade == 1


def rounds(traffic: Traffic, count: int, taken: list[int]) -> None:
    for number in range(count):
        slot = traffic.take()
        taken.append(number)
        traffic.send(slot, number)
    traffic.drain()


def test_the_model_waits_for_a_free_slot_and_it_is_counted() -> None:
    gate, moved, taken, waited = threading.Semaphore(0), [], [], []  # type: ignore[var-annotated]

    def move(_slot: Any, number: int) -> None:
        assert gate.acquire(timeout=60)
        moved.append(number)

    traffic = Traffic(2, move, waited.append)
    model = threading.Thread(target=rounds, args=(traffic, 5, taken))
    model.start()
    end = time.monotonic() + 60
    while len(taken) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.05)
    assert taken == [0, 1] and moved == []  # both slots are on their way
    for _ in range(5):
        gate.release()
    model.join(60)
    traffic.close()
    assert moved == taken == [0, 1, 2, 3, 4] and sum(waited) >= 0.05


@pytest.mark.parametrize("looks", [0, 5])
def test_standing_still_while_the_device_computes_is_not_waiting_and_afterwards_it_is(looks: int) -> None:
    gate, waited, looked = threading.Event(), list[float](), list[bool]()

    def idle() -> bool:
        """For so many looks the device computes; then a slot is free, or, with no such look, a little later."""
        looked.append(True)
        if len(looked) == looks or not looks:
            threading.Timer(0.0 if looks else 0.05, gate.set).start()
        return not looks

    def move(*_: object) -> None:
        gate.wait(60)

    traffic = Traffic(1, move, waited.append, idle=idle)
    traffic.send(traffic.take(), None)
    traffic.take()
    traffic.close()
    assert (sum(waited) == 0 and len(looked) >= looks) if looks else sum(waited) >= 0.04


def test_a_ring_is_idle_when_all_that_was_asked_before_its_last_copy_is_computed() -> None:
    port = Late()
    ring, slot = Ring(port), Traffic(1, lambda *_: None, lambda _: None).take()
    slot.pieces["img"] = ring.piece((1, 2, 3, 4), torch.float32, torch.float32)
    assert ring.idle()
    ring.send(slot, 2)
    assert ring._computed == 0 and ring.idle()
    port.begun = 0
    assert not ring.idle()
    meta = meta_of()
    with Staging(meta, lane=ring) as staging:
        assert staging._traffic._idle() is False


def test_memory_that_cannot_be_pinned_is_one_message_and_what_is_reserved_is_made_once() -> None:
    class Full(Late):
        def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            raise RuntimeError("CUDA error: out of memory\nCompile with")

    class Counting(Late):
        made = 0

        def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            self.made += 1
            return super().pinned(shape, dtype)

    meta = meta_of()
    values = model_values(meta, meta.d_model)
    with pytest.raises(
        GranaryError, match=r"of pinned memory, for what 2 steps .* CUDA error: out of memory\. Use a smaller"
    ):
        staged(meta, values, Ring(Full()))
    port = Counting()
    with Staging(meta, lane=Ring(port)) as staging:
        staging.reserve(torch.device("cpu"))
        assert port.made == 2 * len(meta.streams) * len(meta.points)
        rows = Rows(values[meta.site_objects[0], 0, "mlp_in"][: meta.batch_size])
        staging.begin(IMAGES, positions_of(meta))
        staging.batch(0, meta.batch_size)
        staging.keep(meta.site_objects[0], "mlp_in", rows)
        assert port.made == 2 * len(meta.streams) * len(meta.points)


def test_what_goes_wrong_on_the_way_is_raised_where_the_model_runs_and_the_thread_ends() -> None:
    def move(_slot: Any, number: int) -> None:
        raise OSError(f"no room for {number}")

    dropped: list[Any] = []
    traffic = Traffic(2, move, lambda _seconds: None, dropped.append)
    with pytest.raises(OSError, match="no room for 0"):
        rounds(traffic, 5, [])
    traffic.close()
    assert len(dropped) == 1  # the second slot was on its way: its copy is waited for all the same
    assert not [thread for thread in threading.enumerate() if thread.name == "staging"]


def test_errors_of_all_sites_at_once_are_those_of_one_site_after_the_other() -> None:
    exact = torch.randn(3, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    exact[1, 2, 3] = float("nan")
    stored = exact.bfloat16()
    one_by_one = squared_errors(stored, exact)
    assert one_by_one is not None and squared_errors(exact, exact) is None
    at_once = (stored.float() - exact).square().flatten(1).nansum(1, dtype=torch.float64)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-12, atol=0)


def test_errors_hold_no_more_than_a_site_in_float32() -> None:
    made = [torch.empty(8, 2, 3, 16, dtype=kind, device="meta") for kind in (torch.bfloat16, torch.float32)]
    held, site, sums = sum(tensor.nbytes for tensor in made), made[1][0].nbytes, 8 * 8
    assert peak_bytes(lambda: squared_errors(*made)) <= held + site + sums + 8


def test_there_are_two_slots_unless_they_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = meta_of()
    rows = sum(meta.tokens[site.stream].kept for site in meta.site_objects)
    assert slot_bytes(meta) == rows * meta.batch_size * meta.d_model * 2 * 4
    assert slots_of(meta) == 2
    small = meta_of(chunk_images=meta.batch_size // 2)  # no batch reaches over the end of a part
    assert slot_bytes(small) == slot_bytes(meta) // 2
    monkeypatch.setattr("harvest.staging.MOST_BYTES", 2 * slot_bytes(meta) - 1)
    assert slots_of(meta) == 1
    values = model_values(meta, meta.d_model)
    for key, array in staged(meta, values, Ring(Late()))[0].items():
        expected = plainly(meta, values, None, torch.bfloat16)[0][key]
        np.testing.assert_array_equal(array.astype(np.float32), expected.float().numpy())


def test_waits_are_shared_out_as_the_writer_spent_its_time_and_said_in_one_sentence() -> None:
    waiting = Waiting(model=8.0)
    waiting.threads.add("disk", 100.0)  # for parts before
    before = waiting.threads.seconds()
    waiting.threads.add("encode", 1.0)
    waiting.threads.add("disk", 3.0)
    waiting._share_out(2.0, before, last=False)
    assert (waiting.encode, waiting.disk) == (0.5, 1.5)
    waiting._share_out(1.0, before, last=True)
    said = waiting.said()
    assert said.startswith("the model drew for 8.0 s and waited 2.0 s (copy 0.0 s, encode 0.5 s, disk 1.5 s)")
    assert "15% of the time it waited for the disk; a faster disk" in said and "\n" not in said
    facts = waiting.facts()
    assert facts["waited"] == {"copy": 0.0, "encode": 0.5, "disk": 1.5} and facts["last_part"] == 1.0
    assert "nothing held it up" in Waiting(model=8.0).said() and "nothing held it up" in Waiting().said()


@pytest.mark.gpu
@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("few", [True, False])
def test_what_arrives_from_a_gpu_is_what_plain_copies_give(store_dtype: Any, few: bool) -> None:
    meta = meta_of(few, store_dtype=store_dtype, steps=(1,) if few else (0, 1))
    values = {key: value.cuda() for key, value in model_values(meta, meta.d_model).items()}
    arrays, errors = staged(meta, values, None, parts=3)
    expected, lost = plainly(meta, {k: v.cpu() for k, v in values.items()}, None, getattr(torch, store_dtype))
    for key, array in arrays.items():
        np.testing.assert_array_equal(as_tensor(array).float().numpy(), expected[key].float().numpy())
        assert errors[key] == pytest.approx(lost[key], rel=1e-6)


@pytest.mark.gpu
def test_a_gpu_has_a_ring_and_its_copies_do_not_wait_for_what_comes_after() -> None:
    lane = lane_of(torch.device("cuda"))
    assert isinstance(lane, Ring)
    piece = lane.piece((1, 2, 3, 4), torch.float32, torch.bfloat16)
    assert piece.landed.is_pinned() and piece.stored.is_cuda and piece.stored.dtype == torch.bfloat16
    slot = Traffic(1, lambda *_: None, lambda _: None).take()
    slot.pieces["img"] = piece
    piece.staged.fill_(2.5)
    lane.send(slot, 2)
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # about a second of the model's stream
    begun = time.perf_counter()
    lane.arrive(slot)
    assert time.perf_counter() - begun < 0.5 and bool((piece.landed == 2.5).all())
    torch.cuda.synchronize()
