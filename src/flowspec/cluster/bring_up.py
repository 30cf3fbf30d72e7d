"""Workers that are coming up: what each has said of its loading, and who has been silent for too long. No sockets."""

from __future__ import annotations

from flowspec.wire.messages import LOADED, Fetching, Loading, Ready, ToDriver

_FETCH_SHARE = 0.8  # of a start that fetches weights first


class BringUp:
    """Of one session, on the monotonic clock."""

    def __init__(self, num_stages: int, now: float) -> None:
        self._num_stages = num_stages
        self._loaded = dict.fromkeys(range(1, num_stages + 1), 0.0)
        self._fetched: set[int] = set()  # stages whose weights have come, or come, from here
        self._last_news = dict.fromkeys(self._loaded, now)  # of each worker on its own
        self._last_step = now  # when any of them got on
        self._ready: dict[int, Ready] = {}
        self.heard: set[int] = set()  # stages whose workers have answered at all

    def note(self, stage: int, message: ToDriver, now: float) -> None:
        if stage not in self.heard:
            self._last_step = now
        self.heard.add(stage)
        self._last_news[stage] = now
        match message:
            case Fetching():
                self._fetched.add(stage)
                self._loaded[stage] = _FETCH_SHARE * message.num_bytes / max(1, message.num_wanted)
                self._last_step = now
            case Loading():
                before = _FETCH_SHARE if stage in self._fetched and message.fraction < LOADED else 0.0
                self._loaded[stage], self._last_step = before + (1 - before) * message.fraction, now
            case Ready():
                self._loaded[stage], self._ready[stage] = LOADED, message
            case _:
                pass

    @property
    def fraction(self) -> float:
        """That is loaded, of all stages together."""
        return sum(self._loaded.values()) / self._num_stages

    @property
    def ready(self) -> list[Ready] | None:
        """What each has said of its stage, in order; ``None`` until all are ready."""
        if len(self._ready) < self._num_stages:
            return None
        return [self._ready[stage] for stage in sorted(self._ready)]

    def silent_since(self, deadline_s: float) -> list[int]:
        """Stages that are not ready, and whose workers have said nothing since then."""
        return [stage for stage, s in self._last_news.items() if stage not in self._ready and s < deadline_s]

    def unlinked_since(self, deadline_s: float) -> int | None:
        """All have loaded by then, and yet this stage is not ready: its worker does not reach the next one."""
        waits = [stage for stage in self._loaded if stage not in self._ready]
        if waits and set(self._loaded.values()) == {LOADED} and self._last_step < deadline_s:
            return waits[0]
        return None
