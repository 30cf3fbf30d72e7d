"""Rebuilds the shipped demo pair and its hints from nothing: ``python -m flowspec.train.demo``.

The corpus is the running interpreter's own standard library, so another Python version gives slightly other weights. An
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from textwrap import fill
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer

from flowspec.model.demo_pair import demo_directory, demo_draft_directory
from flowspec.model.eagle_head import EagleHead
from flowspec.model.hint_head import HintHead
from flowspec.train.corpus import Document, Tokens, encode_documents, read_stdlib, split_documents
from flowspec.train.eagle import train_head
from flowspec.train.evaluate import Evaluation, EvaluationConfig, evaluate
from flowspec.train.frozen_target import Target, embedding_of, load_model
from flowspec.train.hints import HintRecipe, train_hints
from flowspec.train.loop import write_atomically, write_json
from flowspec.train.target import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    TargetData,
    TargetRecipe,
    save_target,
    save_tokenizer,
    train_target,
    train_tokenizer,
)
from flowspec.train.windows import DraftRecipe

logger = logging.getLogger("flowspec.train")

HELD_OUT_SHARE = 0.04
DEMO_DIRECTORY = Path(__file__).resolve().parents[1] / "demo"
COMMAND = "python -m flowspec.train.demo"
LICENCE_NOTICE = """The training text is licensed under the PSF License Agreement, version 2 (PSF-2.0):
Copyright (c) 2001 Python Software Foundation; All Rights Reserved. The licence's text is at
https://docs.python.org/3/license.html; the Python Software Foundation neither made nor endorses this model.
"""


@dataclass(frozen=True)
class DemoBuild:
    """Everything that decides what comes out; the defaults are what was shipped."""

    target: TargetRecipe = field(default_factory=TargetRecipe)
    draft: DraftRecipe = field(default_factory=DraftRecipe)
    hints: HintRecipe = field(default_factory=HintRecipe)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    max_documents: int | None = None  # of modules, of tests, and held out; None takes all
    compiled: bool = True  # torch.compile and bfloat16: twice as fast, but takes a C++ compiler

    @classmethod
    def smoke(cls) -> DemoBuild:
        """Seconds instead of hours, through all of the same code."""
        target = TargetRecipe(
            num_tokens=2048,
            batch_tokens=512,
            context_len=64,
            long_context_len=128,
            vocab_size=512,
            num_layers=2,
            hidden_size=32,
            intermediate_size=64,
        )
        draft = DraftRecipe(
            num_tokens=1024,
            num_generated_tokens=256,
            generation_batch=2,
            context_len=64,
            prompt_len=16,
            batch_tokens=256,
        )
        evaluation = EvaluationConfig(num_prompts=2, prompt_len=16, num_new_tokens=16, loss_window_len=64)
        hints = HintRecipe(rank=4, num_tokens=1024, batch_tokens=256)
        return cls(target, draft, hints, evaluation, max_documents=5, compiled=False)


def build(plan: DemoBuild, work_dir: Path, out_dir: Path) -> Evaluation:
    """Train what ``work_dir`` does not hold already, write the pair into ``out_dir`` and measure it."""
    target_dir, draft_dir = out_dir / "target", out_dir / "draft"
    modules, tests = read_stdlib()
    split = split_documents(modules, HELD_OUT_SHARE)
    train, tests, held_out = (documents[: plan.max_documents] for documents in (split.train, tests, split.held_out))
    tokenizer = _tokenizer(train, plan.target, work_dir)
    save_tokenizer(tokenizer, target_dir, plan.target.long_context_len)
    train_ids, test_ids, held_out_ids = (
        encode_documents(documents, lambda text: tokenizer.encode(text).ids, END_OF_TEXT_ID)
        for documents in (train, tests, held_out)
    )
    data = TargetData(train_ids, test_ids, held_out_ids)
    logger.info("tokens: %d modules, %d tests, %d held out", len(data.train), len(data.tests), len(data.held_out))
    trained = train_target(
        plan.target, data, work_dir, compiled=plan.compiled, on_checkpoint=lambda model: save_target(model, target_dir)
    )
    save_target(trained, target_dir)

    target = Target.open(target_dir, compiled=plan.compiled)
    train_head(target, data.train, plan.draft, work_dir, draft_dir, compiled=plan.compiled)
    train_hints(target, data.train, plan.hints, plan.draft, work_dir, draft_dir)

    # What is measured is what is shipped: the weights as they come back from float16.
    model = load_model(target_dir, torch.float32)
    head = EagleHead.load(draft_dir, embedding_of(model), "float32", "cpu")
    result = evaluate(model, head, data.held_out, plan.evaluation, load_hints(draft_dir, model))
    head.note_hit_rates(result.sampled.hit_rates)
    head.save(draft_dir)
    write_json(out_dir / "evaluation.json", result.to_json())
    cards = {
        target_dir: target_card(plan, data, result),
        draft_dir: draft_card(plan, result),
    }
    for directory, text in cards.items():
        write_atomically(directory / "MODEL_CARD.md", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return result


def open_shipped() -> tuple[Any, EagleHead, Tokens]:
    """The shipped target and its draft head, in float32, and the text [T] that they are measured on."""
    target = load_model(demo_directory(), torch.float32)
    head = EagleHead.load(demo_draft_directory(), embedding_of(target), "float32", "cpu")
    tokenizer = FastTokenizer.from_file(str(demo_directory() / "tokenizer.json"))
    documents = split_documents(read_stdlib()[0], HELD_OUT_SHARE).held_out
    return target, head, encode_documents(documents, lambda text: tokenizer.encode(text).ids, END_OF_TEXT_ID)


def load_hints(draft_dir: Path, target: Any) -> list[HintHead]:
    """The hint heads of all boundaries of a target in float32."""
    config, lm_head = target.config, target.get_output_embeddings().weight
    loaded = (
        HintHead.load(draft_dir, num_layers, lm_head, config.rms_norm_eps, "float32", "cpu")
        for num_layers in range(1, config.num_hidden_layers)
    )
    return [head for head in loaded if head is not None]


def _tokenizer(documents: Sequence[Document], recipe: TargetRecipe, work_dir: Path) -> FastTokenizer:
    path = work_dir / "tokenizer.json"
    if not path.exists():
        trained = train_tokenizer((document.text for document in documents), recipe.vocab_size)
        save_tokenizer(trained, work_dir, recipe.long_context_len)
    return FastTokenizer.from_file(str(path))


def command_of(plan: DemoBuild) -> str:
    """The command line that builds this plan."""
    defaults, words = DemoBuild(), [COMMAND]
    if plan.target.num_tokens != defaults.target.num_tokens:
        words.append(f"--tokens {plan.target.num_tokens}")
    if plan.draft.num_tokens != defaults.draft.num_tokens:
        words.append(f"--draft-tokens {plan.draft.num_tokens}")
    if plan.hints.num_tokens != defaults.hints.num_tokens:
        words.append(f"--hint-tokens {plan.hints.num_tokens}")
    return " ".join(words)


def _wrapped(markdown: str) -> str:
    """Fill the paragraphs; headings and tables stay as they are."""
    blocks = markdown.strip().split("\n\n")
    return (
        "\n\n".join(b if b[0] in "#|" else fill(b, 120, break_long_words=False, break_on_hyphens=False) for b in blocks)
        + "\n"
    )


def target_card(plan: DemoBuild, data: TargetData, result: Evaluation) -> str:
    recipe = plan.target
    num_epochs = recipe.num_tokens * (1 - recipe.test_share) / len(data.train)
    return _wrapped(f"""# Demo target

