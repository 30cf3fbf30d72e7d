"""One stage: a range of a model's layers, as transformers' own modules, run on the rows of one segment.

The first stage has the embedding, the last one the final norm; no stage has the lm_head, which is the driver's.
Attention here always applies the mask it is given, to a segment of a single row too: its siblings are in the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from flowspec.core import DType, LayerRange
from flowspec.errors import ModelError
from flowspec.model.kv_cache import CACHE_ARGUMENT, JointCache, KVCache, Part, SlotTable
from flowspec.model.loader import EMBEDDING, FINAL_NORM, Checkpoint

# Rotary embeddings whose frequencies do not depend on the length of the text, so that all segments agree on them.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

ATTENTION = "flowspec"  # the name of our attention function at transformers
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layer types


class Stage:
    """The layers ``[start, end)`` of a model on one device. It keeps nothing between segments but its weights."""

    def __init__(self, config: PreTrainedConfig, layers: LayerRange, modules: nn.ModuleDict, rotary: nn.Module) -> None:
        """``modules``: ``layers``, on the first stage ``embedding``, on the last ``norm``. Use ``load`` to make one."""
        types = layer_types(config)
        self.layers = layers
        self.hidden_size: int = config.hidden_size
        self.is_first = layers.start == 0
        self.is_last = layers.end == config.num_hidden_layers
        self.weights_bytes = sum(weight.nbytes for weight in modules.parameters())
        self._layers = list(modules["layers"].children())
        self._embedding = modules["embedding"] if self.is_first else None
        self._norm = modules["norm"] if self.is_last else None
        self._rotary = rotary
        self._types = types[layers.start : layers.end]
        self._window: int | None = config.sliding_window if SLIDING in self._types else None
        weight = next(modules.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.slot_bytes = (
            2 * len(layers) * config.num_key_value_heads * head_dim * self.dtype.itemsize
        )  # keys and values

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        layers: LayerRange,
        dtype: DType,
        device: str,
        progress: Callable[[float], None] | None = None,
    ) -> Stage:
        """Read the tensors of these layers and no others; ``progress`` is told the fraction that is done.

        Raises ``ModelError`` if the checkpoint has no such layers, cannot be cut, or does not fit its own config.
        """
        config = _checked_config(checkpoint, layers)
        checkpoint.check_layers()
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).model
        modules = nn.ModuleDict({"layers": nn.ModuleList(model.layers[layers.start : layers.end])})
        if layers.start == 0:
            modules["embedding"] = model.embed_tokens
        if layers.end == checkpoint.num_layers:
            modules["norm"] = model.norm
        _load_weights(checkpoint, layers, modules, dtype, device, progress)
        # Its frequencies are in no file; on the meta device they have no values.
        rotary = type(model.rotary_emb)(config=config).to(device)
        return cls(config, layers, modules.eval().requires_grad_(False), rotary)

    def open_cache(self, root_id: int | None = None) -> KVCache:
        """An empty cache for one request."""
        return KVCache(self.layers.start, len(self.layers), root_id)

    def forward(self, inputs: Tensor, slots: NDArray[np.int64], cache: KVCache) -> Tensor:
        """Run rows that have slots in the cache; return their hidden states [n, H], normed on the last stage.

        ``inputs``: token ids [n] on the first stage, hidden states [n, H] on the others.
        """
        *_, hidden = self.steps([Part(inputs, slots, cache)])
        assert hidden is not None
        return hidden

    @torch.inference_mode()
    def steps(self, parts: Sequence[Part]) -> Generator[Tensor | None]:
        """``forward`` of several requests' rows at once, with a pause after each layer but the last.

        ``None``s, then the hidden states [all rows, H], part by part; only a part that is alone may be empty, and no
        cache may occur twice. Until it ends, nothing may be placed in the caches; what is committed meanwhile does not
        concern it.
        """
        if not len(parts[0].slots):
            yield torch.empty(0, self.hidden_size, dtype=self.dtype, device=self.device)
            return
        positions = np.concatenate([part.cache.slots.positions[part.slots] for part in parts])
        positions = torch.from_numpy(positions)[None].to(self.device)
        all_masks = [self._masks(part) for part in parts]
        for part in parts:
            part.cache.write_at(torch.from_numpy(part.slots).to(self.device))
        cache, masks = parts[0].cache, all_masks[0]
        if len(parts) > 1:
            cache = JointCache([part.cache for part in parts], [len(part.slots) for part in parts])
            masks = {name: tuple(masks[name] for masks in all_masks) for name in masks}
        hidden = self._embed(torch.cat([part.inputs for part in parts]))[None]
        rotation = self._rotary(hidden, positions)
        for index, (layer, layer_type) in enumerate(zip(self._layers, self._types, strict=True)):
            if index:
                yield None
            hidden = layer(
                hidden,
                attention_mask=masks[layer_type],
                position_ids=positions,
                use_cache=True,
                position_embeddings=rotation,
                **{CACHE_ARGUMENT: cache},
            )
        yield (hidden if self._norm is None else self._norm(hidden))[0]

    def _embed(self, inputs: Tensor) -> Tensor:
        if self._embedding is None:
            return inputs.to(self.device, self.dtype)
        return self._embedding(inputs.to(self.device))

    def _masks(self, part: Part) -> dict[str, Any]:
        """Boolean masks [1, 1, n, high_water] by layer type; a window counts positions, since slots have no order."""
        table: SlotTable = part.cache.slots
        masks = {FULL: table.rows_mask(part.slots)}
        if self._window is not None:
            distances = table.positions[part.slots][:, None] - table.positions[: table.high_water]
            masks[SLIDING] = masks[FULL] & (distances < self._window)
        return {name: torch.from_numpy(rows)[None, None].to(self.device) for name, rows in masks.items()}


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | tuple[Tensor, ...],
    value: Tensor | tuple[Tensor, ...],
    attention_mask: Tensor | tuple[Tensor, ...] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, heads, n, d], key and value [B, kv_heads, slots, d].

    ``attention_mask``, [B or 1, 1, n, slots], is boolean or additive; the rows of all heads share it. In a forward of
    several requests there is one key, value and mask for each, and the query's rows are theirs in turn.

    The query heads that share a key head become rows of it. So keys are never repeated, and a single bfloat16 row of a
    grouped model stays on torch's fast path (14 times as fast as ``enable_gqa`` at 32 heads, 8 key heads, 1024 slots).
    """
    assert attention_mask is not None, "rows see what their mask says, and nothing else"
    if isinstance(attention_mask, tuple):
        queries = query.split([mask.shape[2] for mask in attention_mask], dim=2)
        parts = zip(queries, key, value, attention_mask, strict=True)
        return torch.cat([slot_attention(module, *part, scaling, dropout)[0] for part in parts], dim=1), None
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    batch, num_heads, num_rows, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    rows = query.reshape(batch, num_kv_heads, group * num_rows, head_dim)
    mask = attention_mask.repeat(1, 1, group, 1)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, num_heads, num_rows, head_dim).transpose(1, 2), None


