"""A draft model on a worker of its own: what it is told, and what becomes of its guesses when it is lost.

For the worker the model is a pipeline of one stage. A request is opened there with its first pass, under a number of
its own; nodes and text travel as segments, as those of the target do, and the answer names the best tokens of each node
(``messages.Guesses``). Commits go the same way, and only when no pass is under way: so the worker has read every node
that it is told of, and drops none of those that are asked about. What a request's cache takes there is counted here,
before the rows are sent (``draft.worker_slots``). No sockets here: ``Port`` has them.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from flowspec.core import MAX_ROWS
from flowspec.draft.base import LANGUAGE_MODEL, Accepted, ReusableDraft
from flowspec.draft.language_model import STEADY_STEPS, ModelDraft, ModelSource
from flowspec.draft.memory import Memory
from flowspec.draft.model_passes import NamedTokens, Rows
from flowspec.draft.ngram import NgramDraft, NgramSource
from flowspec.draft.token_map import TokenMap
from flowspec.draft.worker_slots import WorkerSlots
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints
from flowspec.wire.messages import (
    NO_PARENT,
    Close,
    Commit,
    DataMessage,
    Failed,
    Forget,
    Guesses,
    Open,
    Reserve,
    Segment,
)

logger = logging.getLogger("flowspec.draft")

NUM_BEST = 256  # tokens that are named for each node: 2 KB, where all logits may be 600
CHUNK = 256  # rows of text in one segment
PATIENCE_S = 1.0  # that a request waits for a pass; then it goes on without


class Port(Protocol):
    """The way to the worker, and back."""

    @property
    def is_lost(self) -> bool: ...

    def send(self, message: DataMessage | Commit) -> None:
        """Along the data path; messages keep their order."""

    def wait(self, timeout_s: float) -> None:
        """Let the source take what has come, and wait for it, for at most so long."""


class RemotePasses:
    """As ``model_passes.Passes``, on the worker."""

    longest_text = sys.maxsize  # nobody waits for all of it

    def __init__(self, port: Port, request_id: int, slots: WorkerSlots | None = None) -> None:
        """``request_id``: the worker's. ``slots``: of all requests there; by default as many as it likes."""
        self.request_id = request_id
        self.has_failed = False
        self.waits = True  # ``run`` does, for ``PATIENCE_S`` at most
        self.pass_s = 0.0  # what the last pass took
        self.asked_s = 0.0  # when the newest one was asked for
        self._port = port
        self._slots = slots or WorkerSlots()
        self._is_open = False
        self._cached: tuple[int, int] | None = None  # a request, and how many tokens of its text are this one's too
        self._root_id = CHUNK  # as the worker calls the root; the text before it has the ids below
        self._next_id = CHUNK + 1
        self._ids: dict[int, int] = {}  # by nodes that have been read: what the worker calls them
        self._num_text = 0  # rows of text that the worker has
        self._parents: dict[int, int] = {}  # by its nodes, those included that the tree has dropped; parents come first
        self._asked: list[int] | None = None  # the worker's ids of the nodes of the pass under way
        self._answer: NamedTokens | None = None  # that has come

    @property
    def is_lost(self) -> bool:
        return self.has_failed or self._port.is_lost

    def reuse(self, other: RemotePasses, num_tokens: int) -> None:
        self._cached, self._num_text = (other.request_id, num_tokens), num_tokens
        self._slots.take_over(other.request_id, self.request_id)

    def read(self, own_ids: Sequence[int], start: int) -> None:
        if not self._has_room(len(own_ids)):
            return
        self._open()
        for first in range(0, len(own_ids), CHUNK):
            part = own_ids[first : first + CHUNK]
            self._send(part, Rows([], [], [], []), start + first)

    def run(self, before: Sequence[int], start: int, rows: Rows) -> NamedTokens | None:
        if not self._has_room(len(before) + len(rows.own_ids)):
            return None
        self._open()
        num_ahead = max(0, len(before) - 1) // CHUNK * CHUNK
        self.read(before[:num_ahead], start)
        for node_id, parent_id in zip(rows.node_ids, rows.parent_ids, strict=True):
            is_root = parent_id == NO_PARENT
            self._ids[node_id] = self._root_id if is_root else self._next_id
            self._next_id += not is_root
        self._asked, self._answer = [self._ids[node_id] for node_id in rows.node_ids], None
        self._send(before[num_ahead:], rows, start + num_ahead)
        self.asked_s = time.monotonic()
        while self.waits and self._answer is None and not self.is_lost and self.left_s > 0:
            self._port.wait(self.left_s)
        return self.take()

    def _has_room(self, num_rows: int) -> bool:
        """Whether the worker has memory for so many rows more; without, nothing comes of this request any more."""
        needed, held = self._num_text + len(self._parents) + num_rows, self._slots.held_by(self.request_id)
        if needed <= held:
            return True
        if not self._slots.grow(self.request_id, needed):
            self.has_failed = True
            self.close()
            return False
        if self._is_open:
            self._tell(Reserve(self.request_id, 0, self._slots.held_by(self.request_id)))
        return True

    @property
    def left_s(self) -> float:
        """That the pass under way may still be waited for."""
        return self.asked_s + PATIENCE_S - time.monotonic()

    def take(self) -> NamedTokens | None:
        return self._answer

    def note(self, guesses: Guesses) -> None:
        """The worker's answer; to a segment without nodes there is an empty one."""
        if self.has_failed or not guesses.node_ids:
            return
        if self._asked != guesses.node_ids:
            self.fail(f"it answers for {len(guesses.node_ids)} nodes that nobody has asked about")
            return
        self._answer = NamedTokens(guesses.token_ids.numpy().astype(np.int64), guesses.logprobs.numpy())
        self._asked = None
        self.pass_s = time.monotonic() - self.asked_s

    def fail(self, reason: str) -> None:
        """The worker cannot go on with this request, and need not keep anything of it."""
        if not self.has_failed:
            self.has_failed = True
            self.close()
            logger.warning("the draft worker cannot go on with a request, for which n-grams draft instead: %s", reason)

    def has(self, node_id: int) -> bool:
        return node_id in self._ids

    def commit(self, path: Sequence[int], root_id: int, alive: Ints) -> None:
        if path:  # else nothing has been read, and the new root is called as the old one was
            self._root_id = self._ids.get(root_id, self._next_id + CHUNK)
            self._next_id = max(self._next_id, self._root_id + 1)
            accepted = [self._ids[node_id] for node_id in path]
            self._drop_dead(accepted)
            self._tell(Commit(self.request_id, 0, accepted, self._root_id))
        left = set(alive.tolist())
        self._ids = {node_id: own_id for node_id, own_id in self._ids.items() if node_id in left}

    def _drop_dead(self, accepted: Sequence[int]) -> None:
        """As the worker does, by its names."""
        self._num_text += len(accepted)
        for own_id in accepted:
            del self._parents[own_id]
        living: dict[int, int] = {}
        for own_id, parent_id in self._parents.items():
            if own_id == self._root_id or parent_id in living:
                living[own_id] = parent_id
        self._parents = living

    def finish(self) -> None:
        if self._cached is not None:
            self._open()  # what was to be taken over is called as this request from now on
        if self._is_open:
            self._tell(Close(self.request_id, 0, cached_ids=[]))
            self._slots.keep(self.request_id)

    def forget(self) -> None:
        if self._is_open:
            self._tell(Forget(self.request_id))
            self._slots.release(self.request_id)

    def close(self) -> None:
        """Nothing of the request is kept, nor of what it was to take over. Safe to call twice."""
        if self._is_open:
            self._tell(Close(self.request_id, 0))
        elif self._cached is not None:
            self._tell(Forget(self._cached[0]))
        self._is_open, self._cached = False, None
        self._slots.release(self.request_id)

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            cached_by, num_cached = self._cached or (None, 0)
            num_slots = self._slots.held_by(self.request_id)
            self._tell(Open(self.request_id, 0, self._root_id, [], False, cached_by, num_cached, num_slots))

    def _send(self, before: Sequence[int], rows: Rows, start: int) -> None:
        """Text from position ``start`` on, and nodes, as one segment."""
        num_before = len(before)
        before_ids = list(range(self._root_id - num_before, self._root_id))
        root_parent = before_ids[-1] if before_ids else NO_PARENT
        node_ids = [*before_ids, *(self._ids[node_id] for node_id in rows.node_ids)]
        parents = [root_parent if i == NO_PARENT else self._ids[i] for i in rows.parent_ids]
        parent_ids = [*(NO_PARENT, *before_ids[:-1])[:num_before], *parents]
        positions = [*range(start, start + num_before), *rows.positions]
        tokens = [*before, *rows.own_ids]
        self._num_text += num_before
        self._parents.update(zip(node_ids[num_before:], parents, strict=True))
        segment = Segment(self.request_id, 0, 0, node_ids, parent_ids, positions, num_before, tokens, None, [])
        self._tell(segment)

    def _tell(self, message: DataMessage | Commit) -> None:
        if not self._port.is_lost:
            self._port.send(message)


