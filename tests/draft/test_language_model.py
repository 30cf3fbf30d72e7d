"""Small language models as drafts: exact with every schedule, as good as they are, whatever their tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engines import engine_of, run
from flowspec.config import PipelineConfig, TreeConfig
from flowspec.core import DraftDType, SamplingParams
from flowspec.draft import model_passes
from flowspec.draft.base import Accepted
from flowspec.draft.catalogue import choose_draft, load_draft
from flowspec.draft.eagle import GREEDY
from flowspec.draft.language_model import MAX_KEPT, ModelSource
from flowspec.draft.model_passes import CHUNK, LocalPasses
from flowspec.draft.token_map import TokenMap
from flowspec.errors import ModelError, UsageError
from flowspec.model.loader import Checkpoint
from flowspec.model.target_head import TargetHead
from flowspec.schedule.catalogue import AUTO, SCHEDULES
from flowspec.tree import DraftTree
from pump import Pump, prompt_of
from tiny_gguf import write_text_gguf
from tiny_models import make_checkpoint, make_text_checkpoint, make_text_tokenizer

SMALL = PipelineConfig(segment_len=5, prefill_chunk=7)
TREE = TreeConfig(top_k=4, width=4, depth=4, max_depth=6, size=24, min_probability=0.0)
ROOT = np.zeros(1, dtype=np.int64)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another family and size, with the same tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("small"), "mistral", seed=3, hidden_size=16, num_hidden_layers=2)


def source_of(target: Path, draft: Path, draft_dtype: DraftDType = "auto") -> ModelSource:
    checkpoint = Checkpoint.open(target)
    chosen = choose_draft(checkpoint, draft, draft_dtype)
    assert isinstance(chosen, Checkpoint)
    head = TargetHead(checkpoint.load_lm_head("float32", "cpu"))
    source = load_draft(chosen, checkpoint, head, "float32", "cpu", draft_dtype=draft_dtype)
    assert isinstance(source, ModelSource)
    return source


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("schedule", [*SCHEDULES[1:], AUTO])
def test_the_text_is_that_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, schedule: str, temperature: float
) -> None:
    target, params = checkpoint_dir("qwen3"), SamplingParams(max_tokens=16, temperature=temperature, seed=5)
    plain, drafted = (
        Pump(target, 1, "none", "ar"),
        Pump(target, 3, source_of(target, small_dir), schedule, TREE, SMALL),
    )
    generations = [pump.submit(prompt_of(20), params) for pump in (plain, drafted)]
    for pump in (plain, drafted):
        pump.run()
    assert generations[0].output_ids == generations[1].output_ids
    assert generations[1].stats.drafted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("schedule", ["serial", "flow"])
def test_the_target_itself_as_draft_is_always_right(
    checkpoint_dir: Callable[[str], Path], schedule: str, temperature: float
) -> None:
    target = checkpoint_dir("llama")
    tree = TreeConfig(top_k=1, depth=6, max_depth=12, root_passes=7, min_probability=0.0)
    pump = Pump(target, 2, source_of(target, target), schedule, tree=tree)
    generation = pump.submit([1, 4, 2, 5, 3], SamplingParams(max_tokens=50, temperature=temperature, seed=2))
    pump.run(lambda num_choices: min(len(pump.network.waiting()), num_choices - 1))
    stats = generation.stats
    assert stats.accepted == stats.drafted, "no guess was wrong"
    if schedule == "flow":
        assert (stats.accepted, stats.restarts) == (49, 0)
    else:
        assert stats.verdicts == 8 and stats.accepted == 42, "six guesses and a bonus token in each round"


def test_in_integers_it_is_smaller_and_no_token_is_another(checkpoint_dir: Callable[[str], Path]) -> None:
    """The target's own files, narrower, guess nearly as it does."""
    target, params = checkpoint_dir("qwen3"), SamplingParams(max_tokens=16)
    plain = Pump(target, 1, "none", "ar")
    wanted, sizes, shares = plain.submit(prompt_of(20), params), list[int](), list[float]()
    plain.run()
    for draft_dtype in get_args(DraftDType):
        source = source_of(target, target, draft_dtype)
        passes = source.open_passes(0)
        assert isinstance(passes, LocalPasses)
        sizes.append(passes._stage.weights_bytes)
        tree = TreeConfig(top_k=1, depth=4, root_passes=5, min_probability=0.0)
        pump = Pump(target, 2, source, "serial", tree, SMALL)
        drafted = pump.submit(prompt_of(20), params)
        pump.run()
        assert drafted.output_ids == wanted.output_ids
        shares.append(drafted.stats.accepted / drafted.stats.drafted)
    assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.2 * sizes[2], sizes
    assert shares[0] == 1.0 and min(shares) > 0.2, shares


