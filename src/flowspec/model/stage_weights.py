"""The layers of one stage as transformers' own modules, filled from a tensor source. Nothing is run here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from flowspec.core import DType, LayerRange
from flowspec.errors import ModelError, first_line
from flowspec.model.attention import ATTENTION
from flowspec.model.families import PREFIX, SHORT_ROPE, embedding_scale, family_of, layer_prefix
from flowspec.model.source import TensorSource

# One expert after the other, with the kernels of all other linear layers, and what a row gets of them added up by the
# experts' numbers. Only the weights that some row needs are read, and none is copied.
EXPERTS = "eager"


def checked_config(source: TensorSource, layers: LayerRange) -> PreTrainedConfig:
    """A copy of the config; raises ``ModelError`` for what cannot be run as a stage."""
    config = copy.deepcopy(source.config)
    source.check_range(layers)
    family_of(config.model_type, source.name).check(config, source.name)
    source.check_layers()
    return config


def bare_model(config: PreTrainedConfig, attention: str) -> Any:
    """The model below its lm_head, without values; ``attention``: the name of an attention function."""
    try:
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, experts_implementation=EXPERTS, trust_remote_code=False
            )
            return whole.model.eval()  # without dropout
    except Exception as error:  # whatever transformers meets in what somebody has written
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"no model can be made by its config.json ({reason}); download or mend the file") from error


def rotary_of(model: Any, config: PreTrainedConfig) -> nn.Module:
    """The rotary embedding: its frequencies are in no file, and on the meta device they have no values."""
    rotary = type(model.rotary_emb)(config=config)
    if getattr(rotary, "rope_type", None) == SHORT_ROPE:
        rotary.rope_type = "default"  # it keeps the frequencies of short texts, whatever positions a tree has
    return rotary


def load_modules(
    source: TensorSource,
    config: PreTrainedConfig,
    layers: LayerRange,
    dtype: DType,
    device: str,
    progress: Callable[[float], None] | None = None,
) -> nn.ModuleDict:
    """``layers``, by their indices in the model, ``rotary_emb``, and at the ends ``embed_tokens`` and ``norm``.

    No other tensor is read; ``progress`` is told the fraction that is done.
    """
    model = bare_model(config, ATTENTION)
    own_layers = nn.ModuleDict({str(index): model.layers[index] for index in range(layers.start, layers.end)})
    modules = nn.ModuleDict({"layers": own_layers})
    if layers.start == 0:
        modules["embed_tokens"] = model.embed_tokens
    if layers.end == source.num_layers:
        modules["norm"] = model.norm
    _fill(modules, source, layers, dtype, device, progress)
    if layers.start == 0 and hasattr(modules["embed_tokens"], "embed_scale"):
        scale = embedding_scale(config)  # in no file, as the frequencies
        modules["embed_tokens"].embed_scale = torch.tensor(scale, device=device)
    modules["rotary_emb"] = rotary_of(model, config).to(device)
    return modules.eval().requires_grad_(False)


def _fill(
    modules: nn.ModuleDict,
    source: TensorSource,
    layers: LayerRange,
    dtype: DType,
    device: str,
    progress: Callable[[float], None] | None,
) -> None:
    """Replace the meta parameters by the source's tensors."""
    shapes = {PREFIX + name: tuple(parameter.shape) for name, parameter in modules.named_parameters()}
    check_nothing_ignored(source, layers, shapes)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in source.module_tensors(shapes, dtype, device):
        tensors[name.removeprefix(PREFIX)] = tensor
        if progress is not None:
            progress(len(tensors) / len(shapes))
    modules.load_state_dict(tensors, strict=False, assign=True)  # once: it walks through all modules


def check_nothing_ignored(source: TensorSource, layers: LayerRange, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if there are weights of these layers that the config has no place for, such as biases.

    ``shapes``: of the modules' tensors, by their names.
    """
    expected = {piece.name for pieces in source.pieces(shapes).values() for piece in pieces}
    prefixes = tuple(layer_prefix(index) for index in range(layers.start, layers.end))
    for name in sorted(source.tensor_names() - expected):
        # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
        if name.startswith(prefixes) and not name.endswith("rotary_emb.inv_freq"):
            raise ModelError(
                f"{source.name}: {source.shard_of(name)} holds {name}, which config.json has no place for; "
                "files and config do not belong together, download or save the model again"
            )
