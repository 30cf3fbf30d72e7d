"""Text that a target writes itself, for its draft head to learn from: it is what the head will have to guess.

A target without a chat template goes on with given text. One with a template holds whole conversations: from the
beginning of a user's turn it writes the question too, as in Magpie (arXiv 2406.08464), then its answer, and so on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from flowspec.chat_template import ChatTemplate
from flowspec.model.kv_cache import CACHE_ARGUMENT
from flowspec.train.corpus import Tokens, windows
from flowspec.train.grouped_attention import grouped_attention
from flowspec.train.loop import TrainingProgress, write_atomically
from flowspec.train.openers import OPENERS, PASSAGE_TASKS

MAX_QUESTION_LEN = 96  # tokens that a question of the target's own may have
MAX_PASSAGE_LEN = 200  # tokens of given text in a question about it
_FREE_SHARE, _PASSAGE_SHARE = 0.4, 0.2  # of the conversations; the others have one of the openers


@dataclass(frozen=True)
class Conversations:
    """What a conversation begins with, and what stands between its turns, in tokens."""

    begin: list[int]  # up to where the first question begins
    to_answer: list[int]
    to_question: list[int]
    end_ids: list[int]  # any of these ends a turn
    openers: list[list[int]]  # beginnings of questions
    passage_tasks: list[list[int]]  # what stands before a passage of given text

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> Conversations | None:
        """As the tokenizer's chat template has them; ``None`` without one. Raises ``UsageError`` for a broken one."""
        template = ChatTemplate(tokenizer, name)
        if not template.is_there:
            return None

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

        begin, to_answer, to_question = map(encode, template.between_turns())
        own = tokenizer.eos_token_id
        ends = template.end_ids | ({own} if isinstance(own, int) else set())
        openers, tasks = ([encode(text) for text in texts] for texts in (OPENERS, PASSAGE_TASKS))
        return cls(begin, to_answer, to_question, sorted(ends), openers, tasks)

    def beginnings(self, num_rows: int, passages: Tokens, seed: int) -> list[tuple[list[int], bool]]:
        """First questions, or their beginnings, and whether they are whole. ``passages`` [T]: given text, or none."""
        draws = np.random.default_rng(seed)
        found: list[tuple[list[int], bool]] = []
        for kind in draws.random(num_rows):
            if kind < _PASSAGE_SHARE and len(passages) > MAX_PASSAGE_LEN:
                start = draws.integers(len(passages) - MAX_PASSAGE_LEN)
                passage = passages[start : start + draws.integers(MAX_PASSAGE_LEN // 4, MAX_PASSAGE_LEN)].tolist()
                found.append((self.passage_tasks[draws.integers(len(self.passage_tasks))] + passage, True))
            elif kind > 1 - _FREE_SHARE:
                found.append(([], False))
            else:
                found.append((self.openers[draws.integers(len(self.openers))], False))
        return found

    def answers(self, rows: Tensor) -> Tensor:
        """Which tokens of conversations [B, T] belong to answers, their ends included; bool [B, T]."""
        found = torch.zeros_like(rows, dtype=torch.bool)
        length = len(self.to_answer)
        for row, ids in enumerate(rows.tolist()):
            is_answer = False
            for place in range(length, len(ids)):
                if ids[place - length : place] == self.to_answer:
                    is_answer = True
                found[row, place] = is_answer
                is_answer = is_answer and ids[place] not in self.end_ids
        return found


@torch.inference_mode()
def converse(
    model: Any,
    plan: Conversations,
    beginnings: Sequence[tuple[list[int], bool]],
    length: int,
    temperatures: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Conversations [B, length], int64 on the CPU, with answers at temperatures [B]; 0 is greedy.

    Questions are drawn at temperature 1. What stands between turns is put there, whatever the model would have written.
    ``generator``: on the model's device.
    """
    device = model.device
    num_rows = len(beginnings)
    scripts = _padded([plan.to_answer, plan.to_question]).to(device)
    script_lens = torch.tensor([len(plan.to_answer), len(plan.to_question)], device=device)
    openings = [ids + (plan.to_answer if is_whole else []) for ids, is_whole in beginnings]
    queue = _padded([*openings, *scripts.tolist()])[:num_rows].to(device)  # at least as wide as the scripts
    queued = torch.tensor([len(ids) for ids in openings], device=device)
    is_answer = torch.tensor([is_whole for _, is_whole in beginnings], device=device)
    next_queued, turn_len = torch.zeros_like(queued), torch.zeros_like(queued)
    end_ids = torch.tensor(plan.end_ids, device=device)
    temperatures = temperatures.to(device)
    rows = torch.empty(num_rows, length, dtype=torch.long, device=device)
    rows[:, : len(plan.begin)] = torch.tensor(plan.begin, device=device)
    step = _Stepper(model, length)
    for end in range(len(plan.begin), length):
        with grouped_attention(model):
            logits = step(rows[:, step.num_done : end])
        drawn = _draw(logits, torch.where(is_answer, temperatures, 1.0), generator)
        is_free = next_queued >= queued
        is_over = torch.isin(drawn, end_ids) | (~is_answer & (turn_len >= MAX_QUESTION_LEN))
        ends = is_free & is_over
        queue[:, : scripts.shape[1]] = torch.where(
            ends[:, None], scripts[is_answer.long()], queue[:, : scripts.shape[1]]
        )
        queued = torch.where(ends, script_lens[is_answer.long()], queued)
        next_queued = torch.where(ends, 0, next_queued)
        is_answer ^= ends
        is_forced = next_queued < queued
        forced = queue.gather(1, next_queued.clamp(max=queue.shape[1] - 1)[:, None])[:, 0]
        rows[:, end] = torch.where(is_forced, forced, drawn)
        turn_len = torch.where(is_forced, 0, turn_len + 1)
        next_queued = next_queued + is_forced
    return rows.cpu()


class _Stepper:
    """Runs rows through a model, some columns at a time."""

    def __init__(self, model: Any, length: int) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=-(-length // 64) * 64)
        self.num_done = 0  # columns

    def __call__(self, token_ids: Tensor) -> Tensor:
        """float32 logits [B, V] of the last of the next columns [B, T]."""
        end = self.num_done + token_ids.shape[1]
        output = self._model(
            input_ids=token_ids,
            position_ids=torch.arange(self.num_done, end, device=token_ids.device)[None],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
        )
        self.num_done = end
        return output.logits[:, -1].float()


def _draw(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [B] from logits [B, V] at temperatures [B]."""
    # One uniform number a row and its place in the running sum: much faster than a draw of noise for every token.
    sums = (logits / temperatures.clamp(min=1e-6)[:, None]).softmax(-1).cumsum(-1)
    places = torch.rand(len(sums), 1, device=sums.device, generator=generator) * sums[:, -1:]
    drawn = torch.searchsorted(sums, places, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(temperatures > 0, drawn, logits.argmax(-1))


def _padded(lists: Sequence[list[int]]) -> Tensor:
    width = max(1, *map(len, lists))
    return torch.tensor([ids + [0] * (width - len(ids)) for ids in lists])


@torch.inference_mode()
def continue_rows(model: Any, given: Tensor, length: int, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """Continue rows [B, P] to [B, length], each at its temperature [B]; 0 is greedy. End-of-text does not end a row."""
    num_rows, given_len = given.shape
    rows = torch.empty(num_rows, length, dtype=torch.long)
    rows[:, :given_len] = given
    step = _Stepper(model, length)
    for end in range(given_len, length):
        logits = step(rows[:, step.num_done : end].to(model.device)).cpu()
        drawn = torch.multinomial((logits / temperatures.clamp(min=1e-6)[:, None]).softmax(-1), 1, generator=generator)
        rows[:, end] = torch.where(temperatures > 0, drawn[:, 0], logits.argmax(-1))
    return rows


@dataclass(frozen=True)
class Batches:
    """Windows that a target is to write, some at a time; what is written is kept, and not written again."""

    num_batches: int
    num_rows: int  # of a batch
    length: int  # tokens of a row

    def write(self, directory: Path, identity: str, write: Callable[[int], Tensor]) -> Tokens:
        """int32 [N, length]. ``identity`` is all that the rows depend on; ``write`` gives a batch by its number."""
        name = hashlib.sha256(identity.encode()).hexdigest()[:12]
        paths = [directory / f"{name}-{index:05d}.npy" for index in range(self.num_batches)]
        batch_tokens = self.num_rows * self.length
        num_kept = sum(path.exists() for path in paths)
        batches: list[Tokens] = []
        with TrainingProgress("text of the target", len(paths) * batch_tokens, num_kept * batch_tokens) as progress:
            for index, path in enumerate(paths):
                if path.exists():
                    batches.append(np.load(path))
                    continue
                batches.append(write(index).to(torch.int32).numpy())
                write_atomically(path, lambda partial, batch=batches[-1]: _save_array(partial, batch))
                progress.update((index + 1) * batch_tokens)
        return np.concatenate(batches) if batches else np.empty((0, self.length), np.int32)


def text_batch(
    model: Any, tokens: Tokens, batches: Batches, prompt_len: int, temperatures: Tensor, seed: int
) -> Callable[[int], Tensor]:
    """Windows that begin with given text, and go on with the target's own."""

    def write(index: int) -> Tensor:
        given = windows(tokens, prompt_len, index * batches.num_rows, batches.num_rows, seed + 2)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        return continue_rows(model, torch.from_numpy(given), batches.length, temperatures, generator)

    return write


def conversation_batch(
    model: Any, plan: Conversations, passages: Tokens, batches: Batches, temperatures: Tensor, seed: int
) -> Callable[[int], Tensor]:
    """Windows that are conversations each."""

    def write(index: int) -> Tensor:
        own_seed = seed * 1_000_003 + index
        beginnings = plan.beginnings(batches.num_rows, passages, own_seed)
        generator = torch.Generator(model.device).manual_seed(own_seed)
        return converse(model, plan, beginnings, batches.length, temperatures, generator)

    return write


def _save_array(path: Path, array: Tokens) -> None:
    with path.open("wb") as file:  # np.save itself would append a suffix to the path
        np.save(file, array)
