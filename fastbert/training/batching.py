"""Micro-batches of pretraining data: chosen by a budget of tokens, masked anew each time, and told by their number.

Micro-batch number i of a run is a function of the data, the seed and i alone: which rows are in it, and what is masked.
So a run that resumes at step i goes on exactly as it would have, whatever loads the batches and in how many processes,
and one run may go over data prepared at several lengths (phases).

Rows are padded to the longest of their batch; the encoder takes the padding out again and works on a fixed number of
rows, the budget (``fastbert.token_bound``), which the real tokens of every batch come close to. So every step of every
process costs the same. Where the padded tensors must not change their shape either, for a compiled step or a CUDA
graph, batches get empty rows up to the most that any has.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling

from .errors import CommandError
from .trainer import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LOOKAHEAD = 64  # rows among which the one is sought that fills a batch best
MOST_ROWS = 1.5  # of a batch, by what it has on average: rarely reached, so that batches are full of tokens first
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the tokens to predict; the rest stay as they are
_ORDER, _MASKS = 0, 1  # streams of random numbers that a seed has


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each row, int32 [rows]."""
    import pyarrow.compute as pc

    return pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int32)


class TokenBudget:
    """Batches of about ``tokens`` tokens, and no more, epoch after epoch, each in an order of its own.

    Rows are taken in random order as long as they fit; then, as long as there is one, the longest that still fits among
    the next ``LOOKAHEAD``. No batch has more than ``most_rows``. What is left at the end of an epoch and fills no batch
    is not used in it.
    """

    def __init__(self, lengths: np.ndarray, tokens: int, seed: int) -> None:
        if tokens < lengths.max():
            raise ValueError(f"tokens must be at least {lengths.max()}, the length of the longest row; got {tokens}")
        self.lengths = lengths
        self.tokens = tokens
        self.most_rows = int(MOST_ROWS * tokens / lengths.mean()) + 1
        self.seed = seed
        self._starts = [0]  # number of the first batch of each epoch
        self._epoch: tuple[int, list[np.ndarray]] | None = None

    def rows(self, number: int) -> np.ndarray:
        """The rows of a batch, by its number over all epochs."""
        return self._batches(epoch := self.epoch_of(number))[number - self._starts[epoch]]

    def epoch_of(self, number: int) -> int:
        """The epoch that a batch belongs to, from 0."""
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._batches(len(self._starts) - 1)))
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def per_epoch(self) -> int:
        """Batches of the first epoch; those of others differ by a few."""
        return len(self._batches(0))

    def _batches(self, epoch: int) -> list[np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, list(self._fill(epoch))
        return self._epoch[1]

    def _fill(self, epoch: int) -> Iterator[np.ndarray]:
        order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.lengths))
        coming = iter(zip(order.tolist(), self.lengths[order].tolist(), strict=True))
        waiting = deque(islice(coming, LOOKAHEAD))
        full = 0
        while waiting:
            batch: list[int] = []
            rest = self.tokens
            while waiting and len(batch) < self.most_rows:
                place = 0
                if waiting[0][1] > rest:
                    place = max(range(len(waiting)), key=lambda i: waiting[i][1] if waiting[i][1] <= rest else -1)
                    if waiting[place][1] > rest:
                        break
                row, length = waiting[place]
                del waiting[place]
                batch.append(row)
                rest -= length
                if (following := next(coming, None)) is not None:
                    waiting.append(following)
            if waiting or not full:  # else the end of the epoch, where nothing was left to fill it up
                full += 1
                yield np.array(batch)


class Masking:
    """transformers' collator for masked language modelling, drawing from a generator for each batch.

    With ``whole_words``, the pieces of a word are masked together; this needs a tokenizer whose pieces inside words
    begin with a prefix, as WordPiece's do with ``##``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, whole_words: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.collator = DataCollatorForLanguageModeling(
                tokenizer=tokenizer, mlm_probability=probability, whole_word_mask=whole_words
            )
        # For whole words the collator would replace all by [MASK]; what it draws serves them as well as single pieces.
        self.collator.mask_replace_prob, self.collator.random_replace_prob = MASK_SHARE, RANDOM_SHARE
        self.inside = _inside_words(tokenizer) if whole_words else None

    def __call__(self, ids: torch.Tensor, special: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked ids and labels [B, S], the labels -100 where nothing is to be predicted, of ids [B, S]."""
        self.collator.generator = torch.Generator().manual_seed(seed)
        offsets = None if self.inside is None else _offsets(self.inside[ids.numpy()])
        inputs, labels = self.collator.torch_mask_tokens(
            ids.clone(), special_tokens_mask=special, offset_mapping=offsets
        )
        return inputs, labels


