"""Two vocabularies, and which tokens of theirs mean the same: what a draft model reads of a target, and guesses of it.

Tokens match where the bytes do that they stand for (token-level intersection, arXiv 2502.05202); a special token
matches a special one of the same name. What has no match is read as the text that it stands for, and never guessed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.errors import ModelError
from flowspec.model.loader import Checkpoint
from flowspec.text import Vocabulary

LEAST_SHARE = 0.5  # of the draft's tokens that must match

_Key = tuple[bool, bytes]  # special or not, and the bytes


class TokenMap:
    """From a target's tokens to a draft model's, and from the logits of the draft's to those of the target's."""

    def __init__(self, draft: Any, target: Any, draft_model: Checkpoint, target_model: Checkpoint) -> None:
        """``draft``, ``target``: tokenizers of transformers, of these models, whose logits may have padding behind.

        Raises ``ModelError`` where too few tokens match.
        """
        draft_size, target_size = draft_model.vocab_size, target_model.vocab_size
        self._draft = draft
        self._target_size = target_size
        self._target_bytes = Vocabulary(target).token_bytes
        self._read: dict[int, tuple[int, ...]] = {}
        if draft.get_vocab() == target.get_vocab():
            num_shared = min(draft_size, target_size)
            target_ids = draft_ids = np.arange(num_shared)
        else:
            target_ids, draft_ids = _matches(draft, target, draft_size, target_size)
            num_own = min(draft_size, len(draft.get_vocab()))
            if len(draft_ids) < LEAST_SHARE * num_own:
                num_target = min(target_size, len(target.get_vocab()))
                raise ModelError(
                    f"of the {num_own} tokens of the draft model {draft_model.title}, {len(draft_ids)} match one of "
                    f"{target_model.title}'s {num_target}, and half of them have to; give a draft model with a "
                    "tokenizer more like the model's"
                )
        self._is_same = len(draft_ids) == draft_size == target_size and bool((draft_ids == target_ids).all())
        self._draft_ids, self._target_ids = torch.from_numpy(draft_ids), torch.from_numpy(target_ids)
        self._same = np.full(target_size, -1, dtype=np.int64)
        self._same[target_ids] = draft_ids
        self._meant = np.full(draft_size, -1, dtype=np.int64)
        self._meant[draft_ids] = target_ids

    @property
    def num_shared(self) -> int:
        return len(self._draft_ids)

    def read(self, token_id: int) -> tuple[int, ...]:
        """A target's token as the draft reads it: one token or more."""
        if (same := int(self._same[token_id])) >= 0:
            return (same,)
        if token_id not in self._read:
            text = self._target_bytes(token_id).decode("utf-8", "replace")
            ids = self._draft(text, add_special_tokens=False, verbose=False).input_ids
            self._read[token_id] = tuple(ids) or (int(self._draft_ids[0]),)  # something stands there
        return self._read[token_id]

    @property
    def target_size(self) -> int:
        """Tokens of the target."""
        return self._target_size

    def meant(self, draft_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The target's tokens for those of the draft; -1 where there is none."""
        return self._meant[draft_ids]

    def logits(self, logits: Tensor) -> Tensor:
        """[n, the draft's tokens] -> [n, the target's]; minus infinity for those that the draft does not have."""
        if self._is_same:
            return logits
        mapped = logits.new_full((len(logits), self._target_size), -torch.inf)
        mapped[:, self._target_ids.to(logits.device)] = logits[:, self._draft_ids.to(logits.device)]
        return mapped


def _matches(draft: Any, target: Any, draft_size: int, target_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of the target, and of the draft, that mean the same."""
    own = _keys(draft, draft_size)
    pairs = [(target_id, own[key]) for key, target_id in _keys(target, target_size).items() if key in own]
    both = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


def _keys(tokenizer: Any, size: int) -> dict[_Key, int]:
    """What each token means; of several that mean the same, the one that is no byte of byte fallback."""
    vocabulary = Vocabulary(tokenizer)
    keys: dict[_Key, int] = {}
    ids = sorted(token_id for token_id in tokenizer.get_vocab().values() if token_id < size)
    for token_id in sorted(ids, key=lambda token_id: vocabulary.fallback_byte(token_id) is not None):
        meaning = vocabulary.token_bytes(token_id)
        if meaning:
            keys.setdefault((not vocabulary.is_shown(token_id), meaning), token_id)
    return keys
