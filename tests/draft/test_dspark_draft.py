"""Trees of a DSpark block: what stands below a node hangs on its level and its token, and costs no pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_dflash2
from flowspec.core import SamplingParams
from flowspec.draft.base import Accepted
from flowspec.draft.catalogue import load_draft, read_taps
from flowspec.draft.dspark import DSparkDraft, DSparkSource
from flowspec.model.loader import Checkpoint
from flowspec.model.target_head import TargetHead
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree
from tiny_dflash2 import DFlash2Form, write_dflash2
from tiny_dspark import DSparkForm, Reference, write_dspark
from tiny_eagle3 import TARGET
from tiny_models import make_checkpoint

ROOT, TOP_K, PROMPT = np.zeros(1, dtype=np.int64), 3, [3, 1, 4, 1, 5, 9]
FORMS = {
    "plain": DSparkForm(block_size=4),
    "few tokens": DSparkForm(block_size=4, num_draft=50, confidence="row"),
    "recurrent": DSparkForm(block_size=4, variant="rnn"),
    "DFlash2": DFlash2Form(block_size=5),
    "nothing but rows": DSparkForm("deepspec", block_size=4, rank=0, confidence="none"),
}


class Case:
    """A head that has read a prompt's random streams, and the reference beside it."""

    def __init__(self, checkpoint: Checkpoint, directory: Path, form: Any, params: SamplingParams) -> None:
        is_selector = isinstance(form, DFlash2Form)
        weights = write_dflash2(directory, form) if is_selector else write_dspark(directory, form)
        taps = read_taps(directory, checkpoint)
        assert taps is not None
        lm_head, embedding = checkpoint.load_lm_head("float32", "cpu"), checkpoint.load_embedding("float32", "cpu")
        source = load_draft(directory, checkpoint, TargetHead(lm_head), "float32", "cpu", taps=taps)
        assert isinstance(source, DSparkSource) and source.block_len == form.num_levels
        self.num_passes = 0
        head: Any = source.head
        guess = head.guess

        def counted(token_id: int, cache: Any) -> torch.Tensor:
            self.num_passes += 1
            return guess(token_id, cache)

        head.guess = counted
        generator = torch.Generator().manual_seed(2)
        self.streams = [torch.randn(40, TARGET, generator=generator) for _ in form.tapped]
        self._blocks = [taps.block(layer, torch.float32) for layer in taps.layer_ids]
        kind: Any = tiny_dflash2.Reference if is_selector else Reference
        self.reference = kind(form, weights, embedding, lm_head)
        self.sampler = Sampler(params)
        self.draft: DSparkDraft = source.open(PROMPT, self.sampler, TOP_K)
        self.draft.read_prompt(range(len(PROMPT) - 1), self.features(0, len(PROMPT) - 1))
        self.tree = DraftTree(len(PROMPT) - 1, PROMPT[-1], 60)

    def features(self, start: int, end: int) -> torch.Tensor:
        sums = [rows[start:end] @ block.T for rows, block in zip(self.streams, self._blocks, strict=True)]
        return torch.stack(sums).sum(0)

    def children(self, row: int) -> tuple[list[int], list[float]]:
        rows = np.flatnonzero(self.tree.parents == row)
        order = np.argsort(-self.tree.logprobs[rows], kind="stable")
        return self.tree.token_ids[rows[order]].tolist(), self.tree.logprobs[rows[order]].tolist()

    def check(self, row: int, path: list[int], text_len: int, position: int) -> None:
        """The row's children are those that the paper's head makes of a chain from the anchor to the row."""
        logits, rate = self.reference.behind([rows[:text_len] for rows in self.streams], path)
        token_ids, logprobs = self.sampler.draft_children(logits[None], np.array([position]), TOP_K)
        found = self.children(row)
        assert found[0] == token_ids[0].tolist()
        np.testing.assert_allclose(found[1], logprobs[0] + np.log(rate), atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("target"), "qwen3"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_children_hang_on_the_token_above_them(
    checkpoint: Checkpoint, tmp_path: Path, form: DSparkForm | DFlash2Form, temperature: float
) -> None:
    """At temperature 1 they are those that are drawn with the noise of their position, if the draft is right."""
    case = Case(checkpoint, tmp_path, form, SamplingParams(temperature=temperature, seed=4))
    draft, tree, end = case.draft, case.tree, len(PROMPT) - 1
    assert draft.expand(tree, ROOT)
    for depth in range(1, form.num_levels):
        draft.expand(tree, np.flatnonzero(tree.depths == depth)[:4])
    assert case.num_passes == 1
    expanded = sorted(set(tree.parents[1:].tolist()))
    assert len(expanded) == 1 + 3 + 4 * (form.num_levels - 2)
    for row in expanded:
        path = tree.token_ids[tree.path(row)].tolist()
        case.check(row, path, end, end + len(path))
    told = {tuple(np.round(case.children(row)[1], 6)) for row in expanded if tree.depths[row] == 1}
    assert (len(told) > 1) == bool(form.rank), "a level's guesses are not the same behind every token"


@pytest.mark.parametrize("form", [FORMS["plain"], FORMS["recurrent"]], ids=["plain", "recurrent"])
def test_a_root_that_nobody_foresaw_has_guesses_of_its_own(
    checkpoint: Checkpoint, tmp_path: Path, form: DSparkForm
) -> None:
    case = Case(checkpoint, tmp_path, form, SamplingParams())
    draft, tree, end = case.draft, case.tree, len(PROMPT) - 1
    draft.expand(tree, ROOT)
    first, first_id = case.children(0)[0][0], int(tree.node_ids[tree.find(0, case.children(0)[0][0])])
    foreign = next(token for token in range(90) if token not in case.children(0)[0])
    accepted = Accepted([tree.root_id, first_id], [PROMPT[-1], first], case.features(end, end + 2))
    tree.restart(foreign)
    draft.commit(accepted, tree)
    draft.reread(tree)
    assert case.num_passes == 1
    case.check(0, [PROMPT[-1], first, foreign], end, end + 3)
    deeper = int(np.flatnonzero(tree.depths == 1)[0])
    draft.expand(tree, np.array([deeper]))
    case.check(deeper, [PROMPT[-1], first, foreign, int(tree.token_ids[deeper])], end, end + 4)
    tree.restart(foreign)
    draft.expand(tree, ROOT)  # a block of its own
    assert case.num_passes == 2
    case.check(0, [foreign], end + 2, end + 3)


def test_of_many_tokens_those_are_corrected_that_the_level_finds_likely(checkpoint: Checkpoint, tmp_path: Path) -> None:
    form = DSparkForm(block_size=4, num_draft=50, confidence="none")
    case = Case(checkpoint, tmp_path, form, SamplingParams())
    case.draft._num_candidates, end = 6, len(PROMPT) - 1
    case.draft.expand(case.tree, ROOT)
    texts = [rows[:end] for rows in case.streams]
    likely = case.reference.logits(texts, PROMPT[-1])[0].topk(6).indices
    corrected = case.reference.behind(texts, PROMPT[-1:])[0][likely].log_softmax(-1)
    best = corrected.topk(TOP_K)
    token_ids, logprobs = case.children(0)
    assert token_ids == likely[best.indices].tolist()
    np.testing.assert_allclose(logprobs, best.values, atol=1e-4)


def test_a_rate_scales_all_below_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A node's score is what the draft gives its tokens, times the rates of all levels down to it."""
    form = DSparkForm(block_size=4)
    case = Case(checkpoint, tmp_path, form, SamplingParams())
    draft, tree, end = case.draft, case.tree, len(PROMPT) - 1
    draft.expand(tree, ROOT)
    draft.expand(tree, np.array([1]))
    child = int(np.flatnonzero(tree.parents == 1)[0])
    path, expected = tree.token_ids[tree.path(child)].tolist(), 0.0
    for level in range(2):
        logits, rate = case.reference.behind([rows[:end] for rows in case.streams], path[: level + 1])
        expected += float(logits.log_softmax(-1)[path[level + 1]]) + np.log(rate)
    assert tree.scores[child] == pytest.approx(expected, abs=1e-4)
