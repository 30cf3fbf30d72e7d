"""Which schedule a request gets: by its name, by what segments cost now, and by what earlier requests have found."""

from __future__ import annotations

from flowspec.config import ScheduleConfig
from flowspec.draft.base import DraftSource, Levels
from flowspec.engine.pipeline import Pipeline
from flowspec.schedule.auto import Experience
from flowspec.schedule.base import Schedule
from flowspec.schedule.catalogue import make_schedule
from flowspec.schedule.pace import Pace


class Schedules:
    """Of one engine. ``use`` says over which pipeline they run."""

    def __init__(self, pipeline: Pipeline, source: DraftSource | None, default: str, config: ScheduleConfig) -> None:
        """``default``: of requests that name none."""
        self.default = default
        self._source = source
        self._config = config
        self._experience = Experience()
        self._tree_sizes: dict[str, int] = {}  # by schedule
        self.use(pipeline)

    def use(self, pipeline: Pipeline) -> None:
        """From now on."""
        self._pipeline = pipeline
        self._pace = Pace(pipeline.costs) if pipeline.costs is not None else None

    def use_source(self, source: DraftSource) -> None:
        """From now on."""
        self._source = source
        self._tree_sizes.clear()

    def _make(self, name: str) -> Schedule:
        num_stages, num_parallel = len(self._pipeline.partition), self._pipeline.spec.num_parallel
        return make_schedule(
            name, self._config, num_stages, num_parallel, self._pace, Levels.of(self._source), self._experience
        )

    def tree_size(self, name: str | None) -> int:
        """As it was when the first such request came."""
        name = name or self.default
        if name not in self._tree_sizes:
            self._tree_sizes[name] = self._make(name).tree_config.size
        return self._tree_sizes[name]

    def prepare(self, name: str) -> Schedule:
        """For one request, by what segments cost now."""
        if self._pace is not None:
            self._pace.measure()
        return self._make(name)
