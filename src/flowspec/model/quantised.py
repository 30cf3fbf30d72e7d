"""What stands for a weight in a quantised checkpoint: GPTQ, AWQ, compressed-tensors and FP8. Reads no files.

A linear layer's ``weight`` is in parts there: codes of 4 or 8 bits, scales of groups of inputs (or of blocks), zero
points. A layout says which parts make which weight, and what they mean, as the libraries of that name write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowspec.errors import ModelError, first_line, shortened
from flowspec.model.packed import GROUP, Bits, PackedWeight

Parts: TypeAlias = Mapping[str, Tensor]  # by the ends of their names
Shape: TypeAlias = tuple[int, ...]

_WEIGHT = "weight"
_WORD = 32  # bits of the integers that small codes are packed into
# Of activations and caches in few bits, which stay floats here.
_NOT_OF_WEIGHTS = ("input_scale", "input_zero_point", "k_scale", "v_scale", "output_scale")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight codes of a word lie in it


@dataclass(frozen=True)
class Codes:
    """A weight [N, K]: ``(code - zero point) * scale``."""

    values: Tensor  # [N, K], int16 or of a float type of 8 bits
    scales: Tensor  # [N, G], float32
    zero_points: Tensor | None  # [N, G], int16
    groups: Tensor  # [K]: of the inputs

    def floats(self) -> Tensor:
        """float32 [N, K]."""
        values = self.values.float()
        if self.zero_points is not None:
            values -= self.zero_points[:, self.groups]
        return values.mul_(self.scales[:, self.groups])

    def packed(self, bits: Bits) -> PackedWeight | None:
        """The same codes as integer kernels read them; ``None`` where these have no such codes, groups or scales."""
        num_rows, num_inputs = self.values.shape
        size = num_inputs if num_inputs % GROUP else GROUP
        groups = self.groups.reshape(-1, size)
        if self.values.is_floating_point() or (groups != groups[:, :1]).any() or (size != GROUP and bits == 4):
            return None
        scales = self.scales[:, groups[:, 0]].half()
        zeros = torch.zeros_like(scales, dtype=torch.int16)
        if self.zero_points is not None:
            zeros = self.zero_points[:, groups[:, 0]]
        values = self.values.reshape(num_rows, -1, size)
        if bits == 8:
            values, zeros = values - zeros[..., None], torch.zeros_like(zeros)
        low, high = (-128, 127) if bits == 8 else (0, 15)
        if not scales.isfinite().all() or not all(low <= each.min() and each.max() <= high for each in (values, zeros)):
            return None
        zero_points = None if bits == 8 else zeros[..., None].numpy().astype(np.uint8)
        codes = values.numpy().astype(np.int8 if bits == 8 else np.uint8)
        return PackedWeight(codes, scales[..., None].numpy(), zero_points)


@dataclass(frozen=True)
class Layout:
    """How one way to quantise stores the weight of a linear layer."""

    title: str
    needed: tuple[str, ...]  # ends of the names of the parts; by the first one a quantised weight is known
    codes_of: Callable[[Parts], Codes]  # raises ValueError
    shape_of: Callable[[Mapping[str, Shape]], Shape]  # of the weight, by the shapes of its parts
    own_bits: Bits  # of the integer kernels that hold its codes, or lose next to nothing of them
    optional: tuple[str, ...] = ()

    @property
    def _all(self) -> tuple[str, ...]:
        return (*self.needed, *self.optional)

    def weights_among(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """What stands for each of the model's tensors, by its name, where a file has tensors of these ``names``."""
        stored = set(names)
        stems = {name.removesuffix(self.needed[0]) for name in stored if name.endswith("." + self.needed[0])}
        # A float weight is one by itself; where codes bear its name, too, their scales tell.
        stems = {stem for stem in stems if all(stem + end in stored for end in self.needed)}
        found: dict[str, tuple[str, ...]] = {}
        for name in stored:
            stem, _, end = name.rpartition(".")
            if end in _NOT_OF_WEIGHTS or (stem + "." in stems and end in self._all):
                continue
            found[name] = (name,)
        for stem in stems:
            found[stem + _WEIGHT] = tuple(stem + end for end in self._all if stem + end in stored)
        return found

    def wide_among(self, names: Iterable[str]) -> frozenset[str]:
        """Of the model's tensors, those that are not in codes, where codes have 4 bits."""
        weights = self.weights_among(names) if self.own_bits == 4 else {}
        return frozenset(name for name, parts in weights.items() if len(parts) == 1)

    def weight_shapes(self, stored: Mapping[str, Shape]) -> dict[str, Shape]:
        """Of the model's tensors, by their names. ``stored``: the shapes of what a file has. Raises ``ModelError``."""
        shapes: dict[str, Shape] = {}
        for name, parts in self.weights_among(stored).items():
            if len(parts) == 1:
                shapes[name] = stored[name]
            else:
                by_end = {part.rpartition(".")[2]: stored[part] for part in parts}
                try:
                    shapes[name] = self.shape_of(by_end)
                except (ValueError, IndexError) as error:
                    raise self._unfit(name, "what is stored", f"shapes {by_end}") from error
        return shapes

    def read(self, name: str, parts: Mapping[str, Tensor], where: str) -> Codes:
        """``parts``: by their names in the file. Raises ``ModelError`` for what does not fit together."""
        try:
            return self.codes_of({part.rpartition(".")[2]: tensor for part, tensor in parts.items()})
        except (ValueError, KeyError, RuntimeError, IndexError) as error:
            raise self._unfit(name, where, first_line(error)) from error

    def _unfit(self, name: str, where: str, reason: str) -> ModelError:
        return ModelError(
            f"{where}: what stands for {name} makes no {self.title} weight ({reason}); files and config do not belong "
            "together, download the model again"
        )


