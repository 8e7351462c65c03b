"""What an intervention does to an MLP's output equals a slow plain account of it; what it leaves alone keeps every bit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analyze.steering import feature_changes
from analyze.steering.interventions import (
    FeatureEdit,
    Intervention,
    StreamOff,
    TokenChoice,
    by_key,
    changes,
    edits_of,
    needed,
)
from harvest.replacing import Moment
from store import Site
from store.errors import UsageError
from tests.toy_dictionaries import D_MODEL, prepared64, random_dictionary
from train.dictionaries.dictionary import Dictionary

SITE, GRID, TOKENS, SIGMAS = Site.parse("img_3"), (2, 3), 6, (1.0, 0.75390625)
FEATURES = (7, 2, 11)
DICTIONARIES: dict[str, dict[str, Any]] = {
    "relu": {},
    "relu without sigma": {"time_embed_dim": None},
    "topk with skip": {"activation": "topk", "k": 5, "skip": True},
    "batchtopk": {"activation": "batchtopk", "k": 5},
    "jumprelu with skip": {"activation": "jumprelu", "skip": True},
    "sae": {"kind": "sae"},
    "flux-sae": {"kind": "sae", "family": "flux-sae", "activation": "topk", "k": 5, "time_embed_dim": None},
}
CHOICES = {
    "all": TokenChoice(),
    "positions": TokenChoice(positions=(4, 1)),
    "above": TokenChoice(above=0.5),
    "at the maximum": TokenChoice(above=1.0),
    "mask": TokenChoice.of_mask(np.eye(2, dtype=bool)),
}
STRENGTHS = {"zero": 1.0, "amplify": 2.5, "invert": 1.5, "set": 3.0, "add": -2.0}


def made(name: str) -> Dictionary:
    dictionary = random_dictionary(**DICTIONARIES[name])
    if dictionary.config.activation == "batchtopk":
        dictionary.threshold.fill_(0.6)
    return dictionary


def batch(images: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Moment, Tensor, Tensor]:
    """A moment of step 1, mlp_in and mlp_out of a batch."""
    generator = torch.Generator().manual_seed(11)
    given, output = (torch.randn(images, TOKENS, D_MODEL, generator=generator).to(dtype) for _ in range(2))
    return Moment(SITE, 1, torch.tensor([SIGMAS[i % 2] for i in range(images)])), given, output


def applied(
    interventions: Sequence[Intervention | None] | Intervention, dictionaries: Sequence[Dictionary],
    moment: Moment, given: Tensor, output: Tensor, peaks: Any = None,
) -> Tensor | None:  # fmt: skip
    """The output of img_3's MLP after all changes; None where none changed it."""
    found = changes(interventions, by_key(dictionaries), GRID, peaks).get((SITE, "mlp"), [])
    new = None
    for change in found:
        given_back = change(moment, given, output if new is None else new)
        new = new if given_back is None else given_back
    return new


# --- the plain account ----------------------------------------------------------------------------------------------


