"""Checkpoints: config, tokenizer and tensors of a local directory or a hub name. No arithmetic.

A worker reads only the tensors of its stage, one at a time, so that its peak memory is the size of what it asked for.
The first use of a hub name fetches ``config.json`` alone; every other file is fetched when it is first needed.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from flowspec.core import DType, LayerRange, SamplingParams
from flowspec.errors import ModelError, UsageError, first_line, shortened
from flowspec.model.config_file import check_config
from flowspec.model.demo_pair import DEMO, demo_directory, demo_draft_directory
from flowspec.model.families import EMBEDDING, LM_HEAD, PREFIX, SHORT_ROPE, family_of, layer_prefix, rope_tables
from flowspec.model.hub import fetch
from flowspec.model.packed import Bits, PackedWeight, pack
from flowspec.model.quantised import Codes, layout_of
from flowspec.model.source import TensorSource
from flowspec.model.tensor_files import StoredTensor, open_tensors, read_tensor, stored_tensors

_NORM = "model.norm."
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SHARD = re.compile(r"[\w-][\w.-]*")  # beside the index: no path leads elsewhere
_SNAPSHOT = re.compile(r"/models--(.+)/snapshots/[^/]+$")  # of the hub's cache


def check_device(device: str) -> None:
    """Raises ``UsageError`` for a device that torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).rstrip(".")
        raise UsageError(f"device {device!r} cannot be used here ({reason}); give {' or '.join(_devices())}") from error


def _devices() -> list[str]:
    """What torch can use here."""
    accelerators = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *accelerators, *(["mps"] if torch.backends.mps.is_available() else [])]