A small Llama that writes text that looks like Python: {recipe.num_layers} layers, hidden size {recipe.hidden_size},
{recipe.num_heads} heads with {recipe.num_kv_heads} key-value heads, tied embeddings, float16 weights. Its byte-level
BPE vocabulary of {recipe.vocab_size} tokens returns every text unchanged; `{END_OF_TEXT}` separates documents and is
never added on its own. Context: {recipe.long_context_len} tokens. It exists so that pipelined speculative decoding can
be tried without a download; it is no assistant, and what it writes is seldom right.

## Data

The standard library of CPython {platform.python_version()} (`*.py`): {len(data.train)} tokens of modules and
{len(data.tests)} of its tests. Left out: files with a copyright or licence notice of anyone but the Python Software
Foundation, encodings and other tables, and {HELD_OUT_SHARE:.0%} of the modules, chosen by a hash of their paths, for
evaluation.

{LICENCE_NOTICE}
## Training

{recipe.num_steps} steps of {recipe.batch_tokens} tokens, {recipe.num_tokens / 1e6:g} million in all: {num_epochs:.1f}
times through the modules, and {recipe.test_share:.0%} of the windows from the tests. Windows of {recipe.context_len}
tokens, of {recipe.long_context_len} for the last {recipe.long_share:.0%}. Muon for the layers' matrices (learning rate
{recipe.matrix_learning_rate:g}, weight decay {recipe.weight_decay:g}), AdamW ({recipe.learning_rate:g}) for embedding
and norms; linear warm-up, linear decay to zero. Command: `{command_of(plan)}`.

