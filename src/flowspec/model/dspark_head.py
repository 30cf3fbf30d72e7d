"""The DSpark draft head (arXiv 2607.05147): a DFlash head, and what the token above a row does to its guesses.

A row's logits are the lm_head's of the row, and those of the Markov head for the token above it. So one pass over a
block is good for every tree: below another token stand other guesses. The confidence head says of a row, behind a
token, how near the draft's distribution is to the target's: it was trained on the sum over all tokens of the smaller of
the two probabilities, at temperature 1 and with the right tokens above. That is how often rejection sampling takes a
token of the row, and no coupling of two draws makes one guess right more often. Knows nothing of trees.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspec.model.dflash_head import DFlashHead
from flowspec.model.dspark_format import DSparkFormat

_LEAST_RATE = math.log(1e-6)  # a guess with no hope at all is one of little


class _Matrix(nn.Module):
    """No ``Linear``, which integers would replace: little of it is read, or it is small."""

    bias: Tensor | None

    def __init__(self, num_rows: int, num_columns: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, num_columns))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_rows)) if has_bias else None)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)


class MarkovHead(nn.Module):
    """Of the token above a row, what is added to the row's logits, but for ``markov_w2``, the last matrix."""

    def __init__(self, form: DSparkFormat) -> None:
        super().__init__()
        rank, size = form.rank, form.config.hidden_size
        self.variant, self.rank = form.variant, rank
        self.markov_w1 = nn.Embedding(form.config.vocab_size, rank)
        self.markov_w2 = _Matrix(form.num_known, rank, has_bias=False)
        if form.variant == "gated":
            self.gate_proj = nn.Linear(size + rank, rank)
        elif form.variant == "rnn":
            self.joint_proj = nn.Linear(2 * rank + size, 3 * rank)

    def forward(self, rows: Tensor, tokens: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """``rows`` [n, D]; ``tokens`` [n, r], of ``markov_w1``; ``states`` [n, r], behind the tokens above those.

        Returns what ``markov_w2`` takes, and the states behind the tokens, both [n, r].
        """
        match self.variant:
            case "vanilla":
                return tokens, states
            case "gated":
                return torch.sigmoid(self.gate_proj(torch.cat((rows, tokens), dim=-1))) * tokens, states
            case _:
                keep, new, out = self.joint_proj(torch.cat((states, tokens, rows), dim=-1)).chunk(3, dim=-1)
                keep = torch.sigmoid(keep)
                return torch.tanh(out), keep * states + (1 - keep) * torch.tanh(new)


class ConfidenceHead(nn.Module):
    """[n, D or D + r] -> [n, 1], the log-odds of the rate that it was trained on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = _Matrix(1, width, has_bias=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.proj(inputs)


class DSparkHead(DFlashHead):
    """A loaded head."""

    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None

    def __init__(self, form: DSparkFormat, embedding: Tensor) -> None:
        super().__init__(form, embedding)
        self.markov_head = MarkovHead(form) if form.rank else None
        self._confidence_reads_token = form.confidence_reads_token
        width = form.config.hidden_size + (form.rank if form.confidence_reads_token else 0)
        self.confidence_head = ConfidenceHead(width) if form.has_confidence else None

    @property
    def is_recurrent(self) -> bool:
        """Guesses hang on all tokens since the anchor, and not on the last one alone."""
        return self.markov_head is not None and self.markov_head.variant == "rnn"

    def first_states(self, num: int) -> Tensor:
        """[num, r]: before the anchor."""
        return self.embedding.new_zeros(num, 0 if self.markov_head is None else self.markov_head.rank)

    def weights_of(self, token_ids: Tensor) -> Tensor | None:
        """Rows of ``markov_w2``, of tokens [C] by the draft's count: [C, r]; ``None``: there is no Markov head."""
        if self.markov_head is None:
            return None
        weight = self.markov_head.markov_w2.weight
        return weight[token_ids.to(weight.device)]

    @torch.inference_mode()
    def behind(self, rows: Tensor, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stands behind tokens [n] whose levels have the block's ``rows`` [n, D].

        ``states`` [n, r]: those behind the tokens above. Returns what ``markov_w2`` takes [n, r]; the states behind
        these tokens [n, r]; and the logarithms of the confidence head's rates [n], zero without one.
        """
        tokens = states[:, :0]
        latents = tokens
        if self.markov_head is not None:
            tokens = self.markov_head.markov_w1(token_ids.to(rows.device))
            latents, states = self.markov_head(rows, tokens, states)
        if self.confidence_head is None:
            return latents, states, rows.new_zeros(len(rows), dtype=torch.float32)
        inputs = torch.cat((rows, tokens), dim=-1) if self._confidence_reads_token else rows
        rates = F.logsigmoid(self.confidence_head(inputs)[:, 0].float())
        return latents, states, rates.nan_to_num(_LEAST_RATE).clamp(min=_LEAST_RATE)
