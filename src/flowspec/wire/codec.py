"""Messages to frames and back. Knows nothing of who sends them, or how they travel.

On the wire a message is one msgpack frame (a tagged array of its fields) and one raw frame for every tensor in it, in
the tensor's own dtype; or, where that is asked for, in int8 with a float32 scale for each row, which is not exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor

from flowspec.errors import ProtocolError, shortened
from flowspec.wire.messages import Configure, Message, ToDriver, ToWorker

_INT8 = "int8/"  # before the name of the dtype that was quantised
_SCALE_BYTES = 4
_MAX_CONFIGURE_BYTES = 2**18  # the file of an emulated cluster is in it


class Codec:
    """Messages to frames and back. Not thread-safe; one for each socket."""

    _DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int32": torch.int32,
        "int64": torch.int64,  # the hidden states of the synthetic language
    }
    _NAMES: ClassVar[dict[torch.dtype, str]] = {dtype: name for name, dtype in _DTYPES.items()}

    def __init__(self, int8_wire: bool = False) -> None:
        """``int8_wire``: encode float tensors [rows, n] in int8; whatever decodes them need not know."""
        self._int8_wire = int8_wire
        self._buffers: list[Any] = []
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._encode_tensor)
        self._to_worker = msgspec.msgpack.Decoder(ToWorker, dec_hook=self._decode_tensor)
        self._configure = msgspec.msgpack.Decoder(Configure)
        self._to_driver = msgspec.msgpack.Decoder(ToDriver, dec_hook=self._decode_tensor)

    def encode(self, message: Message) -> list[Any]:
        """The message's frames: header first, then a zero-copy view of each tensor."""
        self._buffers = []
        header = self._encoder.encode(message)
        return [header, *self._buffers]

    def decode_to_worker(self, frames: Sequence[Any]) -> ToWorker:
        """Raises ``ProtocolError`` for anything but one well-formed message to a worker."""
        return self._decode(self._to_worker, frames)

    def decode_configure(self, frames: Sequence[Any]) -> Configure:
        """All that somebody without a session may say: whatever else comes is not even looked into."""
        if len(frames) != 1 or len(frames[0]) > _MAX_CONFIGURE_BYTES:
            raise ProtocolError("somebody without a session sends what can begin none")
        return self._decode(self._configure, frames)

    def decode_to_driver(self, frames: Sequence[Any]) -> ToDriver:
        """Raises ``ProtocolError`` for anything but one well-formed message to the driver."""
        return self._decode(self._to_driver, frames)

    def _decode(self, decoder: msgspec.msgpack.Decoder[Any], frames: Sequence[Any]) -> Any:
        if not frames:
            raise ProtocolError("an empty message; is the peer a flowspec process of this version?")
        self._buffers = list(frames[1:])
        try:
            message = decoder.decode(frames[0])
        except (msgspec.DecodeError, ValueError, RuntimeError) as error:
            raise ProtocolError(
                f"not a flowspec message ({shortened(str(error))}); is the peer of this version?"
            ) from None
        finally:
            num_left, self._buffers = len(self._buffers), []
        if num_left:
            raise ProtocolError(f"{num_left} frames too many in a {type(message).__name__} message")
        return message

    def _encode_tensor(self, value: object) -> object:
        assert isinstance(value, Tensor), f"no wire form for {type(value).__name__}"
        rows = value.detach().to("cpu").contiguous()
        name, shape = self._NAMES[rows.dtype], tuple(rows.shape)
        if self._int8_wire and rows.is_floating_point() and rows.ndim == 2:
            name, rows = _INT8 + name, _to_int8(rows)
        self._buffers.append(rows.reshape(-1).view(torch.uint8).numpy().data if rows.numel() else b"")
        return name, shape

    def _decode_tensor(self, kind: type, value: Any) -> object:
        assert kind is Tensor, f"no wire form for {kind.__name__}"
        name, shape = value
        is_int8 = isinstance(name, str) and name.startswith(_INT8)
        dtype = self._DTYPES.get(name.removeprefix(_INT8) if is_int8 else name)
        if dtype is None or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"tensor of unknown type {name!r} or shape {shape!r}")
        if is_int8:
            num_rows, num_columns = shape
            return _from_int8(self._read_tensor((num_rows, num_columns + _SCALE_BYTES), torch.int8)).to(dtype)
        return self._read_tensor(tuple(shape), dtype)

    def _read_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._buffers:
            raise ValueError("a tensor's frame is missing")
        buffer = memoryview(self._buffers.pop(0)).cast("B")
        if len(buffer) != prod(shape) * dtype.itemsize:
            raise ValueError(f"a tensor's frame has {len(buffer)} bytes, not the {prod(shape) * dtype.itemsize} stated")
        if not len(buffer):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


def _to_int8(rows: Tensor) -> Tensor:
    """Float rows [n, k] as int8 [n, k + 4]: the values, at most half a scale off, and the bytes of the row's scale."""
    values = rows.float()
    scales = values.abs().amax(dim=1, keepdim=True) / 127 if rows.numel() else values.new_zeros(len(rows), 1)
    values = (values / torch.where(scales > 0, scales, 1)).round().to(torch.int8)
    return torch.cat([values, scales.view(torch.int8)], dim=1)


def _from_int8(packed: Tensor) -> Tensor:
    """float32 [n, k] from [n, k + 4]."""
    scales = packed[:, -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return packed[:, :-_SCALE_BYTES].float() * scales