AttentionInterface.register(ATTENTION, slot_attention)


def layer_types(config: PreTrainedConfig) -> list[str]:
    """What each layer of the whole model sees, FULL or SLIDING, by the rules of the families' own code."""
    match config.model_type:
        case "mistral":
            return [FULL if config.sliding_window is None else SLIDING] * config.num_hidden_layers
        case "qwen2" | "qwen3":
            return list(config.layer_types)
        case _:
            return [FULL] * config.num_hidden_layers


def _checked_config(checkpoint: Checkpoint, layers: LayerRange) -> PreTrainedConfig:
    """A copy of the config, after refusing what cannot be run as a stage."""
    config = copy.deepcopy(checkpoint.config)
    if layers.end > checkpoint.num_layers:
        raise ModelError(f"{checkpoint.name} has {checkpoint.num_layers} layers; there is no layer range {layers}")
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        raise ModelError(
            f"{checkpoint.name}: rotary scaling {rope_type!r} depends on the length of the text, so earlier keys would "
            f"be wrong; supported are {', '.join(STATIC_ROPE_TYPES)}: change rope_parameters in config.json"
        )
    types = layer_types(config)
    if not {FULL, SLIDING}.issuperset(types) or len(types) != checkpoint.num_layers:
        raise ModelError(
            f"{checkpoint.name}: layer_types in config.json must name {FULL} or {SLIDING} for each of the "
            f"{checkpoint.num_layers} layers"
        )
    if SLIDING in types and not config.sliding_window:
        raise ModelError(f"{checkpoint.name}: config.json has sliding layers but no sliding_window; set it")
    return config


def _load_weights(
    checkpoint: Checkpoint,
    layers: LayerRange,
    modules: nn.ModuleDict,
    dtype: DType,
    device: str,
    progress: Callable[[float], None] | None,
) -> None:
    """Replace the meta parameters by the checkpoint's tensors, one by one."""
    parameters = dict(modules.named_parameters())
    local_names = {_checkpoint_name(name, layers.start): name for name in parameters}
    _check_nothing_ignored(checkpoint, layers, local_names.keys())
    for num_loaded, (name, tensor) in enumerate(checkpoint.tensors(local_names, dtype, device), start=1):
        checkpoint.check_shape(name, tensor, tuple(parameters[local_names[name]].shape))
        modules.load_state_dict({local_names[name]: tensor}, strict=False, assign=True)
        if progress is not None:
            progress(num_loaded / len(local_names))


def _checkpoint_name(name: str, start: int) -> str:
    """``layers.0.mlp.up_proj.weight`` of a stage that starts at layer 4 is ``model.layers.4.mlp.up_proj.weight``."""
    match name.split(".", 2):
        case ["embedding", _]:
            return EMBEDDING
        case ["norm", _]:
            return FINAL_NORM
        case [_, index, rest]:
            return f"model.layers.{start + int(index)}.{rest}"
        case _:
            raise AssertionError(f"a stage has no parameter {name}")


def _check_nothing_ignored(checkpoint: Checkpoint, layers: LayerRange, expected: Any) -> None:
    """Raise if the files hold weights of these layers that the config has no place for, such as biases."""
    prefixes = tuple(f"model.layers.{index}." for index in range(layers.start, layers.end))
    for name in sorted(checkpoint.tensor_names() - expected):
        # Old Llama checkpoints carry the rotary frequencies, which follow from the config.
        if name.startswith(prefixes) and not name.endswith("rotary_emb.inv_freq"):
            raise ModelError(
                f"{checkpoint.name}: {checkpoint.shard_of(name)} holds {name}, which config.json has no place for; "
                "files and config do not belong together, download or save the model again"
            )
