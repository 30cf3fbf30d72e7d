"""One request in the driver: its tree, what is in flight, what was emitted, and the verbs that schedules are made of.

A generation decides nothing about timing; a schedule does. It does no I/O: what is to be sent collects in ``outbox``.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from flowspec.config import TreeConfig
from flowspec.core import Ending, FinishReason, TokenLogprobs
from flowspec.draft.base import Accepted, ApartDraft, BlockDraft, Draft, DraftSource, ReusableDraft
from flowspec.request.outbox import Outbox
from flowspec.request.prefix_cache import CachedPrefix, CacheEntry
from flowspec.request.request import Common, Request
from flowspec.request.result_check import check_result
from flowspec.request.slot_budget import slots_needed
from flowspec.request.stats import SegmentStats, Stats
from flowspec.request.verifier import Verdict, Verifier
from flowspec.request.work import Work, Working
from flowspec.sampling import Sampler
from flowspec.tree import UNDRAFTED, DraftTree, Ints
from flowspec.wire.actor import Send
from flowspec.wire.messages import NO_PARENT, Broken, Hint, Result


class Generation:
    """The state of one request; verbs: ``prefill``, ``send``, ``receive``, ``verify``, ``commit``, ``expand``.

    Lock-step schedules also ``send`` behind a gate, and ``step``.
    """

    def __init__(
        self,
        request: Request,
        common: Common,
        source: DraftSource | None,
        tree_config: TreeConfig,
        want_hints: bool = False,
        cached: CachedPrefix | None = None,
        slot_limit: int = 0,
        previous: Generation | None = None,
    ) -> None:
        """``cached``: of an earlier request with the same beginning. ``slot_limit``: see ``messages.Open``.

        ``previous``: the same request, as far as it had come when it was preempted. It goes on behind its output, in an
        epoch of its own.
        """
        self.request = request
        self.num_sharing = 1  # running requests that share the pipeline, this one included
        self.keeps_cache = common.keeps_caches
        self.clock = common.clock
        self.pipeline_config = common.pipeline
        self.epoch = 0
        self.output_ids: list[int] = []
        self.output_logprobs: list[TokenLogprobs] = []  # one for each token, where ``params.num_logprobs`` asks for it
        self.stats = Stats()
        first_segment_id = 0
        if previous is not None:
            self.epoch, self.stats = previous.epoch + 1, previous.stats
            first_segment_id = previous.outbox.next_segment_id
            self.output_ids, self.output_logprobs = previous.output_ids, previous.output_logprobs
        self.outbox = Outbox(request.request_id, self.epoch, first_segment_id)
        self.ending: Ending | None = None  # once nothing comes of it any more
        self.finish_reason: FinishReason | None = None  # of a text that is complete, or that nobody wants more of
        self.error: Exception | None = None  # what ended a request that failed
        text_ids = (*request.prompt_ids, *self.output_ids)
        self._text_ids = text_ids  # that prefill goes over; the last one is the first root
        self._cached = cached or CachedPrefix()
        self.num_cached = self._cached.num_cached  # prompt tokens that an earlier request had computed
        self._slot_limit = slot_limit
        self.num_prompt_verified = self.num_cached  # prompt tokens whose prefill has come back, or is kept
        self.in_flight: dict[int, Ints] = {}  # segment id -> the node ids that were alive at the last commit
        self._on_work = common.on_work
        self._sampler = Sampler(request.params, request.prompt_ids)
        self._sampler.extend(self.output_ids)
        self._verifier = Verifier(common.head, self._sampler, request.params, request.eos_ids)
        self._num_tokens = min(request.params.max_tokens, common.max_positions - len(request.prompt_ids))
        self._feature_layers = () if source is None else source.feature_layers
        self._want_hints = want_hints and source is not None
        self._draft: Draft | None = source.open(text_ids, self._sampler, tree_config.top_k) if source else None
        self._cached.give(self._draft)
        self._apart = self._draft if isinstance(self._draft, ApartDraft) else None
        self._block_len, self._block_start = 1 if source is None else source.block_len, -math.inf  # prefix at its pass
        self.num_passes = 0  # draft passes since the last commit; a level that a block draft reads counts as one
        self._num_prompt_sent = self._cached.num_cached
        self._root_parent_id = NO_PARENT
        self._unannounced: list[int] = []  # accepted nodes that the workers have not been told of
        self.accepted_ids: list[int] = []  # all accepted nodes, from the prompt's last one on
        self.prefix_len = len(text_ids) - 1  # committed tokens before the root; also the root's position
        self._root_is_draft = False
        self.tree = DraftTree(self.prefix_len, text_ids[-1], tree_config.size, tree_config.min_score)

    @property
    def is_finished(self) -> bool:
        return self.ending is not None

    @property
    def is_prompt_sent(self) -> bool:
        """Whether anything else may be sent: what follows the prompt goes behind it."""
        return self._num_prompt_sent == len(self._text_ids)

    @property
    def slots_needed(self) -> int:
        """That it needs now in each worker's cache."""
        return slots_needed(self.prefix_len + 1, self.tree.size)

    @property
    def num_left(self) -> int:
        """Tokens that may still be emitted."""
        return self._num_tokens - len(self.output_ids)

    def sent_s(self, segment_id: int) -> float | None:
        """When the driver began to send a segment; ``None`` for a part of the prompt, or an empty one."""
        segment = self.stats.by_segment.get(segment_id)
        return None if segment is None else segment.sent_s

    def _work(self, kind: Work, num_rows: int) -> Working:
        return Working(kind, num_rows, self._on_work, self.clock)

    # --- sending ---

    def prefill(self, max_chunks: int) -> None:
        """Open the request at every worker and begin to send the prompt, ``max_chunks`` segments of it at once."""
        root_id, want_hints = self.tree.root_id, self._want_hints
        self.outbox.open(root_id, self._feature_layers, want_hints, self._cached, self._slot_limit)
        self.tree.mark_sent(np.zeros(1, dtype=np.int64))  # it goes with the prompt's last segment
        for _ in range(max_chunks):
            self._send_chunk()

    def prompt_came_back(self) -> None:
        """A segment of the prompt has passed the pipeline: the next one may enter it."""
        self._send_chunk()

    def _send_chunk(self) -> None:
        text, start = self._text_ids, self._num_prompt_sent
        if start == len(text):
            return
        self._num_prompt_sent = min(start + self.pipeline_config.prefill_chunk, len(text))
        ids = list(range(start, self._num_prompt_sent))
        holds_root = ids[-1] == self.tree.root_id
        num_prefix, token_ids = len(ids) - holds_root, [text[i] for i in ids]
        segment_id = self.outbox.segment(ids, [i - 1 for i in ids], ids, token_ids, num_prefix, gate=None)
        self.in_flight[segment_id] = np.array(ids, dtype=np.int64)

    def reserve(self, slot_limit: int) -> None:
        """Let the workers' caches of this request grow to so many slots."""
        self._slot_limit = slot_limit
        self.outbox.reserve(slot_limit)

    def send(self, rows: Ints, gate: int | None = None) -> None:
        """Send these unsent rows of the tree as one segment; each one's parent was sent or goes with it.

        With a ``gate`` (see ``messages.Segment``) the segment may be empty.
        """
        tree = self.tree
        with self._work(Work.SEND, len(rows)):
            tree.mark_sent(rows)
            parents = tree.parents[rows]
            parent_ids = np.where(parents >= 0, tree.node_ids[parents], self._root_parent_id)
            if len(rows):
                self.stats.segments += 1
                self.stats.rows += len(rows)
                self.stats.drafted += len(rows) - bool(rows[0] == 0 and not self._root_is_draft)
                self.stats.by_segment[self.outbox.next_segment_id] = SegmentStats(len(rows), self.clock())
            node_ids = tree.node_ids[rows]
            positions, token_ids = tree.depths[rows] + self.prefix_len, tree.token_ids[rows]
            segment_id = self.outbox.segment(
                node_ids.tolist(), parent_ids.tolist(), positions.tolist(), token_ids.tolist(), num_prefix=0, gate=gate
            )
            if len(rows):
                self.in_flight[segment_id] = node_ids

    def step(self, number: int) -> None:
        """Let the segments run that wait for this step; what was committed before counts for them."""
        self.outbox.step(number)

    # --- verifying ---

    def receive(self, result: Result) -> None:
        """Keep the final hidden states and logits of the rows that are still alive."""
        sent = self.in_flight.pop(result.segment_id, None)
        if sent is None:
            return  # everything in it died while it was under way
        check_result(
            result, sent, int((sent < len(self._text_ids) - 1).sum()), self.tree.node_ids, self._feature_layers
        )
        self.stats.timings.append(tuple(result.timings))
        if result.num_prefix:
            self._receive_prompt(result)
        first = len(result.node_ids) - len(result.hidden)  # prefix rows have features alone, where there are such
        node_ids = np.array(result.node_ids[first:], dtype=np.int64)
        alive = np.isin(node_ids, self.tree.node_ids, assume_unique=True)
        if not alive.any():
            return
        kept = torch.from_numpy(alive)
        hidden = result.hidden[kept]
        features = None if result.features is None else result.features[first:][kept]
        with self._work(Work.LM_HEAD, len(hidden)):
            self._verifier.receive(node_ids[alive].tolist(), hidden, result.segment_id, features)
        self.stats.verified += 1
        if (segment := self.stats.by_segment.get(result.segment_id)) is not None:
            segment.num_verified = len(hidden)

    def _receive_prompt(self, result: Result) -> None:
        self.num_prompt_verified += result.num_prefix
        if self._draft is not None and self._feature_layers:
            features = result.hidden if result.features is None else result.features
            self._draft.read_prompt(result.node_ids[: result.num_prefix], features[: result.num_prefix])

    def verify(self) -> Verdict | None:
        """Follow the target from the root through the verified nodes; ``None`` when the root's logits are not here.

        Until it is committed, a verdict changes nothing. Raises ``NumericalError`` as ``Verifier.walk``.
        """
        if not self._verifier.knows(self.tree.root_id):
            return None
        with self._work(Work.VERIFY, len(self._verifier)):
            return self._verifier.walk(self.tree, self.prefix_len, self.num_left)

    def note_broken(self, broken: Broken) -> None:
        """As ``Verifier.note_broken``."""
        self._verifier.note_broken(broken)

    def commit(self, verdict: Verdict, announce: bool = True) -> None:
        """Emit the verdict's tokens, tell the workers, re-root the tree and let the draft read the true features.

        Without ``announce`` the workers hear of it with the next commit that is announced: dead nodes stay in flight.
        """
        tree, new_root = self.tree, verdict.new_root
        prefix_ids = tree.node_ids[verdict.accepted_rows].tolist()
        prefix_tokens = tree.token_ids[verdict.accepted_rows].tolist()
        features, segment_ids = self._verifier.take(prefix_ids)
        self.stats.note_verdict(segment_ids, len(verdict.token_ids) - (new_root is None))
        self.output_ids += verdict.token_ids
        self.output_logprobs += verdict.logprobs
        self._sampler.extend(verdict.token_ids)
        self.prefix_len += len(prefix_ids)
        self._root_parent_id, self._root_is_draft = prefix_ids[-1], new_root is not None
        self._unannounced += prefix_ids
        self.accepted_ids += prefix_ids
        if self._verifier.ends(verdict.token_ids) or not self.num_left:
            self.finish("stop" if self._verifier.ends(verdict.token_ids) else "length")
            return
        if new_root is None:
            tree.restart(verdict.token_ids[-1])
            self.stats.restarts += self._draft is not None
        else:
            tree.reroot(new_root)
        if announce:
            self.outbox.commit(self._unannounced, tree.root_id)
            self._unannounced = []
        self.num_passes = 0
        self._forget_dead()
        if self._draft is not None:
            self._draft.commit(Accepted(prefix_ids, prefix_tokens, features), tree)

    def _forget_dead(self) -> None:
        """Segments with no living row are no longer in flight: the workers drop them without a word."""
        tree = self.tree
        alive = {segment_id: tree.node_ids[tree.rows_of(ids)] for segment_id, ids in self.in_flight.items()}
        self.in_flight = {segment_id: ids for segment_id, ids in alive.items() if len(ids)}

    # --- drafting ---

    def draft_apart(self) -> None:
        """A pass that is made elsewhere may end later: its schedule looks at ``is_drafting``. Before anything else."""
        if self._apart is not None:
            self._apart.go_apart()

    @property
    def is_drafting(self) -> bool:
        """Whether a pass is under way elsewhere, and no other one can be made; what has come is in the tree."""
        return self._apart is not None and not self._apart.settle(self.tree)

    @property
    def apart_s(self) -> float:
        """What the last draft pass took that was made elsewhere."""
        return 0.0 if self._apart is None else self._apart.pass_s

    def resize_tree(self, config: TreeConfig) -> None:
        """Let the tree have so many nodes, and such ones, from now on."""
        self.tree.size, self.tree.min_score = config.size, config.min_score

    def propose(self, depth: int, width: int, steady_steps: int = 1) -> bool:
        """One draft pass over the ``width`` best nodes, above ``depth``, that gain by it; False when none does.

        What a block draft has guessed in a pass is read at once, best first, until no node gains any more.
        """
        depth = self._useful_depth(depth)
        if not self.expand(self.tree.worth_expanding(depth, width, steady_steps)):
            return False
        while self._block_len > 1 and self.expand(self.tree.worth_growing(depth, width)):
            pass
        return True

    def reread(self, depth: int, width: int) -> bool:
        """Let a root that was not foreseen have the guesses of a block draft's newest pass; False where it has none."""
        if self._block_len == 1 or self.block_depth < 1 or self.tree.staleness[0] != UNDRAFTED:
            return False
        assert isinstance(self._draft, BlockDraft)
        with self._work(Work.GROW, 1):
            self._draft.reread(self.tree)
        self.num_passes += 1
        while self.expand(self.tree.worth_growing(self._useful_depth(depth), width)):
            pass
        return True

    def propose_level(self, level: int, width: int) -> bool:
        """One draft pass over the best ``width`` nodes at a depth; False when there are none, or none is of use."""
        return level < self._useful_depth(level + 1) and self.expand(self.tree.best_at(level, width))

    @property
    def block_depth(self) -> float:
        """Levels below the root that a block draft has guessed; infinite for any other draft."""
        return self._block_start + self._block_len - self.prefix_len if self._block_len > 1 else math.inf

    def _useful_depth(self, depth: int) -> int:
        return min(depth, self.num_left - 1)  # whose logits are of use

    def expand(self, rows: Ints) -> bool:
        """One draft pass: the root alone, or rows whose parents have been expanded. False when none was made."""
        is_root = bool(len(rows)) and rows[0] == 0
        rows = rows if is_root else rows[self.tree.depths[rows] < self.block_depth]
        if self._draft is None or not len(rows):
            return False
        kind = Work.MERGE_PASS if is_root and len(self.tree) > 1 else Work.DRAFT_PASS
        kind = Work.GROW if self._block_len > 1 and not is_root else kind
        with self._work(kind, len(rows)):
            if not self._draft.expand(self.tree, rows):
                return False
        self._block_start = self.prefix_len if is_root else self._block_start
        self.num_passes += 1
        self.stats.draft_passes += kind is not Work.GROW
        return True

    def take_hint(self, hint: Hint) -> None:
        """Let what a worker guesses of rows under way overrule the draft."""
        node_ids = np.array(hint.node_ids, dtype=np.int64)
        is_open = np.isin(node_ids, self.tree.node_ids, assume_unique=True)
        if self.is_finished or not is_open.any():
            return
        with self._work(Work.HINT, len(node_ids)):
            rows = self.tree.rows_of(node_ids[is_open])
            token_ids = np.array(hint.token_ids, dtype=np.int64)[is_open]
            positions = self.tree.depths[rows] + self.prefix_len + 1
            logprobs = self._sampler.hint_logprobs(token_ids, np.array(hint.logprobs)[is_open], positions)
            self.tree.hint(rows, token_ids, logprobs)

    # --- ending ---

    def finish(self, reason: FinishReason) -> None:
        """The text is complete."""
        self._finish(Ending.FINISHED, reason)

    def cancel(self) -> None:
        """Nobody wants more of the text."""
        self._finish(Ending.CANCELLED, "stop")

    def _finish(self, ending: Ending, reason: FinishReason) -> None:
        if not self.is_finished:
            self.finish_reason = reason
            # Until all of the prompt has come back, nobody knows what of it the workers hold.
            self.keeps_cache &= self.num_prompt_verified >= len(self._text_ids) - 1
            self._end(ending)

    def fail(self, error: Exception) -> None:
        """Something went wrong in this request's work, and whatever state that has left is not used again."""
        if not self.is_finished:
            self.error, self.keeps_cache = error, False
            self._end(Ending.FAILED)

    def preempt(self) -> None:
        """Give the caches up. What was emitted stays; a later generation goes on behind it."""
        assert not self.is_finished, "it holds no caches"
        self.keeps_cache = False
        self.stats.preemptions += 1
        self._end(Ending.PREEMPTED)

    def _end(self, ending: Ending) -> None:
        """All that is in flight is dead, and ``Close`` follows it through the pipeline."""
        self.ending, self.in_flight = ending, {}
        if self._apart is not None and not self.keeps_cache:
            self._apart.close()
        self.outbox.end(self.accepted_ids if self.keeps_cache else None)

    def cache_entry(self) -> CacheEntry:
        """What an ended request that keeps its cache leaves in the prefix cache."""
        assert self.is_finished and self.keeps_cache
        tokens = (*self.request.prompt_ids, *self.output_ids)[: self.prefix_len]
        draft = self._draft.end() if isinstance(self._draft, ReusableDraft) else None
        return CacheEntry(self.request.request_id, tokens, draft)

    def take_outbox(self) -> list[Send]:
        return self.outbox.take()
