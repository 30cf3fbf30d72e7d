"""Where a model's tensors come from, whatever holds them. No files and no connections here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from flowspec.core import DType, LayerRange
from flowspec.errors import ModelError
from flowspec.model.families import EMBEDDING, LM_HEAD, PREFIX, expert_names, logits_divisor
from flowspec.model.packed import Bits, FloatWeight, PackedWeight, Precision, Weight, pack
from flowspec.model.pieces import Piece, pieces_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYER_NAME = re.compile(re.escape(PREFIX) + r"layers\.(\d+)\.")


class TensorSource(Protocol):
    """One model's config and tensors, by the names in ``families``: a stage and the driver's heads are loaded from it.

    A source gives the first five, and inherits the rest. Every failure is a ``ModelError`` that says the way out.
    """

    name: str  # what error messages call the model
    config: PreTrainedConfig

    def tensor_names(self) -> frozenset[str]:
        """As of a model with its lm_head, whatever the source leaves out."""
        ...

    def shard_of(self, tensor_name: str) -> str:
        """What holds the tensor, for error messages. Raises for a name that nothing holds."""
        ...

    def tensors(self, names: Iterable[str], dtype: DType, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors one at a time, converted, in private memory on the device; no other is read."""
        ...

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def has_tied_embeddings(self) -> bool:
        """Whether the embedding is the lm_head too; a file that holds both overrules the config, as in transformers."""
        return bool(self.config.tie_word_embeddings) and LM_HEAD not in self.tensor_names()

    def pieces(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """The tensors here of which modules' tensors are made, by these names. ``shapes``: that the modules have."""
        experts, stored = expert_names(self.config), self.tensor_names()
        return {name: pieces_of(name, shape, experts, stored) for name, shape in shapes.items()}

    def module_tensors(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: DType, device: torch.device | str
    ) -> Iterator[tuple[str, Tensor]]:
        """As ``tensors``, by the names and of the shapes that modules have. Raises for what has another shape."""
        made_of = self.pieces(shapes)
        wholes = {pieces[0].name: name for name, pieces in made_of.items() if not pieces[0].place}
        for stored, tensor in self.tensors(wholes, dtype, device):
            self.check_shape(stored, tensor, shapes[wholes[stored]])
            yield wholes[stored], tensor
        for name, pieces in made_of.items():
            places = {piece.name: piece.place for piece in pieces if piece.place}
            if not places:
                continue
            whole = torch.empty(shapes[name], dtype=getattr(torch, dtype), device=device)
            for stored, tensor in self.tensors(places, dtype, device):
                self.check_shape(stored, tensor, tuple(whole[places[stored]].shape))
                whole[places[stored]] = tensor
            yield name, whole

    def own_packed(self, name: str, bits: Bits) -> PackedWeight | None:
        """The weight of a linear layer as it is, where the source has it in codes that kernels of so many bits hold."""
        return None

    def bits_of(self, names: Iterable[str], bits: Bits) -> Bits:
        """That weights of linear layers get together where weights are to have so many.

        What a file of 4-bit codes has in more bits, as it has what is spoilt first, gets 8.
        """
        return bits

    def packed(self, name: str, bits: Bits) -> PackedWeight:
        """The weight of a linear layer, rounded where it must be.

        Of a tensor with those of several experts, one below the other.
        """
        if (own := self.own_packed(name, bits)) is not None:
            return own
        ((_, tensor),) = self.tensors([name], "float32", "cpu")
        return pack(tensor.flatten(0, -2), bits, f"{self.name}: {name}")

    def float_dtype(self, name: str) -> DType:
        """The narrowest that holds the numbers of a tensor as they are."""
        return "float32"

    def weight(self, name: str, precision: Precision) -> Weight:
        """As ``packed``, or in floats."""
        if not isinstance(precision, str):
            return self.packed(name, precision)
        ((_, tensor),) = self.tensors([name], precision, "cpu")
        return FloatWeight(tensor.flatten(0, -2))

    def precision_of(self, names: Iterable[str], precision: Precision) -> Precision:
        """As ``bits_of``; or, of floats, float32 as narrow as the source has all of these weights."""
        if not isinstance(precision, str):
            return self.bits_of(names, precision)
        stored: set[DType] = {self.float_dtype(name) for name in names} if precision == "float32" else {precision}
        return stored.pop() if len(stored) == 1 else "float32"

    def load_embedding(self, dtype: DType, device: torch.device | str) -> Tensor:
        """The token embedding [vocab_size, hidden_size]."""
        return self._load_vocabulary_matrix(EMBEDDING, dtype, device)

    def load_lm_head(self, dtype: DType, device: torch.device | str) -> Tensor:
        """The output matrix [vocab_size, hidden_size], which gives logits; the embedding if the model ties the two."""
        weight = self._load_vocabulary_matrix(self.lm_head_name, dtype, device)
        return weight if (divisor := logits_divisor(self.config)) == 1.0 else weight.div_(divisor)

    def packed_lm_head(self, bits: Bits) -> PackedWeight:
        """As ``load_lm_head``, in integers: of 8 bits, unless its own have 4.

        Files of 4 bits leave it in more, since it is what rounding spoils first.
        """
        weight = self.own_packed(self.lm_head_name, bits) or self.packed(self.lm_head_name, 8)
        self.check_shape(self.lm_head_name, weight, (self.vocab_size, self.hidden_size))
        return weight if (divisor := logits_divisor(self.config)) == 1.0 else weight.divided(divisor)

    def lm_head_weight(self, precision: Precision) -> Weight:
        """As ``packed_lm_head``, or ``weight``."""
        if not isinstance(precision, str):
            return self.packed_lm_head(precision)
        is_as_stored = precision == "float32" and logits_divisor(self.config) == 1.0
        dtype = self.float_dtype(self.lm_head_name) if is_as_stored else precision
        return FloatWeight(self.load_lm_head(dtype, "cpu"))

    @property
    def lm_head_name(self) -> str:
        """Of what the lm_head is made of."""
        return EMBEDDING if self.has_tied_embeddings else LM_HEAD

    @property
    def has_hints(self) -> bool:
        """Whether a hint head has come with the stage; else it lies with its draft."""
        return False

    def hint_weights(self, dtype: DType, device: torch.device | str) -> dict[str, Tensor]:
        """Of the hint head that has come, by the names in its file."""
        return {}

    def _load_vocabulary_matrix(self, name: str, dtype: DType, device: torch.device | str) -> Tensor:
        ((_, tensor),) = self.tensors([name], dtype, device)
        self.check_shape(name, tensor, (self.vocab_size, self.hidden_size))
        return tensor

    def check_layers(self) -> None:
        """Raise if there are tensors of more or fewer layers than the config says."""
        found = {int(match[1]) for match in map(_LAYER_NAME.match, self.tensor_names()) if match}
        if found != set(range(self.num_layers)):
            raise ModelError(
                f"{self.name}: config.json says {self.num_layers} layers, but the safetensors files hold "
                f"{len(found)}; files and config do not belong together, download or save the model again"
            )

    def check_range(self, layers: LayerRange) -> None:
        """Raise for layers that there are not."""
        if layers.end > self.num_layers:
            raise ModelError(f"{self.name} has {self.num_layers} layers; there is no layer range {layers}")

    def check_shape(self, name: str, tensor: Tensor | Weight, shape: tuple[int, ...]) -> None:
        """Raise if a tensor has not the shape that the config asks for."""
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.name}: {self.shard_of(name)} holds {name} with shape {tuple(tensor.shape)}, but config.json "
                f"asks for {shape}; files and config do not belong together, download or save the model again"
            )