def plain_z(dictionary: Dictionary, p: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> list[list[float]]:
    """[token][feature] in float64."""
    rows = (prepared64(p, x, sigma.expand(len(x))) @ p["encoder.weight"].T + p["encoder.bias"]).tolist()
    config, found = dictionary.config, []
    for row in rows:
        if config.activation == "topk":
            assert config.k is not None
            least = sorted(row, reverse=True)[config.k - 1]
            found.append([max(v, 0.0) if v >= least else 0.0 for v in row])
        elif config.activation == "batchtopk":
            found.append([v if v > float(dictionary.threshold) else 0.0 for v in row])
        elif config.activation == "jumprelu":
            thresholds = p["log_threshold"].exp().tolist()
            found.append([v if v > t else 0.0 for v, t in zip(row, thresholds, strict=True)])
        else:
            found.append([max(v, 0.0) for v in row])
    return found


def touched(choice: TokenChoice, column: Sequence[float]) -> list[int]:
    if choice.above is not None:
        return [t for t, v in enumerate(column) if v > 0 and v >= choice.above * max(column)]
    if (
        choice.mask is not None
    ):  # np.eye(2) over a grid of two rows and three columns: its middle column is half covered
        return [0, 1, 4, 5]
    return list(range(TOKENS)) if choice.positions is None else list(choice.positions)


def plain_output(
    dictionary: Dictionary, edits: Sequence[FeatureEdit], whole: bool, sigma: Tensor, given: Tensor, output: Tensor
) -> Tensor:
    """One image's mlp_out with z' for z, float64, feature by feature and token by token."""
    p = {name: value.double() for name, value in dictionary.state_dict().items()}
    x = given if dictionary.input_point == "mlp_in" else output
    z = plain_z(dictionary, p, x, sigma)
    new, added = [list(row) for row in z], torch.zeros(output.shape, dtype=torch.float64)
    for edit in edits:
        for feature in edit.features:
            for token in touched(edit.tokens, [row[feature] for row in z]):
                if edit.mode == "zero":
                    new[token][feature] = 0.0
                elif edit.mode == "amplify":
                    new[token][feature] *= edit.strength
                elif edit.mode == "invert":
                    new[token][feature] *= -edit.strength
                elif edit.mode == "set":
                    new[token][feature] = edit.strength
                else:
                    column = p["decoder.weight"][:, feature]
                    added[token] += edit.strength * column / (column.norm() if edit.normalised else 1)
    z64, new64 = torch.tensor(z).double(), torch.tensor(new).double()
    decoder: Tensor = p["decoder.weight"]
    if not whole:
        return output.double() + (new64 - z64) @ decoder.T + added
    bias: Tensor = p["pre_bias"] if "pre_bias" in p else p["decoder.bias"]
    skip = x.double() @ p["skip.weight"].T if "skip.weight" in p else 0
    return new64 @ decoder.T + bias + skip + added


@pytest.mark.parametrize(("name", "method"), list(product(DICTIONARIES, ("difference", "replacement"))))
def test_every_mode_and_choice_of_tokens_does_what_the_plain_account_says(name: str, method: Any) -> None:
    dictionary = made(name)
    moment, given, output = batch()
    for (mode, strength), tokens in product(STRENGTHS.items(), CHOICES.values()):
        edit = FeatureEdit(SITE, FEATURES, mode, strength, tokens=tokens)  # type: ignore[arg-type]
        found = applied(Intervention("x", (edit,), method=method), [dictionary], moment, given, output)
        found = output if found is None else found
        for row in range(2):
            expected = plain_output(
                dictionary, [edit], method == "replacement", moment.sigma[row], given[row], output[row]
            )
            torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4, msg=f"{edit} {tokens}")


@pytest.mark.parametrize("name", DICTIONARIES)
def test_features_that_are_edited_are_active_somewhere_and_not_everywhere(name: str) -> None:
    """Else the comparison above would say little."""
    dictionary = made(name)
    moment, given, output = batch()
    x = given if dictionary.input_point == "mlp_in" else output
    z = dictionary.encode(x.flatten(0, 1), moment.sigma.repeat_interleave(TOKENS))[:, FEATURES]
    assert 0 < int((z > 0).sum()) < z.numel()


def test_edits_follow_one_another_and_additions_come_last() -> None:
    dictionary = made("relu")
    moment, given, output = batch()
    edits = (
        FeatureEdit(SITE, (2, 7), "add", 4.0, normalised=True),
        FeatureEdit(SITE, (7, 11), "set", 2.0, tokens=CHOICES["positions"]),
        FeatureEdit(SITE, (11, 2), "invert", 3.0, tokens=CHOICES["above"]),
        FeatureEdit(SITE, (7,), "amplify", 0.5),
    )
    for method in ("difference", "replacement"):
        found = applied(Intervention("x", edits, method=method), [dictionary], moment, given, output)  # type: ignore[arg-type]
        assert found is not None
        for row in range(2):
            expected = plain_output(
                dictionary, edits, method == "replacement", moment.sigma[row], given[row], output[row]
            )
            torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_at_a_site_with_both_kinds_the_sae_reads_what_the_transcoder_left() -> None:
    transcoder, sae = made("relu"), made("sae")
    moment, given, output = batch()
    first, second = (FeatureEdit(SITE, (7,), "set", 3.0, kind=kind) for kind in ("transcoder", "sae"))
    found = applied(Intervention("x", (second, first)), [sae, transcoder], moment, given, output)
    assert found is not None
    between = torch.stack(
        [plain_output(transcoder, [first], False, moment.sigma[row], given[row], output[row]) for row in range(2)]
    )
    for row in range(2):
        expected = plain_output(sae, [second], False, moment.sigma[row], given[row], between[row].float())
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_splice_is_the_dictionary_itself_and_an_edit_there_changes_it(name: str) -> None:
    dictionary = made(name)
    moment, given, output = batch()
    spliced = Intervention("x", splice=(SITE,))
    found = applied(spliced, [dictionary], replace(moment, step=5), given, output)
    x = given if dictionary.input_point == "mlp_in" else output
    expected = dictionary(x.flatten(0, 1), moment.sigma.repeat_interleave(TOKENS)).view_as(output)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    edit = FeatureEdit(SITE, FEATURES, "set", 2.0, steps=(0,))
    edited = replace(spliced, edits=(edit,))
    assert torch.equal(applied(edited, [dictionary], moment, given, output), found)  # type: ignore[arg-type]
    at_zero = applied(edited, [dictionary], replace(moment, step=0), given, output)
    whole = applied(
        replace(edited, splice=(), method="replacement"), [dictionary], replace(moment, step=0), given, output
    )
    assert at_zero is not None and whole is not None
    assert torch.equal(at_zero, whole)
    assert not torch.equal(at_zero, found)  # type: ignore[arg-type]