class RemoteModelSource:
    """A small model on a worker, shared by all requests. Drafts whose passes are lost go on with n-grams."""

    name = LANGUAGE_MODEL
    steady_steps = STEADY_STEPS
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(
        self,
        port: Port,
        tokens: TokenMap,
        max_positions: int,
        memory: Memory | None = None,
        num_slots: int | None = None,
    ) -> None:
        """``max_positions``: of the draft model. ``memory``: for n-grams. ``num_slots``: as of ``WorkerSlots``."""
        self._port = port
        self._tokens, self._max_positions = tokens, max_positions
        self._memory = memory
        self._request_ids = itertools.count()
        self._passes: dict[int, RemotePasses] = {}  # by the worker's request ids
        self._inner = ModelSource(self._open_passes, tokens, max_positions)
        self._ngrams = NgramSource(memory=memory)
        self.slots = WorkerSlots(num_slots, max_positions + MAX_ROWS, self._inner.forget_oldest)
        self.has_failed = False  # some request has had to go on with n-grams

    def _open_passes(self, root_id: int) -> RemotePasses:
        passes = RemotePasses(self._port, next(self._request_ids), self.slots)
        self._passes[passes.request_id] = passes
        return passes

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> RemoteDraft:
        inner = self._inner.open(prompt_ids, sampler, top_k)
        return RemoteDraft(self, inner, prompt_ids[:-1], lambda text_ids: self._ngrams.open(text_ids, sampler, top_k))

    def take(self, message: object) -> None:
        """What the worker has said."""
        match message:
            case Guesses() if (passes := self._passes.get(message.request_id)) is not None:
                passes.note(message)
            case Failed() if (passes := self._passes.get(message.request_id)) is not None:
                passes.fail(message.text)
            case _:
                pass

    @property
    def is_lost(self) -> bool:
        """Whether its drafts are n-grams from now on."""
        return self._port.is_lost

    def renewed(self, port: Port, num_slots: int | None) -> RemoteModelSource:
        """The same over another session."""
        return RemoteModelSource(port, self._tokens, self._max_positions, self._memory, num_slots)

    def leave(self, passes: RemotePasses) -> None:
        """The request has ended."""
        self._passes.pop(passes.request_id, None)
        self.has_failed |= passes.has_failed


