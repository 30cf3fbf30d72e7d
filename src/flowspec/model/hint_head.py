"""Hint heads: guesses of the next token from a row that is still on its way through the layers.

Each is a tuned lens (Belrose et al., arXiv 2303.08112) of low rank for the boundary behind one layer, and reads the
residual stream as one worker sends it to the next. ``hints.safetensors``, beside the draft head's files, holds
``layers.{l}.norm.weight`` [H], ``layers.{l}.down.weight`` [rank, H] and ``layers.{l}.up.weight`` [H, rank] for every
boundary l = 1 .. number of layers - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspec.core import DType
from flowspec.errors import ModelError
from flowspec.model.demo_pair import DEMO, demo_draft_directory
from flowspec.model.source import TensorSource
from flowspec.model.tensor_files import StoredTensor, open_tensors, read_tensor, save_tensors, stored_tensors

_FILE = "hints.safetensors"
_PARTS = ("norm", "down", "up")
HINT_DEPTH = 0.6  # share of the layers behind which hints are right often enough to be worth their time


class HintHead(nn.Module):
    """Hidden states after ``num_layers`` layers -> logits of the next token: ``(x + up(down(x))) @ lm_head^T``.

    ``x`` is the RMS-normed hidden state.
    """

    lm_head: Tensor

    def __init__(self, num_layers: int, lm_head: Tensor, rank: int, rms_eps: float) -> None:
        """``lm_head`` [V, H] is the target's, shared, never trained and never stored."""
        super().__init__()
        size = lm_head.shape[1]
        self.num_layers = num_layers
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)
        self.norm = nn.RMSNorm(size, eps=rms_eps)
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, size, bias=False)

    @classmethod
    def logit_lens(cls, num_layers: int, norm: Tensor, lm_head: Tensor, rank: int, rms_eps: float) -> HintHead:
        """An untrained head: the target's own final norm, of weight ``norm`` [H], and lm_head, and nothing between."""
        head = cls(num_layers, lm_head, rank, rms_eps)
        with torch.no_grad():
            head.norm.weight.copy_(norm)
            head.up.weight.zero_()
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V] of the tokens that follow the rows of hidden states [..., H]."""
        weight = self.norm.weight
        rows = self.norm(hidden.to(weight.device, weight.dtype))
        rows = rows + self.up(self.down(rows))
        return F.linear(rows.to(self.lm_head.dtype), self.lm_head).float()

    @torch.inference_mode()
    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The at most ``k`` best next tokens of rows [n, H], best first: token ids and log-probabilities [n, k]."""
        logits = self(hidden)
        logprobs, token_ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]))
        return token_ids, logprobs

    @classmethod
    def load(
        cls,
        directory: Path,
        num_layers: int,
        lm_head: Tensor,
        rms_eps: float,
        dtype: DType,
        device: torch.device | str,
    ) -> HintHead | None:
        """Read the head behind the target's first ``num_layers`` layers; None where the draft has no hints.

        No other head is read. Raises ``ModelError`` for a truncated file and for one of another target.
        """
        path = directory / _FILE
        if not path.is_file():
            return None
        weights = {name: read_tensor(path, name, dtype, device) for name in _names(path, num_layers)}
        return cls.of(weights, num_layers, lm_head, rms_eps, dtype, device, str(path))

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        num_layers: int,
        lm_head: Tensor,
        rms_eps: float,
        dtype: DType,
        device: torch.device | str,
        where: str,
    ) -> HintHead:
        """``tensors``: by the names in its file, and on the device. ``where``: they come from, for errors."""
        prefix = _prefix(num_layers)
        weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if missing := {f"{name}.weight" for name in _PARTS} - weights.keys():
            raise ModelError(f"{where} lacks {prefix}{min(missing)}; install the same flowspec version on all devices")
        rank = max(1, weights["down.weight"].numel() // lm_head.shape[1])
        with torch.device("meta"):
            head = cls(num_layers, lm_head.to(device, getattr(torch, dtype)), rank, rms_eps)
        for name, tensor in head.state_dict().items():
            if weights[name].shape != tensor.shape:
                raise ModelError(
                    f"{where}: {prefix}{name} has shape {list(weights[name].shape)}, but {list(tensor.shape)} is "
                    "needed; train hints for this target, or remove the file"
                )
        head.load_state_dict(weights, assign=True)
        return head.eval().requires_grad_(False)


def load_hinter(draft: str | Path, source: TensorSource, num_layers: int, dtype: DType, device: str) -> HintHead | None:
    """The hint head behind the first ``num_layers`` layers; ``None`` where it is of no use, or the draft has none.

    ``draft``: its directory, or its place.
    """
    if not gives_hints(draft, source, num_layers):
        return None
    lm_head, eps = source.load_lm_head(dtype, device), source.config.rms_norm_eps
    if source.has_hints:
        return HintHead.of(
            source.hint_weights(dtype, device), num_layers, lm_head, eps, dtype, device, "what the driver has sent"
        )
    return HintHead.load(_directory(draft), num_layers, lm_head, eps, dtype, device)


def gives_hints(draft: str | Path, source: TensorSource, num_layers: int) -> bool:
    """Whether ``load_hinter`` loads one."""
    return _is_of_use(source.num_layers, num_layers) and (source.has_hints or (_directory(draft) / _FILE).is_file())


def stored_hints(draft: str | Path, model_layers: int, num_layers: int) -> dict[str, StoredTensor]:
    """Where the tensors lie of the head that ``load_hinter`` would load; none, where that is ``None``.

    ``model_layers``: that the model has in all. Raises ``ModelError``.
    """
    path = _directory(draft) / _FILE
    if not _is_of_use(model_layers, num_layers) or not path.is_file():
        return {}
    names, stored = _names(path, num_layers), stored_tensors(path)
    return {name: stored[name] for name in names}


def _directory(draft: str | Path) -> Path:
    return demo_draft_directory() if draft == DEMO else Path(draft)


def _is_of_use(model_layers: int, num_layers: int) -> bool:
    return HINT_DEPTH * model_layers <= num_layers < model_layers


def _names(path: Path, num_layers: int) -> list[str]:
    """Of a head's tensors, in the file of all heads. Raises ``ModelError`` where they are not in it."""
    names = [f"{_prefix(num_layers)}{name}.weight" for name in _PARTS]
    with open_tensors(path) as file:
        missing = sorted({*names} - {*file.keys()})
    if missing:
        raise ModelError(
            f"{path} lacks {', '.join(missing)}, so it has no hints after {num_layers} layers; "
            "train hints for this target, or remove the file"
        )
    return names


def save_hints(directory: Path, heads: Iterable[HintHead], dtype: torch.dtype = torch.float16) -> None:
    """Write the heads of all boundaries into ``hints.safetensors``, which is replaced at once or not at all."""
    tensors = {_prefix(head.num_layers) + name: tensor for head in heads for name, tensor in head.state_dict().items()}
    save_tensors(directory / _FILE, tensors, dtype)


def _prefix(num_layers: int) -> str:
    return f"layers.{num_layers}."