def layout_of(config: object, where: str) -> Layout:
    """By ``quantization_config`` in config.json, which lies at ``where``. Raises ``ModelError`` for all others."""
    if not isinstance(config, dict):
        raise ModelError(f"{where}: quantization_config must be an object; download or mend the file")
    method = config.get("quant_method")
    match method:
        case "gptq":
            return _gptq(config, where)
        case "awq":
            _require_one_of(config, ("version", "format"), ("gemm",), where)
            return Layout("AWQ", ("qweight", "qzeros", "scales"), _awq_codes, _awq_shape, 4)
        case "compressed-tensors":
            return _compressed_tensors(config, where)
        case "fp8":
            block = _block_of(config.get("weight_block_size"), where)
            scale = "weight_scale" if block is None else "weight_scale_inv"
            return Layout("FP8", (_WEIGHT, scale), partial(_scaled_codes, block=block), _same_shape, 8)
        case _:
            raise ModelError(
                f"{where}: the checkpoint is quantised by {shortened(repr(method), 40)}, which cannot be read; take "
                "one of GPTQ, AWQ, compressed-tensors or FP8, a GGUF file, or the original float checkpoint"
            )


def _require_one_of(config: Mapping[str, Any], names: tuple[str, ...], known: tuple[str, ...], where: str) -> str:
    """The value of the first of these fields that is there; the first known value where none is."""
    value = next((config[name] for name in names if config.get(name) is not None), known[0])
    if not isinstance(value, str) or value.lower() not in known:
        raise ModelError(
            f"{where}: quantization_config says {names[0]} {shortened(repr(value), 40)}, which cannot be read; "
            f"known are {', '.join(known)}: take another version of the model"
        )
    return value.lower()


# --- GPTQ ---


