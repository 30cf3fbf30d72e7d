"""The options that commands share, each declared once: name, type, help and default. Loads nothing heavy.

A command takes a whole group of them as one parameter (see ``groups``), whose default says the options' defaults.
"""

from __future__ import annotations

import functools
import textwrap
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flowspec.cli.values import draft_layers, logit_bias
from flowspec.cluster.device_list import DeviceList
from flowspec.config import LinkConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import Partition, SamplingParams
from flowspec.errors import UsageError

# As in ``schedule.catalogue``, which would load torch: ``--help`` must be fast.
COMPARED_NAMES = "ar, serial, chunked, pipedec, lockstep, flow"
SCHEDULE_NAMES = f"auto, {COMPARED_NAMES}"
ABLATION_NAMES = (
    "lockstep-no-score-order, lockstep-no-prune, lockstep-no-expand, flow-no-late-binding, flow-no-segment-costs, "
    "flow-no-steady, flow-no-cancel, flow-no-hints, flow-no-ngrams"
)
_NAMES = f"{SCHEDULE_NAMES}, {ABLATION_NAMES}; with a cluster file also tp-megatron, tp-galaxy"
# Below the options, where no line is broken at a hyphen. The first line keeps the others as they are.
SCHEDULES_BELOW = "\b\nSchedules:\n" + textwrap.indent(textwrap.fill(_NAMES, 76, break_on_hyphens=False), "  ")

_MODELS_OWN = "the model's own"  # where the default is ``None``: generation_config.json of the model


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class DraftDtype(StrEnum):
    auto = "auto"
    int8 = "int8"
    int4 = "int4"


class OnOff(StrEnum):
    on = "on"
    off = "off"


class WeightsChoice(StrEnum):
    auto = "auto"
    float = "float"
    int8 = "int8"
    int4 = "int4"


# --- single options ---

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, and show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="FLOWSPEC_API_KEY", help="What clients of the server must send; /health is open."),
]
Threads = Annotated[int, typer.Option(help="Torch threads; 0 leaves the choice to torch.")]
Device = Annotated[str, typer.Option(help="Torch device, as cpu or cuda:0; of the driver and the workers here.")]
DraftDtypeOption = Annotated[
    DraftDtype,
    typer.Option(
        help="Of a draft's weights: int8 is half as much to read, int4, for smaller models alone, a quarter; auto is "
        "the model's for heads, and as --weights for smaller models."
    ),
]
DraftLayersOption = Annotated[
    str | None,
    typer.Option(
        "--draft-layers",
        metavar="A,B,C",
        help="Layers whose input a head reads (EAGLE-3, P-EAGLE, DFlash, DSpark), where its config is wrong.",
        show_default="as its config says",
    ),
]
DraftCheckOption = Annotated[
    OnOff,
    typer.Option(
        help="Try a draft before the first request, once, and switch it off where its guesses show that it is broken."
    ),
]
DraftWorkerOption = Annotated[
    str | None,
    typer.Option(
        "--draft-worker",
        metavar="HOST:PORT",
        help="A running worker that a smaller model as draft runs on.",
        show_default="the driver's own process",
    ),
]
Stages = Annotated[
    int | None,
    typer.Option(help="Stages to cut the model into, evenly.", show_default="4 at most; a cluster file's own"),
]
PartitionOption = Annotated[
    str | None, typer.Option(help="The stages' layer ranges instead, as 0:4,4:8.", show_default="even")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of weights and arithmetic; float32 is exact.")]
WeightsOption = Annotated[
    WeightsChoice,
    typer.Option(
        help="Of the layers' matrices: int8 and int4 are fast on a CPU, and exact whatever the schedule; float is of "
        "--dtype; auto takes integers for quantised files, and for models that do not fit otherwise.",
    ),
]
Int8Wire = Annotated[
    bool,
    typer.Option("--int8-wire", help="Send hidden states between workers in int8: for slow links; not bit-exact."),
]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for workers to come up, or for an answer to go on.")]
Schedule = Annotated[
    str,
    typer.Option(
        help=f"One of {SCHEDULE_NAMES}. ar: one token at a time; the others are speculative. auto: flow while that is "
        "faster."
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.", show_default=_MODELS_OWN)]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy: always the most probable token.", show_default=_MODELS_OWN)
]
Seed = Annotated[
    int | None, typer.Option(help="The same seed gives the same text, or the same figures.", show_default="a new one")
]
TreeTopK = Annotated[int | None, typer.Option(help="Children drafted for a node.", show_default=f"{TreeConfig.top_k}")]
TreeDepth = Annotated[int | None, typer.Option(help="Levels drafted at once.", show_default=f"{TreeConfig.depth}")]
MinProbability = Annotated[
    float | None,
    typer.Option(
        help="Guesses that are reached less often, by the draft's own score, are not sent.",
        show_default=f"{TreeConfig.min_probability} for flow, 0 for the others",
    ),
]
SegmentLen = Annotated[int, typer.Option(help="Nodes in one segment of flow at most; 0: by the devices' costs.")]
ClusterFile = Annotated[str, typer.Argument(metavar="CLUSTER.toml", help="A described cluster; see clusters/.")]
ScheduleNames = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="Comma list of schedules, which are named below.",
        show_default="ar to flow",
    ),
]
RealDraft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="Of a real model: auto, none, ngram, an EAGLE head's directory, or, in real time, a smaller model.",
        show_default="auto",
    ),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(help="Prompts at most.", show_default="40 for synthetic, else all of the file, or 8 built in"),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="A prompt a line, or Spec-Bench's question.jsonl, of which the first turns count."),
]
AsPublished = Annotated[
    bool,
    typer.Option(
        "--as-published", help="All schedules but flow pay [driver.published] of the cluster file, not [driver.ours]."
    ),
]


