"""What a chat model's draft head is worth: tokens per target pass with an EAGLE-2 tree, and hit rates by level.

    python benchmarks/chat_draft.py smollm2 --prompts question.jsonl [--draft DIR] [--num-prompts 12]

One process, float32, no pipeline: the target answers each question, and drafts are checked against the answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowspec.bench.prompts import read_prompts
from flowspec.chat_template import ChatTemplate
from flowspec.draft.catalogue import choose_draft
from flowspec.errors import UsageError
from flowspec.model.backends import open_checkpoint
from flowspec.model.eagle_head import EagleHead
from flowspec.model.target_head import FewTokensHead, TargetHead
from flowspec.train.evaluate import EvaluationConfig, hit_rates, run_with_trees
from flowspec.train.frozen_target import embedding_of, load_model
from flowspec.train.own_text import continue_rows

SHORTEST = 8  # tokens of an answer that counts


class DraftedHead(nn.Module):
    """The target's lm_head, of the tokens that the draft guesses."""

    def __init__(self, head: EagleHead, lm_head: Tensor) -> None:
        super().__init__()
        ids = head.token_ids
        few = TargetHead(lm_head if ids is None else lm_head[ids])
        self._head = few if ids is None else FewTokensHead(few, ids, len(lm_head))

    def forward(self, features: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        rows = features.reshape(-1, features.shape[-1])
        return self._head.logits(rows).view(*features.shape[:-1], -1)


class Answers:
    """A chat model and its draft head, both in float32."""

    def __init__(self, name: str, draft: str) -> None:
        checkpoint = open_checkpoint(name)
        chosen = choose_draft(checkpoint, draft)
        if not isinstance(chosen, Path):
            raise UsageError(f"{name} has no draft head; train one, or name its directory with --draft")
        tokenizer: Any = checkpoint.load_tokenizer()
        self.template = ChatTemplate(tokenizer, name)
        self.end_ids = self.template.end_ids | {tokenizer.eos_token_id}
        self.model: Any = load_model(name, torch.float32).eval()
        self.head = EagleHead.load(chosen, embedding_of(self.model), "float32", "cpu")
        self.lm_head = DraftedHead(self.head, self.model.get_output_embeddings().weight)

    def answer(self, prompt_ids: list[int], max_new_tokens: int, temperature: float) -> Tensor:
        """Prompt and answer [T], to the answer's end."""
        length = len(prompt_ids) + max_new_tokens
        generator = torch.Generator().manual_seed(0)
        rows = continue_rows(self.model, torch.tensor([prompt_ids]), length, torch.tensor([temperature]), generator)
        answer = rows[0, len(prompt_ids) :].tolist()
        ends = [place for place, token_id in enumerate(answer) if token_id in self.end_ids]
        return rows[0, : len(prompt_ids) + ends[0] + 1] if ends else rows[0]


@torch.inference_mode()
def measure(answers: Answers, prompts: list[list[int]], max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Of all answers together."""
    num_tokens = num_passes = 0
    rates: list[list[float]] = []
    for prompt_ids in prompts:
        text = answers.answer(prompt_ids, max_new_tokens, temperature)
        if len(text) < len(prompt_ids) + SHORTEST:
            continue
        features = answers.model.base_model(input_ids=text[None], use_cache=False).last_hidden_state
        config = EvaluationConfig(prompt_len=len(prompt_ids))
        tokens, passes = run_with_trees(answers.head, answers.lm_head, text, features[0], config)
        num_tokens, num_passes = num_tokens + tokens, num_passes + passes
        rates.append(hit_rates(answers.head, answers.lm_head, text[None], features, len(prompt_ids), config.num_levels))
    if not num_passes:
        raise UsageError(f"no answer has {SHORTEST} tokens; ask other questions")
    return {
        "temperature": temperature,
        "num_answers": len(rates),
        "tokens_per_pass": round(num_tokens / num_passes, 3),
        "top_1_by_level": [round(sum(level) / len(rates), 3) for level in zip(*rates, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--prompts", type=Path, required=True, help="Spec-Bench's question.jsonl, or a prompt a line")
    parser.add_argument("--num-prompts", type=int, default=12, help="evenly spaced ones")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--max-prompt-tokens", type=int, default=700, help="longer prompts are cut")
    parser.add_argument("--temperatures", default="0,0.8,1")
    arguments = parser.parse_args()
    questions = [prompt.turns[0] for prompt in read_prompts(arguments.prompts)]
    questions = questions[:: max(1, len(questions) // arguments.num_prompts)][: arguments.num_prompts]
    answers = Answers(arguments.model, arguments.draft)
    prompts = [
        answers.template.encode([{"role": "user", "content": question}])[: arguments.max_prompt_tokens]
        for question in questions
    ]
    figures = [
        measure(answers, prompts, arguments.max_new_tokens, float(temperature))
        for temperature in arguments.temperatures.split(",")
    ]
    print(json.dumps({"model": arguments.model, "draft": str(arguments.draft), "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