class Checkpoint(TensorSource):
    """The files of one supported model. Every failure is a ``ModelError`` that names the file and the way out."""

    def __init__(self, name: str, directory: Path | None, config: PreTrainedConfig) -> None:
        self.name = name
        self.config = config
        self._directory = directory  # None: on the hub
        self._stored: dict[str, dict[str, StoredTensor]] = {}  # by file
        quantised = getattr(config, "quantization_config", None)
        self.layout = None if quantised is None else layout_of(quantised, f"{name}: config.json")
        self._from_hub: dict[str, Path | None] = {}  # what was asked for: each file once, however many tensors it has

    @classmethod
    def open(cls, name: str | Path) -> Checkpoint:
        """Open a local directory, a hub name, or ``demo``; read the config and check the architecture."""
        directory = _local_directory(name)
        config_path = _find(str(name), directory, "config.json")
        if config_path is None:
            raise ModelError(f"{name}: no config.json; give the directory or hub name of a transformers model")
        return cls(str(name), directory, read_config(config_path))

    @property
    def full_name(self) -> str:
        """The name for a process in another folder: a directory's absolute path; ``demo`` and hub names as they are."""
        return self.name if self._directory is None or self.name == DEMO else str(self._directory.resolve())

    @property
    def draft_directory(self) -> Path:
        """Where the model's own draft head would be."""
        return demo_draft_directory() if self.name == DEMO else Path(self.name) / "draft"

    @cached_property
    def own_bits(self) -> Bits | None:
        """Of the integer kernels that lose next to nothing of the model's own numbers; ``None``: they are floats."""
        return None if self.layout is None else self.layout.own_bits

    @property
    def max_positions(self) -> int:
        """Tokens of a text at most, its answer included.

        Where rotary scaling is switched on by hand, as Qwen's README says, ``max_position_embeddings`` is often still
        that of the unscaled model. A model with other frequencies for long texts has only short ones here.
        """
        stated, (rope, *others) = int(self.config.max_position_embeddings), rope_tables(self.config)
        if rope.get("rope_type") == SHORT_ROPE:
            return min(stated, int(rope.get("original_max_position_embeddings") or stated))
        if others or rope.get("rope_type") not in ("linear", "yarn"):
            return stated
        original = rope.get("original_max_position_embeddings") or stated
        return max(stated, int(original * rope.get("factor", 1.0)))

    @property
    def title(self) -> str:
        """What people call the model: the name of its directory, or at the hub."""
        if self._directory is None or self.name == DEMO:
            return self.name.rpartition("/")[2]
        directory = self._directory.resolve()
        if snapshot := _SNAPSHOT.search(directory.as_posix()):
            return snapshot[1].replace("--", "/").rpartition("/")[2]
        return directory.name or str(directory)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty where there is none."""
        path = self._find("generation_config.json")
        return _read_json(path) if path else {}

    @cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """What generation_config.json says of sampling, as fields of ``SamplingParams``. Raises ``ModelError``."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given: dict[str, Any] = {name: self.generation_config.get(name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        if self.generation_config.get("do_sample") is False:
            given = {"temperature": 0.0}
        elif self.generation_config.get("do_sample") is True:
            given = {"temperature": 1.0, **given}
        if given.get("top_k") == -1:  # all tokens, as 0
            given["top_k"] = 0
        try:
            params = SamplingParams(**given)
        except UsageError as error:
            raise ModelError(f"{self.name}: generation_config.json: {error}; mend or remove it there") from None
        return {name: getattr(params, name) for name in given}

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a text: those of generation_config.json, else those of config.json."""
        return self._eos_ids("generation_config.json") or self._eos_ids("config.json")

    @cached_property
    def all_eos_token_ids(self) -> frozenset[int]:
        """Those of both files. Fine-tunes for chats often say their end of turn in only one of them."""
        return self._eos_ids("generation_config.json") | self._eos_ids("config.json")

    def _eos_ids(self, filename: str) -> frozenset[int]:
        is_config = filename == "config.json"
        value = self.config.eos_token_id if is_config else self.generation_config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, (int, float)) and i >= 0 and i == int(i) for i in ids):
            raise ModelError(f"{self.name}: {filename}: eos_token_id is {value!r}; it must be a token id, or several")
        return frozenset(int(token_id) for token_id in ids)

    def path(self, filename: str) -> Path:
        """The local path of one file, fetched from the hub if the model is there."""
        path = self._find(filename)
        if path is None:
            raise ModelError(f"{self.name}: {filename} is missing; download or copy the model again")
        return path

    def _find(self, filename: str) -> Path | None:
        if self._directory is not None:
            return _find(self.name, self._directory, filename)
        if filename not in self._from_hub:
            self._from_hub[filename] = _find(self.name, None, filename)
        return self._from_hub[filename]

    def files(self) -> list[Path]:
        """What of the model lies on this device by now, in a fixed order."""
        return sorted(path for path in self.path("config.json").parent.iterdir() if path.is_file())

    def tensor_names(self) -> frozenset[str]:
        """As of a model with its lm_head, whatever the files leave out."""
        return frozenset(self._parts)

    def stored_names(self) -> frozenset[str]:
        """Of what the files hold, which may be parts of tensors; their prefixes are as of a model with its lm_head."""
        return frozenset(self._shards)

    def parts_of(self, tensor_name: str) -> tuple[str, ...]:
        """What is stored of one of the model's tensors: itself, unless it is quantised."""
        return self._parts.get(tensor_name, (tensor_name,))

    def names_of_stage(self, layers: LayerRange) -> list[str]:
        """Of what is stored of the tensors that a stage runs, sorted."""
        prefixes = [layer_prefix(index) for index in range(layers.start, layers.end)]
        prefixes += [EMBEDDING] if layers.start == 0 else []
        prefixes += [_NORM] if layers.end == self.num_layers else []
        wanted = [name for name in self.tensor_names() if name.startswith(tuple(prefixes))]
        return sorted(part for name in wanted for part in self.parts_of(name))

    def shard_of(self, tensor_name: str) -> str:
        """The name of the file that holds a tensor."""
        tensor_name = self.parts_of(tensor_name)[0]
        if tensor_name not in self._shards:
            raise ModelError(
                f"{self.name}: config.json asks for {tensor_name}, but none of the safetensors files holds it; "
                "files and config do not belong together, download or save the model again"
            )
        return self._shards[tensor_name]

    def tensors(
        self, names: Iterable[str], dtype: DType, device: torch.device | str
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors one at a time, converted, in private memory on the device; no other is read."""
        names_by_shard: dict[str, list[str]] = defaultdict(list)
        for name in names:
            names_by_shard[self.shard_of(name)].append(name)
        for name in chain.from_iterable(names_by_shard.values()):
            codes = self._codes(name)
            if codes is None:
                yield name, self._read(name, dtype, device)
            else:
                yield name, codes.floats().to(device=device, dtype=getattr(torch, dtype))

    def own_packed(self, name: str, bits: Bits) -> PackedWeight | None:
        codes = self._codes(name)
        return None if codes is None else codes.packed(bits)

    def packed(self, name: str, bits: Bits) -> PackedWeight:
        """What is quantised is read once, whether kernels of so many bits hold it or not."""
        codes = self._codes(name)
        if codes is None:
            return super().packed(name, bits)
        return codes.packed(bits) or pack(codes.floats(), bits, f"{self.name}: {name}")

    def has_four_bits(self, name: str) -> bool:
        """Whether its codes have, in a file whose matrices have 4 bits."""
        return len(self.parts_of(name)) > 1

    def float_dtype(self, name: str) -> DType:
        stored = self.stored(name) if len(self.parts_of(name)) == 1 else None
        return "float32" if stored is None else stored.float_dtype

    def bits_of(self, names: Iterable[str], bits: Bits) -> Bits:
        return 8 if bits == self.own_bits == 4 and not all(map(self.has_four_bits, names)) else bits

    def _codes(self, name: str) -> Codes | None:
        """Of a tensor that is quantised."""
        parts = self.parts_of(name)
        if self.layout is None or len(parts) == 1:
            return None
        return self.layout.read(name, {part: self._read(part, None, "cpu") for part in parts}, self.name)

    def _read(self, stored_name: str, dtype: DType | None, device: torch.device | str) -> torch.Tensor:
        """As ``read_tensor``."""
        return read_tensor(
            self.path(self.shard_of(stored_name)), stored_name.removeprefix(self._left_out), dtype, device
        )

    @property
    def revision(self) -> str:
        """Of a model at the hub: which one of its versions the files are; empty for files that nobody numbers."""
        if self._directory is not None:
            return ""
        path = self._find("config.json")
        return "" if path is None else path.parent.name

    def stored(self, name: str) -> StoredTensor | None:
        """Where what is stored lies; ``None``: its file is not in the model's directory. From the hub it is fetched."""
        path = self._find(self.shard_of(name))
        if path is None:
            return None
        if path.name not in self._stored:
            self._stored[path.name] = stored_tensors(path)
        return self._stored[path.name].get(name.removeprefix(self._left_out))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._directory or self.name, **self._renamed_config, trust_remote_code=False
            )
            assert tokenizer.is_fast, "tokenizers of transformers' older kind are not read"
            return tokenizer
        except BaseException as error:  # a panic in the tokenizers library is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ModelError(
                f"{self.name}: its tokenizer cannot be loaded ({first_line(error)}); tokenizer.json and "
                "tokenizer_config.json belong beside config.json"
            ) from error

    @property
    def _renamed_config(self) -> dict[str, Any]:
        """For what would read config.json itself: where that has a ``model_type`` that transformers does not know."""
        own = _read_json(self.path("config.json")).get("model_type")
        return {} if own == self.config.model_type else {"config": self.config}

    @cached_property
    def _parts(self) -> dict[str, tuple[str, ...]]:
        """By the model's own tensor names."""
        names = self.stored_names()
        return {name: (name,) for name in names} if self.layout is None else self.layout.weights_among(names)

    @cached_property
    def _shards(self) -> dict[str, str]:
        """Tensor name -> file name."""
        stored = self._stored_shards
        return {name if name == LM_HEAD else self._left_out + name: shard for name, shard in stored.items()}

    @cached_property
    def _left_out(self) -> str:
        """What the files' tensor names lack: a model that was saved without its lm_head has no ``model.`` in them."""
        return PREFIX if EMBEDDING.removeprefix(PREFIX) in self._stored_shards else ""

    @cached_property
    def _stored_shards(self) -> dict[str, str]:
        """By the files' own tensor names. A single file comes first, as in transformers."""
        single = self._find("model.safetensors")
        if single is not None:
            with open_tensors(single) as file:
                return dict.fromkeys(file.keys(), single.name)
        index = self._find("model.safetensors.index.json")
        if index is None:
            raise ModelError(
                f"{self.name}: neither model.safetensors nor model.safetensors.index.json; save the model with "
                "transformers' save_pretrained, older formats are not read"
            )
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index}: no weight_map in it; download or copy the model again")
        for name, shard in weight_map.items():
            if not (isinstance(shard, str) and _SHARD.fullmatch(shard)):
                told = shortened(repr(shard), 60)
                raise ModelError(
                    f"{index}: {shortened(name, 60)} is in {told}, which is no file beside it; download it again"
                )
        return weight_map


