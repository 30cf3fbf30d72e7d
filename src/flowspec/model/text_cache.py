"""Keys and values of a text in the layers of a head that guesses blocks: rows in order, and nothing else is kept."""

from __future__ import annotations

from torch import Tensor, cat, stack

_ROWS = 256  # of the text that have room at first


class TextCache:
    """Keys and values of the text in each layer, [heads, capacity, d]; positions 0, 1, ... in order."""

    def __init__(self, num_layers: int) -> None:
        self.num_rows = 0
        self._layers: list[Tensor | None] = [None] * num_layers

    def cut(self, num_rows: int, next_id: int) -> None:
        """Keep the first rows alone. ``next_id``: the token behind them, which nothing hangs on here."""
        self.num_rows = num_rows

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Behind ``num_rows``, both [heads, n, d]; the caller moves that on when all layers have written.

        Returns all that there is up to these, [heads, num_rows + n, d].
        """
        rows, end = stack((keys, values)), self.num_rows + keys.shape[1]
        own = self._layers[layer]
        if own is None or end > own.shape[2]:
            capacity = max(_ROWS, 2 * end)
            grown = rows.new_empty(2, rows.shape[1], capacity, rows.shape[3])
            if own is not None:
                grown[:, :, : self.num_rows] = own[:, :, : self.num_rows]
            own = self._layers[layer] = grown
        own[:, :, self.num_rows : end] = rows
        return own[0, :, :end], own[1, :, :end]

    def with_rows(self, layer: int, keys: Tensor, values: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Those of the text from ``start`` on, and these behind them, which are not kept; all [heads, n, d]."""
        own = self._layers[layer]
        if own is None:
            return keys, values  # a text of one token has nothing before it
        text = own[:, :, start : self.num_rows]
        return cat((text[0], keys), dim=1), cat((text[1], values), dim=1)