def test_splices_of_several_sites_are_each_its_own_dictionary() -> None:
    other = random_dictionary(site=Site.parse("txt_0"), n_features=18)
    moment, given, output = batch()
    found = changes(Intervention("x", splice=(SITE, other.site)), by_key([made("relu"), other]), GRID)
    for dictionary in (made("relu"), other):
        [change] = found[dictionary.site, "mlp"]
        new = change(replace(moment, site=dictionary.site), given, output)
        expected = dictionary(given.flatten(0, 1), moment.sigma.repeat_interleave(TOKENS)).view_as(output)
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-4)


def test_an_encoding_in_parts_is_the_encoding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = made("topk with skip")
    moment, given, output = batch()
    wanted = Intervention("x", (FeatureEdit(SITE, FEATURES, "amplify", 3.0, tokens=CHOICES["above"]),))
    for method in ("difference", "replacement"):
        each = []
        for encoded in (feature_changes.ENCODED, 48):  # all tokens, two tokens
            monkeypatch.setattr(feature_changes, "ENCODED", encoded)
            each.append(applied(replace(wanted, method=method), [dictionary], moment, given, output))  # type: ignore[arg-type]
        torch.testing.assert_close(*each)


# --- what keeps every bit -------------------------------------------------------------------------------------------


def test_tokens_and_rows_that_are_not_edited_keep_every_bit_and_the_input_is_not_written_to() -> None:
    dictionary = made("topk with skip")
    moment, given, output = batch(3, torch.bfloat16)
    before = output.clone()
    edit = FeatureEdit(SITE, FEATURES, "set", 2.0, tokens=CHOICES["positions"])
    found = applied([None, Intervention("x", (edit,)), None], [dictionary], moment, given, output)
    assert found is not None and found.dtype == torch.bfloat16
    assert torch.equal(output, before)
    differs = (found != output).any(dim=2).nonzero().tolist()
    assert differs == [[1, 1], [1, 4]]


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    dictionary = made("relu")
    moment, given, output = batch(1, torch.bfloat16)
    intervention = Intervention("x", (FeatureEdit(SITE, (2,), "add", 1.5),))
    found = applied(intervention, [dictionary], moment, given, output)
    column = 1.5 * dictionary.decoder.weight[:, 2]
    assert torch.equal(found, (output.float() + column).bfloat16())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "edits",
    [
        (),
        (FeatureEdit(SITE, FEATURES, "amplify", 1.0),),
        (FeatureEdit(SITE, FEATURES, "add", 0.0),),
        (FeatureEdit(SITE, FEATURES, "zero", steps=(0, 2)),),
        (FeatureEdit(SITE, FEATURES, "amplify", 2.0), FeatureEdit(SITE, FEATURES, "amplify", 0.5)),
    ],
)
def test_an_intervention_that_changes_nothing_gives_back_nothing(edits: tuple[FeatureEdit, ...]) -> None:
    moment, given, output = batch()
    assert applied(Intervention("x", edits), [made("relu")], moment, given, output) is None


def test_an_mlp_that_is_replaced_for_an_edit_stays_at_steps_without_one() -> None:
    moment, given, output = batch()
    wanted = Intervention("x", (FeatureEdit(SITE, FEATURES, "amplify", 1.0, steps=(1,)),), method="replacement")
    assert applied(wanted, [made("relu")], moment, given, output) is not None
    assert applied(wanted, [made("relu")], replace(moment, step=2), given, output) is None


def test_inactive_features_are_left_alone_by_every_mode_but_set_and_add() -> None:
    dictionary = made("relu")
    with torch.no_grad():
        dictionary.encoder.bias[4] = -1e6  # never active
    moment, given, output = batch()
    for mode, strength in STRENGTHS.items():
        wanted = Intervention("x", (FeatureEdit(SITE, (4,), mode, strength),))  # type: ignore[arg-type]
        changed = applied(wanted, [dictionary], moment, given, output) is not None
        assert changed == (mode in ("set", "add")), mode


