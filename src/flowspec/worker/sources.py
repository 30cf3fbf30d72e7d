"""Where a worker's models come from: this device, the hub, or the driver that asks for them."""

from __future__ import annotations

from collections.abc import Callable

from flowspec.config import CACHE_GB
from flowspec.core import StageManifest
from flowspec.errors import UsageError
from flowspec.model.backends import find_checkpoint
from flowspec.model.loader import Checkpoint
from flowspec.model.user_cache import cache_directory
from flowspec.wire.messages import Configure
from flowspec.worker.blob_cache import BlobCache
from flowspec.worker.fetch import StageFetch


class Sources:
    """As the device's operator allows."""

    def __init__(self, may_ask_hub: bool = True, cache_gb: float = CACHE_GB) -> None:
        """``may_ask_hub``: on the driver's word. ``cache_gb``: 10^9 bytes of the disk for what drivers send.

        Raises ``UsageError``.
        """
        if not 0 < cache_gb < 1e9:
            raise UsageError(f"a cache of {cache_gb} GB is none; give a positive number")
        self._may_ask_hub = may_ask_hub
        self._cache = BlobCache(cache_directory("received"), int(cache_gb * 1e9))

    def find(self, name: str) -> Checkpoint | None:
        """``None``: the driver has to send it. Raises ``ModelError`` for what is here, and cannot be used."""
        return find_checkpoint(name, self._may_ask_hub)

    def fetch(self, configure: Configure, check_fits: Callable[[StageManifest], None]) -> StageFetch:
        """What gets it, if it fits. Raises ``UsageError`` where the driver sends nothing."""
        if configure.emulation is not None:
            raise UsageError(f"{configure.model} is not on this device, and it plays another one; copy the model there")
        return StageFetch(self._cache, configure.model, check_fits)
