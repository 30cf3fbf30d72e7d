"""Which format a model is in, which backend runs its stages, and what the driver's lm_head is made of."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowspec.core import DType, LayerRange, TapShape, Weights
from flowspec.errors import DoesNotFitError, ModelError, UsageError
from flowspec.model.demo_pair import DEMO
from flowspec.model.fetched import FETCHED, path_of
from flowspec.model.gguf_checkpoint import GGUF_SUFFIX, GGUFCheckpoint
from flowspec.model.loader import Checkpoint, is_hub_name
from flowspec.model.packed import Bits, pack
from flowspec.model.source import TensorSource
from flowspec.model.stage import Stage
from flowspec.model.stage_size import shapes_of, stage_bytes
from flowspec.model.taps import Linear, Taps, TorchLinear
from flowspec.model.target_head import LogitsHead, TargetHead
from flowspec.model.torch_stage import TorchStage

logger = logging.getLogger("flowspec.model")

_BITS: dict[Weights, Bits] = {"int8": 8, "int4": 4}
_BY_SIZE: tuple[Weights, ...] = ("float", "int8", "int4")  # the largest ones first
_ADVICE = "use --weights int4 or a smaller model, or share it with other devices (--workers)"
_COMPILED_WIDTH = 512  # from which on a model's floats are worth the start of numba


def open_checkpoint(name: str | Path) -> Checkpoint:
    """A directory, a GGUF file, a hub name, ``demo``, or what was fetched; reads the config alone.

    Raises ``ModelError``.
    """
    if name in FETCHED:
        return GGUFCheckpoint.open(path_of(str(name)))
    return GGUFCheckpoint.open(name) if str(name).endswith(GGUF_SUFFIX) else Checkpoint.open(name)


def find_checkpoint(name: str, may_ask_hub: bool) -> Checkpoint | None:
    """As ``open_checkpoint``, of what somebody else has named; ``None`` for what is not on this device.

    ``may_ask_hub``: what is not here by a hub's name is looked for there. Raises ``ModelError`` for what is here, and
    cannot be used.
    """
    if name in FETCHED:
        return open_checkpoint(name) if FETCHED[name].is_cached else None
    if name == DEMO or Path(name).expanduser().exists():
        return open_checkpoint(name)
    if not (may_ask_hub and is_hub_name(name)):
        return None
    try:
        return open_checkpoint(name)
    except ModelError as error:
        logger.info("%s", error)
        return None


def choose_weights(checkpoint: Checkpoint, weights: Weights, device: str) -> Weights:
    """What ``auto`` means: the kernels that hold a quantised file's own numbers; floats stay floats.

    Raises ``UsageError`` for what the device, or this installation, does not have.
    """
    is_cpu = torch.device(device).type == "cpu"
    if weights == "auto":
        if checkpoint.own_bits is None or not is_cpu:
            return "float"
        if not has_kernels(device):
            logger.warning(
                "%s is quantised, but is computed in floats, more slowly; integer kernels come with flowspec[cpu]",
                checkpoint.title,
            )
            return "float"
        return "int4" if checkpoint.own_bits == 4 else "int8"
    if weights in _BITS and not is_cpu:
        raise UsageError(f"{weights} weights are for processors, and the device is {device}; leave them at auto")
    _check_kernels(weights)
    return weights


def weights_to_try(checkpoint: Checkpoint, weights: Weights, device: str) -> Sequence[Weights]:
    """As ``choose_weights``, and behind it what ``auto`` takes in turn where that does not fit."""
    chosen = choose_weights(checkpoint, weights, device)
    if weights != "auto" or not has_kernels(device):
        return [chosen]
    return _BY_SIZE[_BY_SIZE.index(chosen) :]


def model_bytes(checkpoint: Checkpoint, dtype: DType, weights: Weights, device: str) -> int:
    """That its weights take, in all."""
    shapes = shapes_of(checkpoint, LayerRange(0, checkpoint.num_layers), with_lm_head=True).with_lm_head()
    return stage_bytes(shapes, dtype, weights, is_compiled(checkpoint.hidden_size, device), has_logits=True)


def check_fits(
    checkpoint: Checkpoint, dtype: DType, weights: Weights, device: str, num_bytes: int, advice: str = _ADVICE
) -> int:
    """``model_bytes``. Raises ``DoesNotFitError`` where these are more than ``num_bytes``."""
    wanted = model_bytes(checkpoint, dtype, weights, device)
    if wanted > num_bytes:
        raise DoesNotFitError(
            f"{checkpoint.title} takes {wanted / 1e9:.3g} GB in {weights}, and {max(0, num_bytes) / 1e9:.3g} GB are "
            f"free here; {advice}"
        )
    return wanted


def has_kernels(device: str) -> bool:
    """Whether there are compiled ones."""
    return torch.device(device).type == "cpu" and importlib.util.find_spec("numba") is not None


def _check_kernels(weights: Weights) -> None:
    if weights in _BITS and not has_kernels("cpu"):
        raise UsageError(f"{weights} weights need numba, which is not installed; install flowspec[cpu]")


def load_stage(
    source: TensorSource,
    layers: LayerRange,
    dtype: DType,
    weights: Weights,
    device: str,
    progress: Callable[[float], None] | None = None,
) -> Stage:
    """Read the tensors of these layers and no others; ``progress`` is told the fraction that is done.

    Raises ``ModelError`` if the source has no such layers, cannot be cut, or does not fit its config or the kernels;
    ``UsageError`` where these are missing.
    """
    if weights not in _BITS and not is_compiled(source.hidden_size, device):
        return TorchStage.load(source, layers, dtype, device, progress)
    _check_kernels(weights)
    from flowspec.model.compiled_stage import CompiledStage  # here: it is optional
    from flowspec.model.layer_tensors import UncompiledError

    try:
        return CompiledStage.load(source, layers, dtype, _BITS.get(weights, dtype), progress)
    except UncompiledError as error:
        if weights in _BITS:
            raise ModelError(f"{error}; use --weights float") from error
        logger.warning("%s; torch runs them, more slowly", error)
        return TorchStage.load(source, layers, dtype, device, progress)


def is_compiled(hidden_size: int, device: str) -> bool:
    """Whether a model's weights in floats are on compiled kernels, too."""
    return hidden_size >= _COMPILED_WIDTH and has_kernels(device)