# --- groups ---


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is made fast."""

    model: Annotated[
        str | None,
        typer.Option(
            help="A model directory, a .gguf file, a hub name (owner/model), 'smollm2', or 'demo'.",
            show_default="demo; for chat and serve smollm2, once it was fetched",
        ),
    ] = None
    draft: Annotated[
        str,
        typer.Option(
            help="auto, none, ngram, the directory of an EAGLE head that fits, or a smaller model, named as --model is."
        ),
    ] = "auto"
    draft_dtype: DraftDtypeOption = DraftDtype.auto
    draft_layers: DraftLayersOption = None
    draft_check: DraftCheckOption = OnOff.on
    draft_worker: DraftWorkerOption = None
    schedule: Schedule = "auto"
    tree_top_k: TreeTopK = TreeConfig.top_k
    tree_depth: TreeDepth = TreeConfig.depth
    tree_size: Annotated[int, typer.Option(help="Nodes of the draft tree at most, the root included.")] = (
        TreeConfig.size
    )
    min_probability: MinProbability = TreeConfig.min_probability
    segment_len: SegmentLen = PipelineConfig.segment_len

    def arguments(self, default_model: str = "demo") -> dict[str, Any]:
        """Of ``LLM`` and ``Engine``. Raises ``UsageError``."""
        changes = tree_changes(self.tree_top_k, self.tree_depth, self.tree_size, self.min_probability)
        tree = TreeConfig(**changes)
        return {
            "model": default_model if self.model is None else self.model,
            "draft": self.draft,
            "draft_dtype": self.draft_dtype.value,
            "draft_layers": draft_layers(self.draft_layers),
            "draft_check": self.draft_check.value,
            "schedule": self.schedule,
            "schedule_config": ScheduleConfig(flow=tree, pipeline=PipelineConfig(segment_len=self.segment_len)),
        }


@dataclass(frozen=True)
class StageOptions:
    """Where a model's stages run."""

    stages: Stages = None
    partition: PartitionOption = None
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT,...", help="Running workers, in pipeline order.", show_default="processes started here"
        ),
    ] = None
    cluster: Annotated[
        str | None,
        typer.Option(metavar="FILE.toml", help="A file that lists the workers; see the README."),
    ] = None
    discover: Annotated[
        bool,
        typer.Option(
            "--discover",
            help="Find the devices that have joined in the local network (mDNS), and let those join that wait to; "
            "their order is by name, or that of --cluster or --workers.",
        ),
    ] = False
    weights: WeightsOption = WeightsChoice.auto
    dtype: DtypeOption = Dtype.float32
    device: Device = "cpu"
    int8_wire: Int8Wire = False
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Connect to workers elsewhere without keys and encryption.")
    ] = False
    timeout: Timeout = LinkConfig.stall_timeout_s
    heartbeat_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="A device that does not answer for this long is lost.")
    ] = LinkConfig.heartbeat_timeout_s
    rejoin_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Requests wait this long for a lost device to come back; 0: not at all."),
    ] = LinkConfig.rejoin_timeout_s
    reassign_after: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Layers of a device that is away for this long go to others; 0: never."),
    ] = LinkConfig.reassign_after_s

    @functools.cached_property
    def devices(self) -> DeviceList | None:
        """What ``--cluster`` lists. Raises ``UsageError``."""
        return None if self.cluster is None else DeviceList.load(self.cluster, by_name=self.discover)

    def arguments(self, draft_worker: str | None = None) -> dict[str, Any]:
        """Of ``LLM`` and ``Engine``. ``draft_worker``: an address, or the name of a device. Raises ``UsageError``."""
        if sum(given is not None for given in (self.stages, self.workers, self.cluster)) > 1:
            raise UsageError("give one of --stages, --workers and --cluster")
        partition: str | Partition | None = self.partition
        workers = None if self.workers is None else [address.strip() for address in self.workers.split(",")]
        names = None if self.devices is None else self.devices.names
        if self.devices is not None:
            partition = partition or self.devices.partition
        if self.discover:
            workers, names, draft_worker = self._found(workers, draft_worker)
        elif self.devices is not None:
            workers = list(self.devices.addresses)
        return {
            "stages": self.stages,
            "partition": partition,
            "workers": workers,
            "draft_worker": draft_worker,
            "weights": self.weights.value,
            "dtype": self.dtype.value,
            "device": self.device,
            "names": names,
            "link": LinkConfig(
                start_timeout_s=self.timeout,
                stall_timeout_s=self.timeout,
                heartbeat_timeout_s=self.heartbeat_timeout,
                rejoin_timeout_s=self.rejoin_timeout,
                reassign_after_s=self.reassign_after,
                int8_wire=self.int8_wire,
                insecure=self.insecure,
            ),
        }

    def _found(self, workers: list[str] | None, draft: str | None) -> tuple[list[str], list[str], str | None]:
        """Where the devices are in the network, and their names; and where the draft's one is."""
        if self.stages is not None:
            raise UsageError("give --stages for processes here, or --discover for devices in the network")
        if self.insecure:
            raise UsageError("give --discover or --insecure, not both: who is found is believed by a key alone")
        from flowspec.cluster.discovery import find_workers_and_draft
        from flowspec.wire.key_file import state_folder

        return find_workers_and_draft(state_folder(), self.devices, workers, draft)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and when a text ends; ``None`` leaves it to the model, or to the server."""

    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the likeliest tokens of this total probability; 1 keeps all.", show_default=_MODELS_OWN
        ),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Keep the K likeliest tokens; 0 keeps all.", show_default=_MODELS_OWN)
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Drop tokens less probable than this times the likeliest; 0 keeps all.", show_default=_MODELS_OWN
        ),
    ] = None
    seed: Seed = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Taken from the logits of tokens that were generated.", show_default="0")
    ] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, once for each time.", show_default="0")] = (
        None
    )
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Tokens of prompt and answer become less likely; 1 is off.", show_default=_MODELS_OWN),
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A text that ends the answer; may be repeated.")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID:BIAS", help="Added to the logit of a token, by its id; may be repeated."),
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end-of-text token.")] = False

    @classmethod
    def of(cls, params: SamplingParams) -> SamplingOptions:
        """Defaults of a command that says them all."""
        return cls(
            params.max_tokens,
            params.temperature,
            params.top_p,
            params.top_k,
            params.min_p,
            params.seed,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )

    def given(self) -> dict[str, Any]:
        """Those that were given, as fields of ``SamplingParams``. Raises ``UsageError``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["max_tokens"] = values.pop("max_new_tokens")
        values["stop"] = tuple(self.stop or ()) or None
        values["logit_bias"] = tuple(logit_bias(text) for text in self.logit_bias or ()) or None
        values["ignore_eos"] = self.ignore_eos or None
        return {name: value for name, value in values.items() if value is not None}


DEFAULT_MODEL, DEFAULT_STAGE_OPTIONS, DEFAULT_SAMPLING = ModelOptions(), StageOptions(), SamplingOptions()


def tree_changes(
    top_k: int | None, depth: int | None, size: int | None, min_probability: float | None
) -> dict[str, Any]:
    """Fields of ``TreeConfig``: what was given of the tree options. ``size``: the root included."""
    max_depth = None if depth is None else 2 * depth
    changes = {
        "top_k": top_k, "depth": depth, "max_depth": max_depth, "size": size, "min_probability": min_probability,
    }  # fmt: skip
    return {name: value for name, value in changes.items() if value is not None}
