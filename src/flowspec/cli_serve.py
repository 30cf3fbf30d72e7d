"""The command ``serve``: an OpenAI-compatible server over the workers."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Annotated, Any

import typer

from flowspec.cli_common import SCHEDULE_NAMES, Dtype, TerminalProgress, Verbose, errors_in_one_line, stderr
from flowspec.config import EngineConfig, LinkConfig, ServerConfig
from flowspec.device_list import DeviceList
from flowspec.errors import UsageError, WorkerError

logger = logging.getLogger("flowspec.server")


def serve(
    model: Annotated[str, typer.Option(help="A model directory, a hub name (owner/model), or 'demo'.")] = "demo",
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; else the name of its directory, or at the hub.")
    ] = None,
    draft: Annotated[
        str, typer.Option(help="auto, none, ngram, or the directory of an EAGLE head that fits the model.")
    ] = "auto",
    stages: Annotated[int | None, typer.Option(help="Stages to cut the model into, on this machine.")] = None,
    partition: Annotated[str | None, typer.Option(help="The stages' layer ranges instead, as 0:4,4:8.")] = None,
    workers: Annotated[
        str | None, typer.Option(help="host:port,host:port,... of running workers, in pipeline order.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="A file that lists the workers; see the README.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is the whole network.")] = ServerConfig.host,
    port: Annotated[int, typer.Option(help="0 lets the system choose.")] = ServerConfig.port,
    api_key: Annotated[
        str | None, typer.Option(envvar="FLOWSPEC_API_KEY", help="What clients must send; /health is open.")
    ] = None,
    schedule: Annotated[str, typer.Option(help=f"One of {SCHEDULE_NAMES}.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and arithmetic; float32 is exact.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="Torch device of driver and local workers, as cpu or cuda:0.")] = "cpu",
    max_running: Annotated[int, typer.Option(help="Requests that run at once.")] = EngineConfig.max_running,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = ServerConfig.max_waiting,
    kv_slots: Annotated[
        int, typer.Option(help="Tokens that the workers' KV caches hold in all; 0: by their free memory.")
    ] = EngineConfig.kv_slots,
    spec_stats: Annotated[
        bool, typer.Option("--spec-stats", help="Every answer says how it came about: drafts, accepted, pruned.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for workers to come up, or to answer.")
    ] = LinkConfig.stall_timeout_s,
    verbose: Verbose = False,
) -> None:
    """Serve a model to OpenAI clients, with metrics and a dashboard."""
    with errors_in_one_line(verbose):
        logging.getLogger("flowspec").setLevel(logging.DEBUG if verbose else logging.INFO)
        config = ServerConfig(host, port, api_key, max_waiting=max_waiting, spec_stats=spec_stats)
        engine_config = EngineConfig(max_running, kv_slots)
        if sum(given is not None for given in (stages, workers, cluster)) > 1:
            raise UsageError("give one of --stages, --workers and --cluster")
        addresses: list[str] | None = None
        names: tuple[str, ...] | None = None
        chosen: Any = partition
        if cluster is not None:
            devices = DeviceList.load(cluster)
            addresses, names = list(devices.addresses), devices.names
            chosen = partition or devices.partition
        elif workers is not None:
            addresses = [address.strip() for address in workers.split(",")]
        if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
            logger.warning("warning: %s is open to the network and wants no key; set --api-key", host)
        from flowspec.engine import Engine
        from flowspec.server.app import create_app
        from flowspec.server.feed import Feed
        from flowspec.server.listen import Listening, run

        listening = Listening.open(config.host, config.port)
        progress = TerminalProgress()
        feed = Feed(names)
        try:
            with Engine(
                model,
                draft=draft,
                stages=stages,
                partition=chosen,
                workers=addresses,
                schedule=schedule,
                dtype=dtype.value,
                device=device,
                link=replace(LinkConfig(), start_timeout_s=timeout, stall_timeout_s=timeout),
                config=engine_config,
                progress=progress,
                meter=feed,
            ) as engine:
                progress.stop()
                app = create_app(engine, config, feed, served_model_name)
                url, name = listening.url, app.state.api.model
                stderr.print(f"{name} in stages {engine.partition}: {url}/v1, dashboard {url}/; end it with Ctrl-C")
                run(app, listening, verbose)
                if (failure := app.state.api.service.failure) is not None:
                    raise WorkerError(failure)
        finally:
            progress.stop()
            listening.close()