def make_taps(
    shape: TapShape, layers: LayerRange, blocks: Mapping[int, Tensor], dtype: DType, weights: Weights, device: str
) -> Taps:
    """The share of the stage with these layers in a draft's features, on what the stage runs on.

    ``blocks``: matrices [D, H] by layer. In integers they have 8 bits, so that a row's bits are its own.
    """
    linears: dict[int, Linear]
    if weights not in _BITS:
        linears = {layer: TorchLinear(block, device) for layer, block in blocks.items()}
    else:
        _check_kernels(weights)
        from flowspec.model.compiled_stage import CompiledLinear  # here: it is optional

        linears = {layer: CompiledLinear(pack(block, 8)) for layer, block in blocks.items()}
    return Taps(shape, linears, getattr(torch, dtype), is_begun=shape.layers[0] < layers.start)


def stage_taps(
    shape: TapShape,
    layers: LayerRange,
    is_last: bool,
    block_of: Callable[[int], Tensor],
    dtype: DType,
    weights: Weights,
    device: str,
) -> Taps:
    """As ``make_taps``, of the blocks that a stage has use for; ``block_of``: the matrix [D, H] of a layer."""
    blocks = {layer: block_of(layer) for layer in shape.of_stage(layers, is_last)}
    return make_taps(shape, layers, blocks, dtype, weights, device)


def load_head(
    source: TensorSource, dtype: DType, weights: Weights, device: str, token_ids: Tensor | None = None
) -> LogitsHead:
    """The lm_head, or its rows of some tokens. Raises as ``load_stage`` does."""
    if weights not in _BITS and not is_compiled(source.hidden_size, device):
        matrix = source.load_lm_head(dtype, device)
        return TargetHead(matrix if token_ids is None else matrix[token_ids.to(matrix.device)])
    _check_kernels(weights)
    from flowspec.model.compiled_stage import CompiledHead  # here: it is optional

    return CompiledHead.load(source, _BITS.get(weights, dtype), token_ids)