def _gptq(config: Mapping[str, Any], where: str) -> Layout:
    form = _require_one_of(config, ("checkpoint_format", "format"), ("gptq", "gptq_v2"), where)
    offset = int(form == "gptq")  # the first version stores zero points less one

    def codes_of(parts: Parts) -> Codes:
        words, scales = parts["qweight"], parts["scales"]
        num_groups, num_rows = scales.shape
        bits = _bits(parts["qzeros"].shape[1], num_rows)
        values = _unpacked(words.T, bits)  # [N, K]
        groups = parts.get("g_idx")
        groups = _in_order(values.shape[1], num_groups) if groups is None else groups.long()
        if groups.shape != values.shape[1:] or not ((groups >= 0) & (groups < num_groups)).all():
            raise ValueError(f"g_idx does not share {values.shape[1]} inputs out among {num_groups} groups")
        zeros = _unpacked(parts["qzeros"], bits).T + offset
        return _checked(Codes(values, scales.T.float(), zeros, groups))

    # Where groups are mixed, the codes are rounded once more, which 4 bits would show.
    own_bits = 4 if config.get("bits") == 4 and not config.get("desc_act") else 8
    return Layout("GPTQ", ("qweight", "qzeros", "scales"), codes_of, _gptq_shape, own_bits, optional=("g_idx",))


def _gptq_shape(shapes: Mapping[str, Shape]) -> Shape:
    (num_words, num_rows), num_zeros = shapes["qweight"], shapes["qzeros"][1]
    return num_rows, num_words * num_rows // max(1, num_zeros)


# --- AWQ ---


def _awq_codes(parts: Parts) -> Codes:
    scales = parts["scales"]
    num_groups, num_rows = scales.shape
    if _bits(parts["qzeros"].shape[1], num_rows) != 4:
        raise ValueError("its codes have not 4 bits")
    values, zeros = (_in_awq_order(_unpacked(parts[name], 4)).T for name in ("qweight", "qzeros"))
    return _checked(Codes(values, scales.T.float(), zeros, _in_order(values.shape[1], num_groups)))


def _in_awq_order(values: Tensor) -> Tensor:
    """[n, N]: rows of a weight, of which each eight are interleaved in their word."""
    return values.unflatten(1, (-1, len(_AWQ_ORDER)))[:, :, list(_AWQ_ORDER)].flatten(1)


def _awq_shape(shapes: Mapping[str, Shape]) -> Shape:
    num_inputs, num_words = shapes["qweight"]
    return num_words * len(_AWQ_ORDER), num_inputs


# --- compressed-tensors ---


def _compressed_tensors(config: Mapping[str, Any], where: str) -> Layout:
    forms = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    form = _require_one_of(config, ("format",), forms, where)
    for name, what in (("transform_config", "turns activations"), ("sparsity_config", "leaves weights out")):
        given = config.get(name)
        if given and not (isinstance(given, dict) and given.get("format") == "dense"):
            raise ModelError(
                f"{where}: quantization_config has a {name}, which {what}; take another version of the model"
            )
    _require_one_of(config, ("quantization_status",), ("compressed",), where)
    schemes = config.get("config_groups")
    schemes = [each for each in (schemes.values() if isinstance(schemes, dict) else ()) if isinstance(each, dict)]
    weights = [each["weights"] for each in schemes if isinstance(each.get("weights"), dict)]
    optional = ("weight_zero_point",)
    if form == "pack-quantized":
        own_bits = 4 if {each.get("num_bits") for each in weights} == {4} else 8
        needed = ("weight_packed", "weight_scale", "weight_shape")
        shape_of = partial(_pack_quantized_shape, bits=own_bits)
        return Layout("compressed-tensors", needed, _pack_quantized_codes, shape_of, own_bits, optional)
    blocks = [each["block_structure"] for each in weights if each.get("block_structure") is not None]
    codes_of = partial(_scaled_codes, block=_block_of(blocks[0], where) if blocks else None)
    return Layout("compressed-tensors", (_WEIGHT, "weight_scale"), codes_of, _same_shape, 8, optional)