def _inside_words(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """For each token id whether it goes on with the word of the one before."""
    prefix = getattr(cast(Any, tokenizer).backend_tokenizer.model, "continuing_subword_prefix", None)
    if not prefix:
        raise CommandError("--whole_word_mask: needs a WordPiece tokenizer, whose pieces inside words begin with '##'")
    inside = np.zeros(len(tokenizer), bool)
    for token, number in tokenizer.get_vocab().items():
        inside[number] = token.startswith(prefix)
    return inside


def _offsets(inside: np.ndarray) -> np.ndarray:
    """Character offsets [B, S, 2] that say the same: a piece inside a word begins where the one before it ends."""
    starts = np.broadcast_to(2 * np.arange(inside.shape[1]), inside.shape)
    following = np.concatenate([inside[:, 1:], np.zeros((len(inside), 1), bool)], axis=1)
    return np.stack([starts, starts + 1 + following], axis=2)


@dataclass
class Phase:
    """Data of one length, and how many micro-batches of each process come from it.

    ``width`` is the length that rows are padded to, and makes all batches ``budget.most_rows`` rows; None: they are as
    large as their content.
    """

    name: str
    dataset: Dataset
    budget: TokenBudget
    batches: int
    width: int | None = None


class Batches(torch.utils.data.Dataset):
    """The micro-batches of one process, in order. Item i is a dict of tensors [B, S], on the CPU.

    With ``ranks`` processes, process ``rank`` has every ``ranks``-th batch, so that at each step all of them have about
    the same number of tokens. ``vocabulary`` is the number of ids that the model embeds.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        masking: Masking,
        seed: int,
        vocabulary: int,
        pad: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.phases = list(phases)
        self.masking = masking
        self.seed = seed
        self.vocabulary = vocabulary
        self.pad = pad
        self.rank = rank
        self.ranks = ranks
        self._views = [phase.dataset.with_format("arrow") for phase in phases]

    def __len__(self) -> int:
        return sum(phase.batches for phase in self.phases)

    def place(self, number: int) -> tuple[int, int]:
        """Phase of a micro-batch of this process, and its number among those of all processes in that phase."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        for index, phase in enumerate(self.phases):
            if number < phase.batches:
                return index, number * self.ranks + self.rank
            number -= phase.batches
        raise AssertionError

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        phase, batch = self.place(number)
        rows = self.phases[phase].budget.rows(batch)
        seed = int(np.random.SeedSequence([self.seed, _MASKS, phase, batch]).generate_state(1, np.uint64)[0] >> 1)
        return self._collate(self._views[phase][rows.tolist()], phase, seed)

    def _collate(self, table: Any, phase: int, seed: int) -> dict[str, torch.Tensor]:
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        lengths = columns["input_ids"].value_lengths().to_numpy()
        real = np.arange(int(lengths.max())) < lengths[:, None]

        def padded(name: str, fill: int) -> torch.Tensor:
            values = np.full(real.shape, fill, np.int64)
            values[real] = columns[name].flatten().to_numpy()
            return torch.from_numpy(values)

        ids = padded("input_ids", self.pad)
        if ids.max() >= self.vocabulary or ids.min() < 0:
            raise CommandError(
                f"--dataset {self.phases[phase].name}: holds the token id {int(ids.max())}, the model embeds "
                f"{self.vocabulary}; the data are broken, or of another tokenizer"
            )
        found = {"attention_mask": torch.from_numpy(real.astype(np.int64))}
        found["input_ids"], found["labels"] = self.masking(ids, padded("special_tokens_mask", 1), seed)
        if "token_type_ids" in columns:
            found["token_type_ids"] = padded("token_type_ids", 0)
        if "next_sentence_label" in columns:
            found["next_sentence_label"] = torch.from_numpy(columns["next_sentence_label"].to_numpy().astype(np.int64))
        width = self.phases[phase].width
        if width is None:
            return found
        # Only now: what is masked is drawn by place, and would be other tokens in another shape.
        right, below = width - real.shape[1], self.phases[phase].budget.most_rows - len(real)
        fills = {"input_ids": self.pad, "labels": IGNORED, "next_sentence_label": IGNORED}
        return {
            name: F.pad(value, (0, right, 0, below) if value.dim() == 2 else (0, below), value=fills.get(name, 0))
            for name, value in found.items()
        }
