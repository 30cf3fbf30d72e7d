"""Of which stored tensors a module's tensor is made: files may name each expert's matrices, modules hold all as one."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from flowspec.model.families import ExpertNames

_EXPERTS = "experts."  # in a mixture's module: its stacked matrices, [experts, outputs, inputs]


class Piece(NamedTuple):
    """One stored tensor, and the part of the module's tensor that it is."""

    name: str
    place: tuple[int | slice, ...] = ()  # empty: the whole


def pieces_of(name: str, shape: tuple[int, ...], experts: ExpertNames | None, stored: Set[str]) -> list[Piece]:
    """Of a module's tensor, which together fill it. ``stored``: the names of what there is.

    Experts may be stored one by one, as most files have them, a kind of matrix of all experts as one, which is called
    like the former without the number, as in GGUF, or as the module has them.
    """
    layer, in_mixture, inner = name.partition(".mlp.")
    if experts is None or name in stored or not in_mixture:
        return [Piece(name)]
    prefix = f"{layer}.{experts.block}."
    if not inner.startswith(_EXPERTS):
        return [Piece(prefix + inner)]
    half = shape[1] // 2
    gate_and_up = {experts.gate: slice(0, half), experts.up: slice(half, None)}
    matrices = {"gate_up_proj": gate_and_up, "down_proj": {experts.down: slice(None)}}[inner.removeprefix(_EXPERTS)]
    pieces: list[Piece] = []
    for matrix, rows in matrices.items():
        together = f"{prefix}{_EXPERTS}{matrix}.weight"
        if together in stored:
            pieces.append(Piece(together, (slice(None), rows)))
        else:
            alone = [Piece(f"{prefix}{_EXPERTS}{expert}.{matrix}.weight", (expert, rows)) for expert in range(shape[0])]
            pieces += alone
    return pieces
