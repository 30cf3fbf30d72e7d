"""The prefix cache, as the driver knows it: whose keys and values workers still hold, and which prompts begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowspec.draft.base import Draft, ReusableDraft


@dataclass(frozen=True)
class CachedPrefix:
    """The beginning of a prompt, as an earlier request has computed it; by default nothing."""

    request_id: int | None = None
    num_cached: int = 0  # tokens
    draft: ReusableDraft | None = None

    def give(self, draft: Draft | None) -> None:
        """Let a new draft take over what an earlier one has made of the beginning."""
        if self.draft is not None and isinstance(draft, ReusableDraft):
            draft.reuse(self.draft, self.num_cached)


@dataclass(frozen=True)
class CacheEntry:
    """What workers, and the driver, keep of an ended request."""

    request_id: int
    token_ids: tuple[int, ...]  # whose keys and values the workers hold
    draft: ReusableDraft | None  # if another one can take over what it made of the text

    def prefix_for(self, prompt_ids: Sequence[int], needs_features: bool) -> CachedPrefix:
        """What a request with this prompt can take over."""
        if needs_features and self.draft is None:
            return CachedPrefix()
        pairs = enumerate(zip(self.token_ids, prompt_ids, strict=False))
        num_common = next(
            (i for i, (ours, theirs) in pairs if ours != theirs), min(len(self.token_ids), len(prompt_ids))
        )
        # The root runs again, and one token before it: the features of the last tokens of the prompt must come back.
        num_cached = min(num_common - 1, len(prompt_ids) - 2)
        if needs_features and self.draft is not None:
            num_cached = min(num_cached, self.draft.num_certain)
        return CachedPrefix(self.request_id, num_cached, self.draft) if num_cached > 0 else CachedPrefix()