def _pack_quantized_shape(shapes: Mapping[str, Shape], bits: int) -> Shape:
    num_rows, num_words = shapes["weight_packed"]
    return num_rows, num_words * _WORD // bits


def _same_shape(shapes: Mapping[str, Shape]) -> Shape:
    return shapes[_WEIGHT]


def _pack_quantized_codes(parts: Parts) -> Codes:
    num_rows, num_inputs = (int(size) for size in parts["weight_shape"])
    words, scales = parts["weight_packed"], parts["weight_scale"]
    bits = _bits(words.shape[1], num_inputs)
    values = _unpacked(words, bits)
    if values.shape != (num_rows, num_inputs):
        raise ValueError(f"codes of the shape {tuple(values.shape)} for a weight of {(num_rows, num_inputs)}")
    if (zeros := parts.get("weight_zero_point")) is not None:
        zeros = _unpacked(zeros.T, bits).T
    else:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int16)  # codes are stored from 0 on
    return _checked(Codes(values, scales.float(), zeros, _in_order(num_inputs, scales.shape[1])))


# --- whole bytes, FP8 among them ---


def _scaled_codes(parts: Parts, block: tuple[int, int] | None) -> Codes:
    """Codes of 8 bits under the weight's own name, with scales of the whole, of rows, of groups, or of blocks."""
    values = parts[_WEIGHT]
    scales = next(parts[name] for name in ("weight_scale", "weight_scale_inv") if name in parts).float()
    if values.dtype not in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"its codes are of the type {values.dtype}")
    sizes = values.shape
    if scales.numel() == 1:
        scales = scales.reshape(1, 1)
    if block is not None and scales.shape == tuple(-(-size // each) for size, each in zip(sizes, block, strict=True)):
        rows, inputs = (torch.arange(size) // each for size, each in zip(sizes, block, strict=True))
    else:
        rows, inputs = (_in_order(size, number) for size, number in zip(sizes, scales.shape, strict=True))
    zeros = parts.get("weight_zero_point")
    zeros = None if zeros is None else zeros.reshape(scales.shape)[rows].short()
    return _checked(Codes(values.short() if values.dtype == torch.int8 else values, scales[rows], zeros, inputs))


def _block_of(given: object, where: str) -> tuple[int, int] | None:
    """Rows and inputs of the blocks that share a scale."""
    match given:
        case None:
            return None
        case [int(rows), int(inputs)] if rows > 0 and inputs > 0:
            return rows, inputs
        case _:
            raise ModelError(
                f"{where}: blocks of {shortened(repr(given), 40)} in quantization_config; they have 2 sizes"
            )


# --- shared ---


def _bits(num_words: int, num_codes: int) -> int:
    """Of each code, where so many words hold them."""
    bits = num_words * _WORD // num_codes if num_codes else 0
    if bits not in (4, 8) or num_words * _WORD != num_codes * bits:
        raise ValueError(f"{num_words} words of {_WORD} bits for {num_codes} codes; these may have 4 or 8 bits")
    return bits


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m] -> int16 [n, m * 32 / bits], the lowest bits first."""
    if words.dtype != torch.int32:
        raise ValueError(f"packed codes are of the type {words.dtype}")
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & (2**bits - 1)).short().flatten(1)


def _in_order(num_inputs: int, num_groups: int) -> Tensor:
    if num_groups == 0 or num_inputs % num_groups:
        raise ValueError(f"{num_inputs} inputs in {num_groups} groups")
    return torch.arange(num_inputs) // (num_inputs // num_groups)


def _checked(codes: Codes) -> Codes:
    num_rows, num_groups = codes.values.shape[0], int(codes.groups.max()) + 1
    for each in (codes.scales, codes.zero_points):
        if each is not None and (each.shape[0] != num_rows or each.shape[1] < num_groups):
            raise ValueError(f"{tuple(each.shape)} scales or zero points for {num_rows} rows of {num_groups} groups")
    return codes
