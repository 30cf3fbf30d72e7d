"""Files of models at the Hugging Face hub: fetched into its cache, with a word now and then while that takes long."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from tqdm import tqdm

from flowspec.errors import ModelError

logger = logging.getLogger("flowspec.hub")

_INTERVAL_S = 10.0


class _Told(tqdm):
    """The hub's progress bar, as lines of a log: several processes may fetch at once, and not all have a terminal."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self._last_s = time.monotonic()
        with open(os.devnull, "w") as nowhere:
            super().__init__(*given, **{**named, "disable": False, "file": nowhere})
        self.disable = True  # draws nothing from here on

    def update(self, n: float | None = 1) -> bool | None:
        self.n += n or 0
        if self.total and time.monotonic() - self._last_s >= _INTERVAL_S:
            self._last_s = time.monotonic()
            logger.info("fetching %s: %.0f %%", self.desc, 100 * self.n / self.total)
        return None


def fetch(name: str, filename: str) -> Path | None:
    """The local path of one file of the model ``name``; ``None`` where it has none. Raises ``ModelError``."""
    try:
        if try_to_load_from_cache(name, filename) is None:
            logger.info("asking the hub for %s of %s", filename, name)
        return Path(hf_hub_download(name, filename, tqdm_class=_Told))
    except LocalEntryNotFoundError as error:
        # Offline, the hub's cache cannot tell a file that does not exist from one that was never fetched.
        if filename != "config.json":
            return None
        raise ModelError(
            f"{name} is no directory here, and the hub cannot be reached; connect once to download it, "
            "or give the directory of a downloaded model"
        ) from error
    except EntryNotFoundError:
        return None
    except (OSError, HFValidationError) as error:  # the hub's HTTP errors are OSErrors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"{name} is no directory here, and the hub does not give it ({reason}); check the name, "
            "and log in with `hf auth login` if it is private or gated"
        ) from error
