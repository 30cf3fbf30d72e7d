"""Products of rows with weights, compiled by numba: of whole numbers within a group of inputs, or of floats alone.

With packed weights rows are rounded to 8 bits, each group of inputs of each row with a scale of its own. The products
of a group add up in whole numbers, whose order does not matter, and groups follow one another: so a row's bits are its
own, whatever rows come with it, and however these are shared out. With weights in floats rows stay as they are;
``float_tile_code`` says in which order their products add up.

Packed weights lie so that an instruction multiplies four inputs of a row with those of many outputs: outputs are cut
into blocks of ``LANES``, the inputs of a group into quads. Weights in floats lie input by input.
"""

from __future__ import annotations

import numpy as np

from flowspec.model.compiled import compiled, inlined
from flowspec.model.packed import GROUP
from flowspec.model.tile_code import (
    MANY_ROWS,
    MIDDLE,
    QUAD,
    QUADS,
    ROWS,
    blocks_at_once,
    eight_rows,
    four_rows,
    one_row,
    round_group,
    rows_at_once,
    two_rows,
)
from flowspec.model.vector_code import LANES

_ZERO = np.float32(0)


@inlined
def multiply(rows, scales, sums, begin, end, matrix, kind, first, last, products):
    """The products of the rows ``[begin, end)`` with the blocks ``[first, last)`` of a matrix, which make whole tiles.

    ``rows`` [n, groups, bytes], ``scales`` and ``sums`` [n, groups]: as ``take`` makes them. ``matrix``: the arrays of
    ``Lanes``; ``kind``: theirs, a constant. ``products`` [n, blocks * LANES] is written.
    """
    codes, of_codes, zeros, offsets, biases = matrix
    count = end - begin
    most = rows_at_once(kind)  # a constant: what never is, is not compiled
    for block in range(first, last, blocks_at_once(kind)):
        row = begin
        while row < end:  # some rows are multiplied twice, which is less than one by one
            if most == MANY_ROWS and count >= MANY_ROWS and end - row > ROWS:
                row = min(row, end - MANY_ROWS)
                eight_rows(rows, scales, sums, codes, of_codes, zeros, offsets, biases, kind, products, row, block)
                row += MANY_ROWS
            elif count >= ROWS:
                row = min(row, end - ROWS)
                four_rows(rows, scales, sums, codes, of_codes, zeros, offsets, biases, kind, products, row, block)
                row += ROWS
            elif end - row >= 2:
                two_rows(rows, scales, sums, codes, of_codes, zeros, offsets, biases, kind, products, row, block)
                row += 2
            else:
                one_row(rows, scales, sums, codes, of_codes, zeros, offsets, biases, kind, products, row, block)
                row += 1


@compiled
def quantise(rows, size, codes, scales, sums):
    """Round rows [n, K] to 8 bits: ``codes`` [n, groups, GROUP], int8, with ``scales``; ``sums`` of codes, negative.

    A weight's scale is for ``size`` inputs; where these are no whole groups, each of their last ones is filled up.
    What is no number, or has no end, becomes a scale that is no number.
    """
    line = np.zeros(GROUP, np.float32)
    num_rows, num_groups = scales.shape
    groups = num_groups // (rows.shape[1] // size)  # for each scale of a weight
    for i in range(num_rows):
        for group in range(num_groups):
            first, end = group // groups * size + group % groups * GROUP, group // groups * size + size
            if first + GROUP <= end:
                round_group(rows, codes, scales, sums, i * rows.shape[1] + first, i * num_groups + group)
                continue
            for j in range(GROUP):
                line[j] = rows[i, first + j] if first + j < end else _ZERO
            round_group(line, codes, scales, sums, 0, i * num_groups + group)


@compiled
def copy(rows, size, codes):
    """Rows [n, K] as they are: ``codes`` [n, groups, 4 * GROUP], int8, gets the bytes of float32."""
    found = codes.view(np.float32)
    num_rows, num_groups, _ = found.shape
    groups = num_groups // (rows.shape[1] // size)
    for i in range(num_rows):
        for group in range(num_groups):
            first, end = group // groups * size + group % groups * GROUP, group // groups * size + size
            if first + GROUP <= end:
                for j in range(GROUP):
                    found[i, group, j] = rows[i, first + j]
                continue
            for j in range(GROUP):
                found[i, group, j] = rows[i, first + j] if first + j < end else _ZERO


@compiled
def take(rows, size, codes, scales, sums):
    """``quantise`` rows, or ``copy`` them, by the bytes that there are for a group."""
    if codes.shape[2] == GROUP:
        quantise(rows, size, codes, scales, sums)
    else:
        copy(rows, size, codes)


@compiled
def lay_out(codes, groups, laid_out):
    """Codes [N, scales, size], int8 or of 4 bits, as ``multiply`` reads them: [blocks, all groups, bytes of a group].

    ``groups``: of ``GROUP`` inputs, for each scale.
    """
    num_outputs, num_scales, size = codes.shape
    is_small = laid_out.shape[2] < GROUP * LANES
    for n in range(num_outputs):
        block, lane = n // LANES, n % LANES
        for scale in range(num_scales):
            for k in range(size):
                group, j = scale * groups + k // GROUP, k % GROUP
                quad = j // QUAD
                if not is_small:
                    place = (quad * LANES + lane) * QUAD + j % QUAD
                    laid_out[block, group, place] = np.uint8(np.int32(codes[n, scale, k]) + MIDDLE)
                elif quad < QUADS // 2:
                    laid_out[block, group, (quad * LANES + lane) * QUAD + j % QUAD] |= codes[n, scale, k]
                else:
                    place = ((quad - QUADS // 2) * LANES + lane) * QUAD + j % QUAD
                    laid_out[block, group, place] |= np.uint8(np.int32(codes[n, scale, k]) << 4)
