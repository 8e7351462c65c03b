"""Text embeddings are made once a unit, wherever they come from, and the same however often they are asked for."""

from pathlib import Path

import pytest
import torch

from harvest.models.ahead import tokenizer_hash, turned
from harvest.models.embeddings import Ahead, Embedded, Embeddings, Unit, bytes_of, units_of
from harvest.tiny_flux.tokenizers import clip_tokenizer, t5_tokenizer
from store.errors import GranaryError

HOST = torch.device("cpu")


class Encoder:
    """Answers with tensors that say which prompt, and in which company it was encoded."""

    def __init__(self) -> None:
        self.asked: list[Unit] = []

    def __call__(self, unit: Unit) -> Embedded:
        self.asked.append(unit)
        own = torch.tensor([[float(sum(map(ord, prompt))), float(len(unit))] for prompt in unit])
        return own.unsqueeze(1).repeat(1, 3, 1), own


def test_a_prompt_alone_is_encoded_once_and_a_batch_has_it_in_every_place() -> None:
    encoder = Encoder()
    embeddings = Embeddings(encoder, True, lambda: HOST)
    long, pooled = embeddings.of(["b", "a", "b"])
    assert encoder.asked == [("b",), ("a",)]
    assert long.shape == (3, 3, 2) and pooled[:, 0].tolist() == [98.0, 97.0, 98.0]
    again, _ = embeddings.of(["a", "c"])
    assert encoder.asked[2:] == [("c",)] and torch.equal(again[0], long[1])


def test_no_more_bytes_are_kept_than_the_bound_and_the_oldest_go_first() -> None:
    encoder = Encoder()
    one = bytes_of(encoder(("a",)))
    embeddings = Embeddings(encoder, True, lambda: HOST, bound=2 * one)
    embeddings.of(["a", "b"])
    embeddings.of(["a", "c"])
    assert embeddings.kept == ("a", "c")
    assert len(embeddings.of(["d", "e", "f"])[0]) == 3  # more than the bound in one batch
    assert embeddings.kept == ("e", "f")


def test_batches_that_are_encoded_together_are_left_together() -> None:
    encoder = Encoder()
    pooled = Embeddings(encoder, False, lambda: HOST).of(["a", "b", "a"])[1]
    assert encoder.asked == [("a", "b", "a")] and pooled[:, 1].tolist() == [3.0] * 3
    assert units_of(["a", "b", "a"], alone=False) == [("a", "b", "a")]
    assert units_of(["a", "b", "a"], alone=True) == [("a",), ("b",)]


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_was_encoded_ahead_is_found_again_bit_by_bit_and_nothing_is_encoded_twice(
    tmp_path: Path, on_disk: bool
) -> None:
    encoder = Encoder()
    folder = tmp_path if on_disk else None
    ahead, units = Ahead(folder), [("a", "b"), ("c",)]
    assert ahead.missing(units) == units
    for unit in units:
        ahead.put(unit, tuple(tensor.bfloat16() for tensor in encoder(unit)))
    assert ahead.missing(units) == []
    found = ahead(("a", "b"))
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2
    assert all(torch.equal(*pair) for pair in zip(found, (t.bfloat16() for t in encoder(("a", "b"))), strict=True))
    if on_disk:
        assert Ahead(tmp_path).missing([*units, ("d",)]) == [("d",)]  # another process finds them
        next(iter(sorted(tmp_path.iterdir()))).write_bytes(b"torn")
        with pytest.raises(GranaryError, match=r"cannot be read .* run the command again"):
            list(map(ahead, units))


def test_a_damaged_file_is_made_again_by_the_next_run(tmp_path: Path) -> None:
    ahead = Ahead(tmp_path)
    ahead.missing([("a",)])
    ahead.put(("a",), Encoder()(("a",)))
    file = next(iter(tmp_path.iterdir()))
    file.write_bytes(file.read_bytes()[:-1])
    assert Ahead(tmp_path).missing([("a",)]) == [("a",)]


def test_workers_begin_to_encode_at_different_units_and_leave_none_out() -> None:
    units = [(str(number),) for number in range(50)]
    orders = [turned(units) for _ in range(20)]
    assert len({order[0] for order in orders}) > 1  # all the same: 50 to the -19
    for order in orders:
        first = units.index(order[0])
        assert order == units[first:] + units[:first]


def test_the_hash_of_a_tokenizer_is_that_of_what_it_does_and_not_of_how_it_was_last_called() -> None:
    one, other = t5_tokenizer(), t5_tokenizer()
    before = tokenizer_hash(one)
    one(["a red circle"], truncation=True, max_length=2, padding="max_length")
    assert tokenizer_hash(one) == before == tokenizer_hash(other) != tokenizer_hash(clip_tokenizer())
    other.add_tokens(["circles"])
    assert tokenizer_hash(other) != before


def test_a_batch_that_was_not_encoded_is_refused_unless_it_is_only_timed() -> None:
    encoder, ahead = Encoder(), Ahead(None)
    embeddings = Embeddings(ahead, False, lambda: HOST)
    ahead.missing([("a", "b"), ("c", "d")])
    ahead.put(("a", "b"), encoder(("a", "b")))
    with pytest.raises(GranaryError, match="were not encoded before"):
        embeddings.of(["b", "a"])
    timed = embeddings.loosely().of(["b", "a", "d"])  # d was not encoded at all: any row has its shape
    assert timed[1][:2, 0].tolist() == [98.0, 97.0] and timed[0].shape == (3, 3, 2)
    with pytest.raises(GranaryError, match="were not encoded before"):
        embeddings.of(["b", "a"])
