"""The server as OpenAI's own client sees it: a real process with three workers, and the demo model."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from flowspec import LLM, SamplingParams
from server_process import ServerProcess, add_chat_template, forked_workers
from tiny_models import make_checkpoint

PROMPT = "def add(a, b):\n"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--stages", "3", "--max-waiting", "6", "--max-running", "4") as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Iterator[LLM]:
    """The same model by itself."""
    with LLM("demo", stages=1, in_process=True, draft="none", schedule="ar") as llm:
        yield llm


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(model="demo", prompt=prompt, **options)


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"temperature": 0, "max_tokens": 40}, SamplingParams(40)),
        ({"temperature": 0.8, "seed": 5, "max_tokens": 30}, SamplingParams(30, 0.8, seed=5)),
        (
            {
                "temperature": 0.9, "seed": -1, "top_p": 0.9, "max_tokens": 20, "presence_penalty": 0.5,
                "frequency_penalty": 0.3, "logit_bias": {"5": 1.5},
                "extra_body": {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
            },
            SamplingParams(
                20, 0.9, 0.9, 40, 2**64 - 1, min_p=0.01, presence_penalty=0.5, frequency_penalty=0.3,
                repetition_penalty=1.1, logit_bias=((5, 1.5),),
            ),
        ),
    ],
)  # fmt: skip
def test_completions_are_the_model_s_own_text(
    client: openai.OpenAI, reference: LLM, options: dict[str, Any], params: SamplingParams
) -> None:
    expected = reference.generate(PROMPT, params)
    answer = complete(client, **options)
    assert answer.choices[0].text == expected.text and answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.num_tokens
    streamed = list(complete(client, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == expected.text
    assert streamed[-1].usage.completion_tokens == expected.num_tokens
    assert [chunk.choices[0].finish_reason for chunk in streamed[:-1]][-1] == "length"
    assert len(streamed) > 4, "it did not stream"


def test_async_clients_at_once_get_what_each_gets_alone(server: ServerProcess, reference: LLM) -> None:
    prompts = [f"class Thing{i}:\n" for i in range(6)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(prompt: str) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(ask(prompt) for prompt in prompts)))

    assert asyncio.run(ask_all()) == [reference.generate(p, SamplingParams(24)).text for p in prompts]


def test_prompts_come_as_text_lists_and_tokens(client: openai.OpenAI, reference: LLM) -> None:
    ids = list(reference.encode(PROMPT))
    other = "import os\n"
    texts = {p: reference.generate(p, SamplingParams(8)).text for p in (PROMPT, other)}
    for prompt, expected in (
        (ids, [texts[PROMPT]]),
        ([PROMPT, other], [texts[PROMPT], texts[other]]),
        ([ids, list(reference.encode(other))], [texts[PROMPT], texts[other]]),
    ):
        answer = complete(client, prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))


def test_choices_differ_by_their_seeds_and_stream_apart(client: openai.OpenAI, reference: LLM) -> None:
    expected = [reference.generate(PROMPT, SamplingParams(12, 1.0, seed=7 + i)).text for i in range(3)]
    answer = complete(client, n=3, seed=7, max_tokens=12)
    assert [choice.text for choice in answer.choices] == expected and len(set(expected)) > 1
    texts = ["", "", ""]
    for chunk in complete(client, n=3, seed=7, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_text_ends_before_a_stop_string_that_spans_tokens(client: openai.OpenAI, reference: LLM) -> None:
    whole = reference.generate(PROMPT, SamplingParams(60)).text
    middle = len(whole) // 2
    stop = whole[middle - 3 : middle + 4]
    expected = whole[: whole.index(stop)]
    for stream in (False, True):
        answer = complete(client, max_tokens=60, temperature=0, stop=[stop, "never"], stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_echo_and_logprobs(client: openai.OpenAI, reference: LLM) -> None:
    assert complete(client, max_tokens=4, temperature=0, echo=True).choices[0].text.startswith(PROMPT)
    expected = reference.generate(PROMPT, SamplingParams(12, num_logprobs=3))
    told = complete(client, max_tokens=12, temperature=0, logprobs=3).choices[0].logprobs
    assert "".join(told.tokens) == expected.text
    assert told.token_logprobs == pytest.approx([max(top.values()) for top in told.top_logprobs])
    assert all(len(top) == 3 for top in told.top_logprobs) and told.text_offset[1] == len(told.tokens[0])


def test_an_answer_tells_how_it_came_about(client: openai.OpenAI) -> None:
    choice = complete(client, max_tokens=60, temperature=0, extra_body={"return_spec_stats": True}).choices[0]
    stats = choice.model_extra["spec_stats"]
    by_position = stats["num_accepted_tokens_per_pos"]
    assert sum(by_position) == stats["num_accepted_tokens"] and by_position == sorted(by_position, reverse=True)
    expected = 1 + stats["num_accepted_tokens"] / stats["num_drafts"]
    assert stats["mean_acceptance_length"] == pytest.approx(expected, abs=1e-3)
    assert 0 < stats["num_accepted_tokens"] <= stats["num_draft_tokens"] and stats["num_drafts"] <= 60
    assert stats["time_to_first_token_ms"] > 0 and stats["mean_inter_token_latency_ms"] > 0


def test_the_next_turn_reuses_the_last_one_s_prefix(client: openai.OpenAI, reference: LLM) -> None:
    prompt = "# A chat about queues\n" * 6
    for turn in range(3):
        answer = complete(client, prompt, max_tokens=10, temperature=0)
        assert answer.choices[0].text == reference.generate(prompt, SamplingParams(10)).text
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached == 0 if turn == 0 else cached > answer.usage.prompt_tokens - 25
        prompt += answer.choices[0].text + f"\n# turn {turn}\n"


def test_a_client_that_goes_away_frees_its_place(server: ServerProcess, client: openai.OpenAI) -> None:
    streams = [complete(client, max_tokens=900, stream=True, temperature=0) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 900}, timeout=0.3)
    deadline = time.monotonic() + 20
    while metric(server, "num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric(server, "num_requests_running") == 0 and metric(server, "request_cancelled_total") >= 4


def metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in re.findall(rf"^flowspec:{name}{{.*$", text, re.MULTILINE))


def test_too_many_requests_are_told_to_come_back(server: ServerProcess) -> None:
    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0}
            posts = [client.post(f"{server.url}/v1/completions", json=body) for _ in range(16)]
            return list(await asyncio.gather(*posts))

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert "waiting" in refused[0].json()["error"]["message"]
    texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
    assert len(texts) == 1 and len(answers) == len(refused) + sum(a.status_code == 200 for a in answers)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 1000}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logprobs": 100}, "logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": "a"}, "seed"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
    ],
)
def test_a_bad_field_gets_a_400_that_names_it(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    body = {"model": "demo", "prompt": PROMPT, **options}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body=body, cast_to=httpx.Response)
    error: Any = caught.value.body
    assert error["param"] == param and param in error["message"] and error["type"] == "invalid_request_error"


def test_other_mistakes_are_explained(client: openai.OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hi"}])
    for prompt in ("", [], [10**6], PROMPT * 2000):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            complete(client, prompt)
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 400


def test_unknown_fields_are_ignored_with_a_line_in_the_log(client: openai.OpenAI, server: ServerProcess) -> None:
    assert complete(client, max_tokens=2, extra_body={"best_off": 3, "temperature": None}).choices[0].text
    deadline = time.monotonic() + 10
    while "best_off" not in server.text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "ignored unknown fields: best_off" in server.text


def test_the_other_routes(server: ServerProcess, client: openai.OpenAI, reference: LLM) -> None:
    assert [model.id for model in client.models.list()] == ["demo"] == [client.models.retrieve("demo").id]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    text = "naïve 😀\n"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()
    assert tokens["tokens"] == list(reference.encode(text)) and tokens["count"] == len(tokens["tokens"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.content) == (200, b"")
    verbose = httpx.get(f"{server.url}/health?verbose=1").json()
    assert [stage["layers"] for stage in verbose["stages"]] == ["0:3", "3:6", "6:8"] and verbose["status"] == "ok"
    assert httpx.get(f"{server.url}/version").json()["version"]
    assert httpx.get(f"{server.url}/openapi.json").json()["paths"]


def test_metrics_count_what_was_done(server: ServerProcess, client: openai.OpenAI) -> None:
    names = ["prompt_tokens_total", "generation_tokens_total", "spec_decode_num_accepted_tokens_total"]
    before = [metric(server, name) for name in names]
    answer = complete(client, max_tokens=30, temperature=0, extra_body={"return_spec_stats": True})
    after = [metric(server, name) for name in names]
    stats = answer.choices[0].model_extra["spec_stats"]
    usage = answer.usage
    expected = [usage.prompt_tokens, usage.completion_tokens, stats["num_accepted_tokens"]]
    assert [b - a for a, b in zip(before, after, strict=True)] == expected
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_sum", "e2e_request_latency_seconds_count", "request_success_total",
        "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
        "spec_decode_num_accepted_tokens_per_pos_total", "kv_cache_usage_perc", "stage_busy_seconds_total",
        "stage_idle_seconds_total", "pruned_in_flight_total", "restarts_total", "link_bytes_total",
        "link_round_trip_seconds", "tree_rows_in_flight_bucket", "recoveries_total", "devices_away",
    ):  # fmt: skip
        assert f"flowspec:{name}{{" in text, name


# --- another server: a key, a chat template, and a stage that dies ---------------------------------------------------


def test_chats_keys_and_a_stage_that_dies(tmp_path: Path, checkpoint_dir: Callable[[str], Path]) -> None:
    directory = add_chat_template(make_checkpoint(tmp_path / "tiny", "llama"))
    with (
        ServerProcess("--model", str(directory), "--stages", "2", "--api-key", "s3cret", "--draft", "ngram") as server,
        LLM(directory, stages=1, in_process=True, draft="none", schedule="ar") as reference,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0, timeout=60) as client,
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !"}):
            for path in ("/v1/models", "/metrics", "/", "/static/main.js", "/dashboard/state", "/openapi.json"):
                assert httpx.get(server.url + path, headers=headers).status_code == 401, path
        assert httpx.get(f"{server.url}/health").status_code == 200
        page = httpx.get(server.url, headers={"accept": "text/html"})
        assert page.headers["www-authenticate"].startswith("Basic"), "a browser asks for the key"
        assert httpx.get(f"{server.url}/v1/models", auth=("anybody", "s3cret")).status_code == 200

        messages: Any = [
            {"role": "system", "content": "t5"},
            {"role": "user", "content": [{"type": "text", "text": "t7 t8"}]},
        ]
        prompt = "t1 t5 t1 t7 t8 t2"
        expected = reference.generate(prompt, SamplingParams(20)).text.removeprefix(" ")  # an answer begins a text
        options: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0}
        answer = client.chat.completions.create(**options, max_completion_tokens=20, logprobs=True, top_logprobs=2)
        assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
        assert answer.usage is not None and answer.usage.prompt_tokens == 6
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 20
        assert all(len(token.top_logprobs) == 2 for token in logprobs.content)
        chunks = list(client.chat.completions.create(**options, max_tokens=20, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
        wizard: Any = [{"role": "wizard", "content": "t1"}]
        image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        for bad, told in ((wizard, "unknown role"), (image, "messages")):
            with pytest.raises(openai.BadRequestError, match=told):
                client.chat.completions.create(model="tiny", messages=bad)
        count = httpx.post(
            f"{server.url}/tokenize", json={"messages": messages}, headers={"authorization": "Bearer s3cret"}
        ).json()["count"]
        assert count == 6

        stream = client.completions.create(
            model="tiny", prompt="t3 t4", max_tokens=200, stream=True, temperature=0.8, seed=5
        )
        text = next(iter(stream)).choices[0].text
        forked_workers(server.process)[-1].kill()
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == reference.generate("t3 t4", SamplingParams(200, 0.8, seed=5)).text, "the same stream goes on"
        kill_until_it_ends(server)
        assert server.exit_code() == 1, "a supervisor starts it again"
        assert "error: worker 2 was lost 3 times, and no token came in between" in server.text


def kill_until_it_ends(server: ServerProcess) -> None:
    """Kill the newest worker, whose successor is the newest then, until the server gives up."""
    killed: set[int] = set()
    while server.is_running:
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = forked_workers(server.process)  # one alone: the last one's successor is still to come
            if len(workers) == 2 and (victim := workers[-1]).pid not in killed:
                killed.add(victim.pid)
                victim.kill()
        time.sleep(0.05)
    assert len(killed) >= 3, "it gave up too early"