## Measured

{result.to_markdown()}""")


def draft_card(plan: DemoBuild, result: Evaluation) -> str:
    recipe, hints = plan.draft, plan.hints
    num_generated = recipe.num_generation_batches * recipe.generation_batch * recipe.context_len
    is_unrolled = recipe.unroll_len > 1 and recipe.unroll_share > 0
    unrolled = f", the last {recipe.unroll_share:.0%} unrolled over {recipe.unroll_len} levels" if is_unrolled else ""
    return _wrapped(f"""# Draft head of the demo target

An EAGLE-1/2 head (one decoder layer, `fc` over token embedding and feature) in the published checkpoint format,
float16. It fits the demo target only.

## Data

Windows of {recipe.context_len} tokens: the modules that the target was trained on, and for {recipe.generated_share:.0%}
of the windows {recipe.prompt_len} tokens of them that the target itself continued: {num_generated / 1e6:.1f} million
tokens, {recipe.greedy_share:.0%} of the windows greedily, the others at temperature {recipe.temperature:g}.

{LICENCE_NOTICE}
## Training

{recipe.num_steps} steps of {recipe.rows_per_step * recipe.context_len} tokens,
{recipe.num_tokens / 1e6:g} million in all{unrolled}. Smooth-L1 loss on the features (weight {recipe.feature_weight:g})
and cross-entropy against the target's distribution ({recipe.token_weight:g}), uniform noise on the features, AdamW,
gradient values clipped at {recipe.max_gradient:g}. Command: `{command_of(plan)}`.

## Measured

{result.to_markdown()}
## Hints

`hints.safetensors` has a small head for every boundary between two layers of the target: it guesses a row's next token
from the hidden state that a worker sends on, while the row is still on its way. A tuned lens (arXiv 2303.08112) of rank
{hints.rank}: a norm, `down` and `up`, and the target's own lm_head. Trained with the command above on
{hints.num_tokens / 1e6:g} million tokens of the same windows: cross-entropy against the target's distribution, AdamW
({hints.learning_rate:g}).

{result.hints_to_markdown()}""")


def main(arguments: list[str] | None = None) -> None:
    defaults = DemoBuild()
    parser = argparse.ArgumentParser(prog=COMMAND, description="Rebuild the demo target, its draft head and its hints.")
    parser.add_argument("--tokens", type=int, default=defaults.target.num_tokens, help="the target's (%(default)s)")
    parser.add_argument("--draft-tokens", type=int, default=defaults.draft.num_tokens, help="the head's (%(default)s)")
    parser.add_argument("--hint-tokens", type=int, default=defaults.hints.num_tokens, help="the hints' (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice (%(default)s)")
    parser.add_argument("--work", type=Path, help="checkpoints (runs/demo; with --smoke, a temporary directory)")
    parser.add_argument("--out", type=Path, help="the pair (the package's own; with --smoke, a temporary directory)")
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler; slower")
    parser.add_argument("--smoke", action="store_true", help="a tiny pair in seconds, to try the code")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.smoke:
        plan, work_dir, out_dir = DemoBuild.smoke(), *(Path(mkdtemp(prefix="flowspec-demo-")) for _ in range(2))
    else:
        work_dir, out_dir = Path("runs/demo"), DEMO_DIRECTORY
        plan = replace(
            defaults,
            target=replace(defaults.target, num_tokens=options.tokens),
            draft=replace(defaults.draft, num_tokens=options.draft_tokens),
            hints=replace(defaults.hints, num_tokens=options.hint_tokens),
            compiled=not options.no_compile,
        )
    out_dir = options.out or out_dir
    result = build(plan, options.work or work_dir, out_dir)
    print(f"{result.to_markdown()}\n{result.hints_to_markdown()}")
    logger.info("written to %s", out_dir)


if __name__ == "__main__":
    main()