class RemoteDraft:
    """One request: a draft model's, or n-grams from the time on when that is lost."""

    def __init__(
        self,
        source: RemoteModelSource,
        inner: ModelDraft,
        text_ids: Sequence[int],
        open_ngrams: Callable[[Sequence[int]], NgramDraft],
    ) -> None:
        """``text_ids``: before the root. ``open_ngrams``: of a text up to its root."""
        assert isinstance(inner.passes, RemotePasses)
        self._source = source
        self._inner = inner
        self._passes = inner.passes
        self._text_ids = list(text_ids)
        self._open_ngrams = open_ngrams
        self._fallback: NgramDraft | None = None

    @property
    def num_certain(self) -> int:
        return self._inner.num_certain

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        is_there = isinstance(other, ModelDraft) and isinstance(other.passes, RemotePasses) and not other.passes.is_lost
        if is_there:
            self._inner.reuse(other, num_cached)

    def end(self) -> ReusableDraft | None:
        self._source.leave(self._passes)
        if self._passes.is_lost:
            self._passes.close()
            return None
        return self._inner.end()

    @property
    def pass_s(self) -> float:
        return 0.0 if self._fallback is not None else self._passes.pass_s

    def go_apart(self) -> None:
        self._passes.waits = False

    def settle(self, tree: DraftTree) -> bool:
        return self._fallback is not None or self._inner.settle(tree) or self._passes.left_s <= 0

    def close(self) -> None:
        self._source.leave(self._passes)
        self._passes.close()

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """The prompt is known."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._text_ids += accepted.token_ids
        (self._fallback or self._inner).commit(accepted, tree)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        node_ids = tree.node_ids[rows]
        if not self._passes.is_lost:
            is_done = self._inner.expand(tree, rows)
            if not self._passes.is_lost:
                return is_done
        if self._fallback is None:
            self._fallback = self._open_ngrams([*self._text_ids, int(tree.token_ids[0])])
        return self._fallback.expand(tree, tree.rows_of(node_ids))
