"""Micro-batches of pretraining data: full, told by their number, masked as the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.training.batching import Batches, Masking, Phase, TokenBudget


def lengths(count: int, longest: int = 128, seed: int = 0) -> np.ndarray:
    """Mostly full rows and some short ones, as prepared data have them."""
    rng = np.random.default_rng(seed)
    short = rng.integers(5, longest, count)
    return np.where(rng.random(count) < 0.6, longest - rng.integers(0, 4, count), short).astype(np.int32)


def test_batches_are_full() -> None:
    found = lengths(5000)
    budget = TokenBudget(found, 1024, seed=1)
    sizes = np.array([found[budget.rows(number)].sum() for number in range(budget.per_epoch() - 1)])
    assert sizes.max() <= 1024
    assert sizes.mean() > 0.99 * 1024
    assert sizes.std() < 0.01 * 1024
    assert sizes.min() > 0.9 * 1024
    assert max(len(budget.rows(number)) for number in range(budget.per_epoch())) < budget.most_rows


def test_no_batch_has_more_rows_than_the_most() -> None:
    """Long rows first, so that many short ones are left."""
    found = np.array([100] * 300 + [5] * 300, np.int32)
    budget = TokenBudget(found, 400, seed=0)
    rows = [len(budget.rows(number)) for number in range(budget.per_epoch())]
    assert max(rows) == budget.most_rows == int(1.5 * 400 / 52.5) + 1
    assert sum(rows) > 0.95 * len(found)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 200), st.integers(0, 3))
def test_no_row_twice_in_an_epoch(row_lengths: list[int], tokens: int, seed: int) -> None:
    found = np.array(row_lengths, np.int32)
    budget = TokenBudget(found, tokens, seed)
    rows = np.concatenate([budget.rows(number) for number in range(budget.per_epoch())])
    assert len(set(rows.tolist())) == len(rows)
    left = found.sum() - found[rows].sum()
    assert left <= tokens
    assert all(found[budget.rows(number)].sum() <= tokens for number in range(budget.per_epoch()))
    # Any batch on its own is the batch in the sequence, also in epochs to come.
    ahead = 2 * budget.per_epoch() + 1
    assert np.array_equal(TokenBudget(found, tokens, seed).rows(ahead), budget.rows(ahead))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    budget = TokenBudget(lengths(300), 1024, seed=1)
    first, second = budget.rows(0), budget.rows(budget.per_epoch())
    assert budget.epoch_of(budget.per_epoch()) == 1
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, TokenBudget(lengths(300), 1024, seed=2).rows(0))
    assert np.array_equal(first, budget.rows(0))


def test_a_budget_below_the_longest_row() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 128, the length of the longest row; got 127"):
        TokenBudget(np.array([5, 128], np.int32), 127, seed=0)


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model)


def ids_and_special(tokenizer: Any, rows: int = 400, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (rows, width), generator=generator)
    special = torch.zeros_like(ids)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    special[:, 0] = special[:, -1] = 1
    return ids, special


def within(share: float, wanted: float, count: int, sigmas: float = 4.5) -> bool:
    return abs(share - wanted) < sigmas * (wanted * (1 - wanted) / count) ** 0.5


def test_masking_80_10_10(tokenizer: Any) -> None:
    ids, special = ids_and_special(tokenizer)
    inputs, labels = Masking(tokenizer, 0.15, whole_words=False)(ids, special, seed=7)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert not chosen[special.bool()].any()
    count = int(chosen.sum())
    assert within(count / int((special == 0).sum()), 0.15, int((special == 0).sum()))
    masked = (inputs[chosen] == tokenizer.mask_token_id).float().mean().item()
    assert within(masked, 0.8 + 0.1 / len(tokenizer), count)
    kept = (inputs[chosen] == ids[chosen]).float().mean().item()
    assert within(kept, 0.1 + 0.1 / len(tokenizer), count)


def test_masks_depend_on_the_seed_alone(tokenizer: Any) -> None:
    ids, special = ids_and_special(tokenizer, rows=4)
    masking = Masking(tokenizer, 0.15, whole_words=False)
    first, _ = masking(ids, special, seed=1)
    other, _ = masking(ids, special, seed=2)
    torch.manual_seed(5)
    again, _ = Masking(tokenizer, 0.15, whole_words=False)(ids, special, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_whole_words(tokenizer: Any) -> None:
    ids, special = ids_and_special(tokenizer)
    inside = torch.tensor([tokenizer.convert_ids_to_tokens(i).startswith("##") for i in range(len(tokenizer))])
    assert 10 < int(inside.sum()) < len(tokenizer) - 20
    ids[:, 1] = int((~inside).nonzero()[10])  # a row begins with a word
    inputs, labels = Masking(tokenizer, 0.15, whole_words=True)(ids, special, seed=3)
    chosen = labels != -100
    goes_on = inside[ids[:, 2:-1]]
    assert torch.equal(chosen[:, 2:-1][goes_on], chosen[:, 1:-2][goes_on]), "a word is masked whole or not at all"
    words = (~inside[ids[:, 1:-1]]).sum().item()
    assert within((chosen[:, 1:-1] & ~inside[ids[:, 1:-1]]).sum().item() / words, 0.15, words)
    masked = (inputs[chosen] == tokenizer.mask_token_id).float().mean().item()
    assert within(masked, 0.8, int(chosen.sum()))


def test_whole_words_need_a_prefix() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from fastbert.training.errors import CommandError

    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1}, unk_token="[UNK]"))
    words = PreTrainedTokenizerFast(tokenizer_object=plain, mask_token="[MASK]", unk_token="[UNK]")
    with pytest.raises(CommandError, match="needs a WordPiece tokenizer"):
        Masking(words, 0.15, whole_words=True)


def batches(tokenizer: Any, rank: int = 0, ranks: int = 1, seed: int = 0) -> Batches:
    import datasets

    rng = np.random.default_rng(0)
    phases = []
    for name, longest in (("short", 16), ("long", 48)):
        rows = []
        for length in rng.integers(5, longest + 1, 60):
            text = rng.integers(5, len(tokenizer), length - 2).tolist()
            rows.append(
                {
                    "input_ids": [tokenizer.cls_token_id, *text, tokenizer.sep_token_id],
                    "token_type_ids": [0] * length,
                    "special_tokens_mask": [1, *[0] * (length - 2), 1],
                    "next_sentence_label": int(rng.integers(2)),
                }
            )
        data = datasets.Dataset.from_list(rows)
        found = np.array([len(row["input_ids"]) for row in rows], np.int32)
        phases.append(Phase(name, data, TokenBudget(found, 96, seed), batches=12 if name == "short" else 6))
    masking = Masking(tokenizer, 0.15, whole_words=False)
    return Batches(phases, masking, seed, len(tokenizer), tokenizer.pad_token_id, rank, ranks)


def test_a_batch_is_a_function_of_its_number(tokenizer: Any) -> None:
    whole = batches(tokenizer)
    assert len(whole) == 18
    in_order = [whole[number] for number in range(18)]
    anew = batches(tokenizer)
    for number in (17, 3, 12, 0):
        for name, value in anew[number].items():
            assert torch.equal(value, in_order[number][name])
    for number, batch in enumerate(in_order):
        real = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape == batch["labels"].shape == batch["token_type_ids"].shape
        assert batch["next_sentence_label"].shape == (len(real),)
        assert real.sum() <= 96
        assert real.max() == batch["input_ids"].shape[1] <= (16 if number < 12 else 48)
        assert not batch["input_ids"][batch["attention_mask"] == 0].any()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    with pytest.raises(IndexError):
        whole[18]


def test_a_fixed_shape(tokenizer: Any) -> None:
    """The same content and the same masks, in rows and a width that all batches of a phase have."""
    whole, fixed = batches(tokenizer), batches(tokenizer)
    for phase, width in zip(fixed.phases, (16, 48), strict=True):
        phase.width = width
    for number in range(18):
        phase = fixed.phases[number >= 12]
        for name, value in fixed[number].items():
            tight = whole[number][name]
            shape = (phase.budget.most_rows, phase.width)[: value.dim()]
            assert value.shape == shape
            inner = value[tuple(slice(size) for size in tight.shape)]
            assert torch.equal(inner, tight)
            fill = {"labels": -100, "next_sentence_label": -100, "input_ids": tokenizer.pad_token_id}.get(name, 0)
            assert (value == fill).sum() == (tight == fill).sum() + value.numel() - tight.numel()


def test_ranks_share_the_batches_out(tokenizer: Any) -> None:
    one = batches(tokenizer)
    first, second = batches(tokenizer, 0, 2), batches(tokenizer, 1, 2)
    for number in range(6):
        for share, batch in ((0, first[number]), (1, second[number])):
            for name, value in batch.items():
                assert torch.equal(value, one[2 * number + share][name])