def test_every_node_is_guessed_as_the_model_alone_guesses_behind_its_path(
    checkpoint_dir: Callable[[str], Path], small_dir: Path
) -> None:
    """A tree, a commit along one of its paths, and a tree again: what was not accepted must not be seen."""
    source = source_of(checkpoint_dir("qwen3"), small_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(small_dir, dtype=torch.float32).eval()
    text = prompt_of(2 * CHUNK + 9)
    draft, tree = source.open(text, GREEDY, 3), DraftTree(len(text) - 1, text[-1], 80)
    passes = 0
    while len(tree) == 1:
        assert draft.expand(tree, ROOT)
        passes += 1
    assert passes == 3, "the prompt is read in parts"

    def check() -> None:
        for row in np.flatnonzero(tree.staleness == 0):
            with torch.inference_mode():
                logits = model(torch.tensor([text[:-1] + tree.token_ids[tree.path(int(row))].tolist()])).logits[0, -1]
            best = logits.log_softmax(-1).topk(3)
            children = np.flatnonzero(tree.parents == row)
            assert tree.token_ids[children].tolist() == best.indices.tolist()
            assert np.allclose(tree.drafted[children], best.values.numpy(), atol=1e-4)

    for steps in (1, 2):
        draft.expand(tree, tree.best_at(1, 10))
        draft.expand(tree, tree.best_at(2, 4))
        check()
        path = tree.path(int(tree.best_at(2, 10)[-1]))[: steps + 1]
        accepted = Accepted(tree.node_ids[path[:-1]].tolist(), tree.token_ids[path[:-1]].tolist(), torch.zeros(1, 1))
        tree.reroot(path[-1])
        text = [*text[:-1], *accepted.token_ids, int(tree.token_ids[0])]
        draft.commit(accepted, tree)
        assert isinstance(draft.passes, LocalPasses)
        draft.passes.check_integrity()
        draft.expand(tree, ROOT)
    tree.restart(7)  # a token that nobody has guessed
    draft.commit(Accepted([tree.root_id - 1], [text[-1]], torch.zeros(1, 1)), tree)
    text = [*text, 7]
    assert draft.expand(tree, ROOT)
    check()


def test_nothing_is_guessed_behind_the_positions_that_the_draft_has(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    short = make_checkpoint(tmp_path / "short", "llama", num_hidden_layers=1, max_position_embeddings=24)
    target = checkpoint_dir("qwen3")
    plain, drafted = Pump(target, 1, "none", "ar"), Pump(target, 2, source_of(target, short), "flow", TREE)
    outputs = []
    for pump in (plain, drafted):
        generation = pump.submit(prompt_of(16), SamplingParams(max_tokens=24))
        pump.run()
        outputs.append(generation.output_ids)
    assert outputs[0] == outputs[1] and generation.stats.draft_passes > 0


def test_the_next_turn_reads_only_what_is_new(checkpoint_dir: Callable[[str], Path], small_dir: Path) -> None:
    target = checkpoint_dir("llama")
    source = source_of(target, small_dir)
    read: list[int] = []
    real = model_passes.forward
    counted = lambda stage, ids, *more: (read.append(len(ids)), real(stage, ids, *more))[1]  # noqa: E731
    pump, plain = Pump(target, 2, source, "flow", TREE, keeps_caches=True), Pump(target, 1, "none", "ar")
    prompt = prompt_of(50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_passes, "forward", counted)
        for turn in range(MAX_KEPT + 2):
            read.clear()
            generations = [each.submit(prompt, SamplingParams(max_tokens=12)) for each in (pump, plain)]
            for each in (pump, plain):
                each.run()
            assert generations[0].output_ids == generations[1].output_ids
            assert (max(read) < 20) == bool(turn), "the first turn has nothing to begin with"
            prompt = [*prompt, *generations[0].output_ids, 3, 5, 2]
        assert [draft.num_certain > 0 for draft in source._kept] == [True], "each turn has taken over the one before"
        for seed in range(MAX_KEPT + 1):
            pump.submit(prompt_of(30, seed), SamplingParams(max_tokens=2))
        pump.run()
    assert [draft.num_certain > 0 for draft in source._kept] == [True] * MAX_KEPT


# --- other tokenizers ---


def map_of(draft: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast, padding: int = 0) -> TokenMap:
    models: list[Any] = [
        SimpleNamespace(vocab_size=len(tokenizer) + padding, title=name)
        for tokenizer, name in ((draft, "small"), (target, "large"))
    ]
    return TokenMap(draft, target, *models)


def test_the_same_tokenizer_is_read_token_by_token_padding_included() -> None:
    tokenizer = make_text_tokenizer("byte-level")
    tokens = map_of(tokenizer, tokenizer, padding=5)
    assert tokens.num_shared == len(tokenizer) + 5
    assert tokens.read(17) == (17,)


@pytest.mark.parametrize(("draft", "target"), [("byte-level", "byte-fallback"), ("byte-fallback", "byte-level")])
def test_tokens_match_by_the_bytes_that_they_stand_for(draft: str, target: str) -> None:
    ours: Any = make_text_tokenizer(draft)
    theirs: Any = make_text_tokenizer(target)
    tokens = map_of(ours, theirs)
    assert tokens.num_shared > 250
    for text in ("hello world", "return argument\n", "the wörld"):
        for token_id in theirs(text, add_special_tokens=False).input_ids:
            own_ids = tokens.read(token_id)
            assert own_ids
            if len(own_ids) == 1:
                assert ours.decode(own_ids).strip() == theirs.decode([token_id]).strip()
    for name in ("<s>", "</s>"):
        assert tokens.read(theirs.convert_tokens_to_ids(name)) == (ours.convert_tokens_to_ids(name),)
    logits = torch.randn(2, len(ours))
    mapped = tokens.logits(logits)
    assert mapped.shape == (2, len(theirs)) and int(mapped[0].isfinite().sum()) == tokens.num_shared
    assert mapped[1, theirs.convert_tokens_to_ids("<s>")] == logits[1, ours.convert_tokens_to_ids("<s>")]


def test_too_few_tokens_in_common_are_an_error_that_counts_them(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    other = make_text_checkpoint(tmp_path / "other", "byte-level")
    with pytest.raises(
        ModelError, match=r"of the \d+ tokens of the draft model other, 0 match one of .*'s 96, and half"
    ):
        source_of(checkpoint_dir("qwen3"), other)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_with_another_tokenizer_changes_no_token(tmp_path: Path, temperature: float) -> None:
    target = make_text_checkpoint(tmp_path / "target", "byte-fallback")
    small = make_text_checkpoint(tmp_path / "small", "byte-level")
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=1)
    prompt = Checkpoint.open(target).load_tokenizer()("hello world, the wörld")["input_ids"]
    plain, drafted = Pump(target, 1, "none", "ar"), Pump(target, 2, source_of(target, small), "flow", TREE, SMALL)
    generations = [pump.submit(prompt, params) for pump in (plain, drafted)]
    for pump in (plain, drafted):
        pump.run()
    assert generations[0].output_ids == generations[1].output_ids
    assert generations[1].stats.drafted > 0


# --- how one is named ---


def test_an_engine_tells_a_model_from_a_head(checkpoint_dir: Callable[[str], Path], small_dir: Path) -> None:
    target = checkpoint_dir("llama")
    for directory in (target / "draft", target / "eagle3"):
        assert choose_draft(Checkpoint.open(target), directory) == directory
    texts = []
    for draft in ("none", small_dir):
        with engine_of(target, stages=2, in_process=True, draft=draft) as engine:
            job = engine.submit(prompt_of(20), SamplingParams(max_tokens=16))
            run(engine, [job])
            texts.append(job.output_ids)
            assert job.draft == ("none" if draft == "none" else "model")
    assert texts[0] == texts[1]


def test_a_gguf_file_drafts(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_text_gguf(path)
    target = make_text_checkpoint(tmp_path / "target", "byte-fallback")
    with engine_of(target, stages=1, in_process=True, draft=str(path)) as engine:
        assert isinstance(engine.model.source, ModelSource)
        job = engine.submit([5, 7, 9], SamplingParams(max_tokens=8), "serial")
        run(engine, [job])
        assert job.stats is not None and job.stats.drafted > 0


def test_what_is_no_draft_is_an_error(checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("llama"))
    with pytest.raises(UsageError, match="no draft in 'nowhere'; give the directory of a head or a small model"):
        choose_draft(checkpoint, "nowhere")
    with pytest.raises(ModelError, match=r"nowhere\.gguf is no file here"):
        choose_draft(checkpoint, "nowhere.gguf")
