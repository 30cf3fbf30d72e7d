"""llama.cpp for ``rivals.py``, in a Python of its own that has ``xllamacpp`` and needs nothing of flowspec's.

It reads requests from stdin and answers each on stdout, one JSON object a line. A request names threads, speculation,
context, prompt ids and how many tokens to make, greedily; the answer has them, and the seconds after the first one.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]

TIMEOUT_S = 600


def open_server(model: str, threads: int, speculation: str, context: int) -> Any:
    """``speculation``: the end of a name in ``common_speculative_type``; all else is as llama.cpp has it by default."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx = context
    params.n_parallel = 1
    params.port = 0  # any free one
    params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{speculation}")]
    return xllamacpp.Server(params)


def complete(server: Any, prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """Over the server's HTTP: only there it tells token ids. Times are its own, so HTTP is not in them."""
    body = {"prompt": prompt_ids, "n_predict": num_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"return_tokens": True, "cache_prompt": False}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        answer = json.load(response)
    return {"token_ids": answer["tokens"], "decode_s": answer["timings"]["predicted_ms"] / 1000}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints is no reply
    servers: dict[tuple[int, str], Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["threads"], request["speculation"]
        if key not in servers:
            servers[key] = open_server(request["model"], *key, request["context"])
        print(
            json.dumps(complete(servers[key], request["prompt_ids"], request["num_tokens"])), file=replies, flush=True
        )


if __name__ == "__main__":
    main()