def test_nothing_asked_for_installs_nothing() -> None:
    there = by_key([made("relu")])
    assert changes([None, Intervention("empty")], there, GRID) == {}
    assert changes(Intervention("empty"), there, GRID) == {}
    assert needed([None, Intervention("empty")], there) == ()


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_row_of_a_batch_is_changed_exactly_as_if_it_were_alone(name: str) -> None:
    """Different interventions in one batch, each bit for bit what it is by itself: the change knows no other row."""
    dictionary = made(name)
    moment, given, output = batch(5)
    each = [
        Intervention("a", (FeatureEdit(SITE, (7,), "zero"),)),
        None,
        Intervention(
            "b", (FeatureEdit(SITE, FEATURES, "amplify", 2.0, tokens=CHOICES["above"]),), method="replacement"
        ),
        Intervention("c", (FeatureEdit(SITE, (2,), "set", 1.0, steps=(0,)),), splice=(SITE,)),
        Intervention("d", (FeatureEdit(SITE, (2, 11), "add", 1.0, tokens=CHOICES["mask"]),)),
    ]
    found = applied(each, [dictionary], moment, given, output)
    assert found is not None
    for row, intervention in enumerate(each):
        at = slice(row, row + 1)
        alone = Moment(SITE, 1, moment.sigma[at])
        expected = applied([intervention], [dictionary], alone, given[at], output[at])
        assert torch.equal(found[at], output[at] if expected is None else expected), intervention
        if intervention is not None:
            shared = applied(intervention, [dictionary], alone, given[at], output[at])
            assert torch.equal(found[at], output[at] if shared is None else shared)


def test_another_number_of_rows_than_interventions_is_refused() -> None:
    moment, given, output = batch(2)
    wanted = Intervention("a", (FeatureEdit(SITE, (7,), "zero"),))
    with pytest.raises(UsageError, match="img_3: 3 interventions for a batch of 2 pictures"):
        applied([wanted, None, wanted], [made("relu")], moment, given, output)


def test_a_dictionary_on_another_device_than_the_model_is_refused() -> None:
    moment, given, output = batch()
    wanted = Intervention("a", (FeatureEdit(SITE, (7,), "zero"),))
    with pytest.raises(UsageError, match="transcoder_img_3 lies on meta, the model on cpu: move it there first"):
        applied(wanted, [made("relu").to("meta")], moment, given, output)


# --- whole streams, peaks, supernodes -------------------------------------------------------------------------------


def test_a_stream_that_is_off_writes_zeros_at_its_layers_steps_and_rows_after_all_edits() -> None:
    moment, given, output = batch()
    off = Intervention(
        "off",
        (FeatureEdit(SITE, (2,), "add", 1.0),),
        (StreamOff("img", (3, 5), steps=(1,), parts=("mlp", "attn")), StreamOff("txt", (0,))),
    )
    found = changes([off, None], by_key([made("relu")]), GRID)
    spots = {(str(site), part): len(made_there) for (site, part), made_there in found.items()}
    assert spots == {
        ("img_3", "mlp"): 2,
        ("img_3", "attn"): 1,
        ("img_5", "mlp"): 1,
        ("img_5", "attn"): 1,
        ("txt_0", "mlp"): 1,
    }
    for spot in ((SITE, "mlp"), (SITE, "attn")):
        new = found[spot][-1](moment, given, output)  # type: ignore[index]
        assert new is not None and not new[0].any() and torch.equal(new[1], output[1])
        assert found[spot][-1](replace(moment, step=2), given, output) is None  # type: ignore[index]


def test_strengths_in_peaks_count_in_each_features_own_peak() -> None:
    dictionary = made("relu")
    moment, given, output = batch()
    peaks = {(SITE, "transcoder"): np.arange(24, dtype=np.float32)}
    edit = FeatureEdit(SITE, (7, 2), "set", 1.5, unit="peak")
    found = applied(Intervention("x", (edit,)), [dictionary], moment, given, output, peaks)
    each = tuple(FeatureEdit(SITE, (feature,), "set", 1.5 * feature) for feature in (7, 2))
    expected = applied(Intervention("x", each), [dictionary], moment, given, output)
    assert found is not None
    assert torch.equal(found, expected)  # type: ignore[arg-type]


def test_a_supernode_is_one_edit_a_site_and_a_sweep_changes_every_strength() -> None:
    members = [(Site.parse("txt_2"), 5), (SITE, 70), (SITE, 66), (SITE, 70)]
    edits = edits_of(members, "amplify", 4.0, steps=(2,))
    assert [str(edit) for edit in edits] == ["amplify:4 txt_2:5", "amplify:4 img_3:66,70"]
    assert all(edit.steps == (2,) for edit in edits)
    swept = Intervention("x", (*edits, FeatureEdit(SITE, (1,), "zero"))).with_strength(0.5)
    assert [edit.strength for edit in swept.edits] == [0.5, 0.5, 1.0]
    with pytest.raises(UsageError, match="the supernode is empty"):
        edits_of([], "zero")
    with pytest.raises(UsageError, match="has no edit with a strength"):
        Intervention("x", (FeatureEdit(SITE, (1,), "zero"),)).with_strength(2.0)