def is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None


def _local_directory(name: str | Path) -> Path | None:
    """The directory that a name means, or None if it can only be a hub name."""
    if name == DEMO:
        if not (demo_directory() / "config.json").is_file():
            raise ModelError(f"the demo model is not in this installation ({demo_directory()}); reinstall flowspec")
        return demo_directory()
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if isinstance(name, Path) or directory.exists() or not is_hub_name(name):
        raise ModelError(f"{name} is not a directory; give a model's directory, a hub name (owner/model), or 'demo'")
    return None


def _find(name: str, directory: Path | None, filename: str) -> Path | None:
    """The local path of a file, or None if the model has no such file."""
    if directory is not None:
        path = directory / filename
        return path if path.is_file() else None
    return fetch(name, filename)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no JSON file ({first_line(error)}); download or copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; download or copy it again")
    return content


def read_config(path: Path) -> PreTrainedConfig:
    """Of a model that can be cut; raises ``ModelError`` for any other one."""
    content = _read_json(path)
    family = family_of(content.get("model_type"), str(path))
    if (quantised := content.get("quantization_config")) is not None:
        layout_of(quantised, str(path))
    check_config(content, str(path))
    try:
        if family.read_as is None:
            config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        else:  # the code beside it is not run
            known = {name: value for name, value in content.items() if name not in ("model_type", "auto_map")}
            config = CONFIG_MAPPING[family.read_as].from_dict(known)
    except Exception as error:  # whatever transformers meets in what somebody has written
        raise ModelError(f"{path} is no valid {family.title} config ({first_line(error)})") from error
    check_config(config.to_dict(), str(path))  # what the file leaves out
    return config
