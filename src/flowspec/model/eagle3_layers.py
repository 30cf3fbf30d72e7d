"""Which of the target's layers an EAGLE-3 head reads: every program that writes such heads says it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from flowspec.errors import ModelError, UsageError, shortened
from flowspec.model.draft_files import DraftFiles

_AUX = "eagle_aux_hidden_state_layer_ids"

_Look: TypeAlias = Callable[[Mapping[str, Any]], Any]


def _inside(table: str, name: str) -> _Look:
    def look_up(config: Mapping[str, Any]) -> Any:
        inner = config.get(table)
        return inner.get(name) if isinstance(inner, dict) else None

    return look_up


def _on_top(name: str) -> _Look:
    return lambda config: config.get(name)


_PLACES: tuple[tuple[str, int, _Look], ...] = (
    (_AUX, 0, _on_top(_AUX)),
    ("aux_hidden_state_layer_ids", 0, _on_top("aux_hidden_state_layer_ids")),
    ("dflash_config's target_layer_ids", 1, _inside("dflash_config", "target_layer_ids")),
    ("dspark_target_layer_ids", 1, _on_top("dspark_target_layer_ids")),
    ("target_layer_ids", 1, _on_top("target_layer_ids")),
    ("dflash_config's layer_ids", 0, _inside("dflash_config", "layer_ids")),
    ("eagle_config's layer_ids", 0, _inside("eagle_config", "layer_ids")),
    (f"eagle_config's {_AUX}", 1, _inside("eagle_config", _AUX)),
)


def find_layer_ids(
    files: DraftFiles,
    num_layers: int,
    draft_layers: Sequence[int] | None = None,
    own_choice: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """In the order of ``fc``'s blocks, each the stream that enters a layer.

    ``draft_layers``, else the first of these that there is, as vLLM looks them up: the config's
    ``eagle_aux_hidden_state_layer_ids``, or ``aux_hidden_state_layer_ids`` of speculators' block heads, as they are;
    ``target_layer_ids`` in ``dflash_config``,
    ``dspark_target_layer_ids``, ``target_layer_ids``, which name outputs (layer k's enters k + 1); ``layer_ids`` in
    ``dflash_config`` or ``eagle_config``, as they are; ``eagle_aux_hidden_state_layer_ids`` in ``eagle_config``, which
    is SpecForge's place and names outputs, as SGLang reads it; and else the authors' ``own_choice``, or EAGLE's: 2,
    half of the layers, and the last but two. Raises ``ModelError``, and ``UsageError`` for ``draft_layers``.
    """
    if draft_layers is not None:
        if problem := _problem(draft_layers, num_layers):
            raise UsageError(f"draft_layers {problem}")
        return tuple(draft_layers)
    for where, shift, look_up in _PLACES:
        if (ids := look_up(files.config)) is not None:
            entered = [layer + shift for layer in ids] if _is_ids(ids) else ids
            if problem := _problem(entered, num_layers):
                raise ModelError(f"{files.config_path}: {where} {problem}; or name them with --draft-layers")
            return tuple(entered)
    default = own_choice or eagles_choice(num_layers)
    if problem := _problem(default, num_layers):
        raise ModelError(
            f"{files.config_path} does not say which of the target's layers the head reads, and for {num_layers} "
            f"layers its authors' own choice {problem}; name them with draft_layers (--draft-layers)"
        )
    return default


def eagles_choice(num_layers: int) -> tuple[int, ...]:
    """What EAGLE-3's authors read of a target of so many layers, where a head does not say."""
    return 2, num_layers // 2, num_layers - 3


def _is_ids(ids: Any) -> bool:
    is_list = isinstance(ids, (list, tuple)) and len(ids) > 0
    return is_list and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in ids)


def _problem(ids: Any, num_layers: int) -> str:
    if not _is_ids(ids):
        return f"is {shortened(repr(ids), 60)}; it must be a list of layers"
    told = ", ".join(map(str, ids[:20]))
    if len(set(ids)) < len(ids):
        return f"names a layer twice ({told})"
    if min(ids) < 0 or max(ids) > num_layers:
        return f"has layers outside the target's 0..{num_layers} ({told})"
    return ""
