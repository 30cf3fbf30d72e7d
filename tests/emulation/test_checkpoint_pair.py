"""Real models and their heads in virtual time: the tokens are the model's own, and what heads cost is charged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from command_line import Run
from flowspec.config import ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.emulation.checkpoint_pair import CheckpointPair
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Experiment
from flowspec.emulation.simulator import simulate
from flowspec.errors import UsageError
from flowspec.request.records import RequestRecord
from tiny_gguf import write_text_gguf
from tiny_models import make_text_checkpoint

PROMPT = "t1 t5 t9 t2 t5"
CLUSTERS = Path(__file__).parents[2] / "clusters"
NANO = ClusterDescription.load(CLUSTERS / "7b-nano-150m.toml")
HEADS = ("draft", "eagle3", "dflash", "dspark", "dflash2", "peagle")
CHAT = "{% for message in messages %}<s>{{ message.content }}{% endfor %}</s>"


def simulated(pair: CheckpointPair, schedule: str, temperature: float = 0.0, prompt: str = PROMPT) -> RequestRecord:
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=3, ignore_eos=True)
    experiment = Experiment(NANO.with_stages(3), ScheduleConfig(), params, with_spans=True)
    return simulate(experiment, pair, schedule, [(0, prompt)])[0]


@pytest.fixture(scope="module")
def pair_of(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], CheckpointPair]:
    directory = checkpoint_dir("qwen3")
    return cache(lambda head: CheckpointPair(str(directory), str(directory / head)))


@pytest.mark.parametrize(("head", "temperature"), [(head, 0.8 * (i % 2)) for i, head in enumerate(HEADS)])
def test_a_head_changes_no_token(pair_of: Callable[[str], CheckpointPair], head: str, temperature: float) -> None:
    pair = pair_of(head)
    plain = simulated(pair, "ar", temperature)
    for schedule in ("serial", "lockstep", "flow"):
        record = simulated(pair, schedule, temperature)
        assert record.token_ids == plain.token_ids
        assert record.draft_passes > 0


def test_features_are_on_the_links_and_in_the_forwards(pair_of: Callable[[str], CheckpointPair]) -> None:
    """A row brings a vector more where its request's draft reads layers, which ``ar`` has none of."""
    plain, tapped = (simulated(pair_of(head), "serial") for head in ("draft", "eagle3"))
    assert 1.5 < (tapped.link_bytes / tapped.rows) / (plain.link_bytes / plain.rows) < 2.1
    one_row = [
        next(s.end_s - s.start_s for s in record.spans if s.work == "forward" and s.place == 1 and s.num_rows == 1)
        for record in (simulated(pair_of("draft"), "ar"), simulated(pair_of("eagle3"), "ar"))
    ]
    assert one_row[0] == pytest.approx(one_row[1], rel=0.02), "only the context differs"
    stage = NANO.with_stages(3).stage_s(0, 8, 0)
    assert stage < NANO.with_stages(3).stage_s(0, 8, 0, num_taps=1) < 1.02 * stage


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_language_model_drafts_at_the_cost_of_its_passes(tmp_path: Path, temperature: float) -> None:
    """The same model, which is right as long as nothing is drawn."""
    model = str(make_text_checkpoint(tmp_path / "model"))
    pair = CheckpointPair(model, str(make_text_checkpoint(tmp_path / "draft")))
    plain = simulated(pair, "ar", temperature, prompt="the sea and the wind")
    for schedule in ("serial", "lockstep", "flow"):
        record = simulated(pair, schedule, temperature, prompt="the sea and the wind")
        assert record.token_ids == plain.token_ids
        passes = [span for span in record.spans if span.place == 0 and span.work == "draft pass"]
        assert passes and all(s.end_s - s.start_s == pytest.approx(0.0328) for s in passes)
        assert record.accepted > 0
    silent = replace(NANO, ours=replace(NANO.ours, model_pass_ms=None))
    experiment = Experiment(silent, ScheduleConfig(), SamplingParams(max_tokens=4))
    with pytest.raises(UsageError, match="has no model_pass_ms for each driver; add it, or simulate another draft"):
        simulate(experiment, pair, "flow", [(0, "the sea")])


def test_integer_weights_and_n_grams_run_too(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    write_text_gguf(tmp_path / "model.gguf", Kind.Q8_0, num_hidden_layers=3)
    pair = CheckpointPair(str(tmp_path / "model.gguf"), "ngram")
    assert pair.weights == "int8"
    assert simulated(pair, "flow", prompt="the sea").token_ids == simulated(pair, "ar", prompt="the sea").token_ids


def test_a_model_that_chats_is_asked(tmp_path: Path) -> None:
    pairs = [CheckpointPair(str(make_text_checkpoint(tmp_path / name, chat_template=template)), "none")
             for name, template in (("plain", None), ("chat", CHAT))]  # fmt: skip
    plain, chat = (pair.encode("hello world") for pair in pairs)
    assert len(chat) > len(plain) and plain[-1] in chat and chat[-1] != plain[-1]


def test_an_emulation_runs_a_head_that_reads_layers(checkpoint_dir: Callable[[str], Path], run: Run) -> None:
    directory, cluster = checkpoint_dir("qwen3"), CLUSTERS / "7b-nano-150m.toml"
    sizes = ("--max-new-tokens", "4", "--num-prompts", "1", "--time-scale", "4")
    what = ("--model", str(directory), "--draft", str(directory / "eagle3"), "--schedule", "ar,flow", "--json")
    done = run("emulate", str(cluster), *what, *sizes)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    for name in ("ar", "flow"):
        assert value["emulation"][name]["emulated_to_simulated"] == pytest.approx(1, abs=0.1)
