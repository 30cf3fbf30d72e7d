"""The command ``serve``: an OpenAI-compatible server over the workers."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Annotated

import typer

from flowspec.cli.options import DEFAULT_MODEL, DEFAULT_STAGE_OPTIONS, ApiKey, ModelOptions, StageOptions, Verbose
from flowspec.cli.terminal import TerminalProgress, errors_in_one_line, stderr
from flowspec.config import EngineConfig, ServerConfig
from flowspec.errors import WorkerError
from flowspec.model.demo_pair import DEMO
from flowspec.model.fetched import A_TOY, talking_model

logger = logging.getLogger("flowspec.server")


def serve(
    model: ModelOptions = DEFAULT_MODEL,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="its directory, or name at the hub")
    ] = None,
    stage_options: StageOptions = DEFAULT_STAGE_OPTIONS,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is the whole network.")] = ServerConfig.host,
    port: Annotated[int, typer.Option(help="0 lets the system choose.")] = ServerConfig.port,
    api_key: ApiKey = None,
    max_running: Annotated[int, typer.Option(help="Requests that run at once.")] = EngineConfig.max_running,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = ServerConfig.max_waiting,
    kv_slots: Annotated[
        int, typer.Option(help="Tokens that the workers' KV caches hold in all; 0: by their free memory.")
    ] = EngineConfig.kv_slots,
    memory_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of earlier requests' texts that guide guesses at later ones, of whoever, and never the text; "
            "20 bytes each; 0: none."
        ),
    ] = EngineConfig.memory_tokens,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A page that may use the server from a browser, as https://example.com; * for all; may be repeated.",
        ),
    ] = None,
    spec_stats: Annotated[
        bool, typer.Option("--spec-stats", help="Every answer says how it came about: drafts, accepted, pruned.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Serve a model to OpenAI clients, with a dashboard."""
    with errors_in_one_line(verbose, is_service=True):
        logging.getLogger("flowspec").setLevel(logging.DEBUG if verbose else logging.INFO)
        config = ServerConfig(host, port, api_key, max_waiting=max_waiting, spec_stats=spec_stats)
        config = replace(config, cors_origins=tuple(cors_origin or ()))
        engine_config = EngineConfig(max_running, kv_slots, memory_tokens=memory_tokens)
        arguments = model.arguments(talking_model()) | stage_options.arguments(model.draft_worker)
        if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
            logger.warning("warning: %s is open to the network and wants no key; set --api-key", host)
        if "*" in config.cors_origins and api_key is None:
            logger.warning("warning: any web page that a browser here shows may use the server; set --api-key")
        from flowspec.engine.spec import EngineSpec, open_engine
        from flowspec.server.app import create_app
        from flowspec.server.feed import Feed
        from flowspec.server.listen import Listening, run

        listening = Listening.open(config.host, config.port)
        progress = TerminalProgress()
        feed = Feed()
        try:
            with open_engine(EngineSpec(**arguments, config=engine_config, progress=progress)) as engine:
                progress.stop()
                app = create_app(engine, config, feed, served_model_name)
                url, name = listening.url, app.state.api.model
                told = f"{name} in stages {engine.partition}: {url}/v1, dashboard {url}/; end it with Ctrl-C"
                if model.model is None and engine.model.checkpoint.name == DEMO:
                    told += f"\nflowspec: {DEMO} is {A_TOY}"
                run(app, listening, verbose, lambda: stderr.print(told, markup=False, soft_wrap=True))
                if (failure := app.state.api.service.failure) is not None:
                    raise WorkerError(failure)
        finally:
            progress.stop()
            listening.close()
