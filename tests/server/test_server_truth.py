"""The API does what it says, or says that it does not. In process, with a model that writes text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engines import engine_of
from flowspec.config import ServerConfig
from flowspec.engine.engine import Engine
from flowspec.server.app import create_app
from flowspec.server.feed import Feed
from tiny_models import make_text_checkpoint

TEMPLATE = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    "{{ 'think' if enable_thinking else '' }}a:"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = make_text_checkpoint(tmp_path_factory.mktemp("truth") / "tiny", chat_template=TEMPLATE)
    with engine_of(directory, stages=2, in_process=True, draft="ngram") as made:
        yield made


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    config = ServerConfig(api_key="s3cret", cors_origins=("https://page.example",))
    with TestClient(create_app(engine, config, Feed()), headers={"authorization": "Bearer s3cret"}) as made:
        yield made


def id_of(engine: Engine, name: str) -> int:
    token_id = engine.model.tokenizer.convert_tokens_to_ids(name)
    assert isinstance(token_id, int)
    return token_id


def words(engine: Engine) -> dict[str, int]:
    """A bias that makes a random model write valid text."""
    return {str(id_of(engine, name)): 100 for name in ("▁hello", "▁world", "ret", "urn", "a", "▁the", "▁")}


def complete(client: TestClient, **options: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4, "temperature": 0} | options)


def chat(client: TestClient, **options: Any) -> Any:
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0} | options
    return client.post("/v1/chat/completions", json=body)


def events(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# --- fields ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("structured_outputs", {"regex": "a"}),
        ("suffix", "the end"),
        ("best_of", 2),
        ("min_tokens", 3),
        ("include_stop_str_in_output", True),
        ("continue_final_message", True),
        ("prompt_logprobs", 1),
        ("use_beam_search", True),
    ],
)
def test_a_field_that_would_change_the_answer_and_cannot_is_refused_by_name(
    client: TestClient, field: str, value: Any
) -> None:
    for ask in (complete, chat):
        error = ask(client, **{field: value}).json()["error"]
        assert error["param"] == field and error["message"].startswith(field), error
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"best_of": 1, "min_tokens": 0, "suffix": None, "suffix_": ""},
        {"include_stop_str_in_output": False, "continue_final_message": False},
        {"user": "me", "metadata": {}, "store": False, "service_tier": "auto", "something": 1},
    ],
)
def test_fields_that_change_nothing_pass(client: TestClient, options: dict[str, Any]) -> None:
    for ask in (complete, chat):
        assert ask(client, **options).status_code == 200


@pytest.mark.parametrize("ask", [complete, chat])
def test_no_limit_is_the_room_that_there_is(client: TestClient, engine: Engine, ask: Any) -> None:
    bias = {str(engine.model.tokenizer.convert_tokens_to_ids("a")): 100}  # nothing ends it early
    for value in (-1, None):
        usage = ask(client, max_tokens=value, logit_bias=bias).json()["usage"]
        assert usage["total_tokens"] == engine.model.checkpoint.max_positions
    for bad in (0, -2, 1.5, "4"):
        assert ask(client, max_tokens=bad).json()["error"]["param"] == "max_tokens"
    absent = client.post("/v1/completions", json={"prompt": "hello", "logit_bias": bias}).json()
    assert absent["usage"]["completion_tokens"] == 16, "as at OpenAI"


def test_logprobs_that_are_off_may_say_so(client: TestClient) -> None:
    assert chat(client, logprobs=False, top_logprobs=0).status_code == 200
    assert "top_logprobs needs logprobs" in chat(client, logprobs=False, top_logprobs=2).text


# --- messages ---


def test_what_a_model_cannot_read_is_refused(client: TestClient) -> None:
    image = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    error = chat(client, messages=[{"role": "user", "content": image}]).json()["error"]
    assert "takes text only" in error["message"] and "image_url" in error["message"] and error["param"] == "messages"
    error = chat(client, messages=[*HELLO, {"role": "wizard", "content": "abra"}]).json()["error"]
    assert "no role 'wizard'" in error["message"] and error["param"] == "messages"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert (
        chat(client, messages=[{"role": "user", "content": parts}]).json()["choices"]
        == (chat(client).json()["choices"])
    )


def test_what_the_template_knows_reaches_it(client: TestClient) -> None:
    def count(**options: Any) -> int:
        return client.post("/tokenize", json={"messages": HELLO} | options).json()["count"]

    assert count(chat_template_kwargs={"enable_thinking": True}) > count()
    assert chat(client, chat_template_kwargs={"enable_thinking": True}).status_code == 200
    assert chat(client, chat_template_kwargs={"tokenize": True}).json()["error"]["param"] == "chat_template_kwargs"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "hello"}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert count(messages=messages) > count(messages=[*HELLO, {"role": "assistant", "content": None}])


# --- log-probabilities ---


def test_bytes_of_tokens_join_to_the_text_and_no_alternative_is_lost(client: TestClient, engine: Engine) -> None:
    ids = [id_of(engine, name) for name in ("<0xE2>", "<0x82>", "<0xAC>", "▁world")]
    found: list[int] = []
    for token_id in ids:  # the model is random: it is made to write a half character, and its rest
        prompt = [*engine.model.tokenizer("hello").input_ids, *found]
        answer = complete(client, prompt=prompt, max_tokens=1, logprobs=20, logit_bias={str(token_id): 100}).json()
        logprobs = answer["choices"][0]["logprobs"]
        assert len(logprobs["top_logprobs"][0]) == 20, "two that look alike became one"
        assert logprobs["tokens"] == [" world" if token_id == ids[-1] else f"bytes:\\x{['e2', '82', 'ac'][len(found)]}"]
        found.append(token_id)
    bias = words(engine)
    told = chat(client, max_tokens=30, logprobs=True, top_logprobs=3, logit_bias=bias).json()["choices"][0]
    own = b"".join(bytes(token["bytes"]) for token in told["logprobs"]["content"])
    assert not own.startswith(b" "), "an answer is a text of its own"
    assert own.decode() == told["message"]["content"]


def test_offsets_go_on_from_chunk_to_chunk(client: TestClient, engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "logprobs": 1, "temperature": 1.0, "seed": 3}
    options["logit_bias"] = words(engine)
    choice = complete(client, **options).json()["choices"][0]
    streamed = [event["choices"][0] for event in events(complete(client, stream=True, **options))]
    offsets = [offset for each in streamed if each["logprobs"] for offset in each["logprobs"]["text_offset"]]
    assert len([each for each in streamed if each["logprobs"]]) > 3, "it did not stream"
    assert offsets == choice["logprobs"]["text_offset"] and len(offsets) == 40
    for offset, name in zip(offsets, choice["logprobs"]["tokens"], strict=True):
        assert choice["text"][offset:].startswith(name)


def test_the_first_token_keeps_its_space_and_an_echo_is_one_text(client: TestClient, engine: Engine) -> None:
    world = id_of(engine, "▁world")
    for echo, expected in ((False, " world"), (True, "hello world")):
        answer = complete(client, echo=echo, max_tokens=1, logit_bias={str(world): 100}).json()
        assert answer["choices"][0]["text"] == expected


# --- routes ---


def test_pages_of_a_named_origin_may_use_the_server(client: TestClient) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = {"origin": "https://page.example", "authorization": "", **asks}
    allowed = client.options("/v1/chat/completions", headers=preflight)
    assert allowed.status_code == 200, "a preflight brings no key"
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    other = client.options("/v1/chat/completions", headers=preflight | {"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    answer = client.get("/v1/models", headers={"origin": "https://page.example"})
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    refused = client.get("/v1/models", headers={"origin": "https://page.example", "authorization": "Bearer no"})
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


def test_routes_are_found_and_missing_ones_are_named(client: TestClient) -> None:
    for path in ("/", "/health", "/v1/models"):
        head = client.head(path)
        assert head.status_code == 200 and not head.content
    listed = client.get("/v1/models/").json()["data"][0]
    assert listed["id"] == "tiny" and listed["created"] > 1_700_000_000
    assert client.post("/v1/completions/", json={"prompt": "hello"}, follow_redirects=False).status_code == 200
    for method, path in (("GET", "/v1/nothing"), ("POST", "/v1/embeddings"), ("GET", "/docs")):
        error = client.request(method, path).json()["error"]
        assert error["message"].startswith(f"no such route: {path}") and error["code"] is None
    error = complete(client, model="other").json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert client.put("/v1/completions").status_code == 405


def test_a_stream_says_once_when_it_was_made(client: TestClient) -> None:
    chunks = events(complete(client, stream=True, max_tokens=30))
    assert len({chunk["created"] for chunk in chunks}) == 1


def test_an_origin_that_is_none_is_refused() -> None:
    for bad in ("page.example", "https://page.example/path", ""):
        with pytest.raises(ValueError, match="cors origin"):
            ServerConfig(cors_origins=(bad,))


def test_a_template_that_cannot_work_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_text_checkpoint(tmp_path / "broken", chat_template="{{ raise_exception('never') }}")
    with engine_of(directory, stages=1, in_process=True) as engine:
        create_app(engine, ServerConfig())
    assert "broken cannot chat: the model's chat template refuses them: never" in caplog.text
