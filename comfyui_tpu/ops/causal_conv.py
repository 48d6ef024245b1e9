"""Causal 3-D convolutions of videos whose rows are spread over devices, for use inside ``jax.shard_map``.

A video is ``[T, S, U, C]``: frames, rows (spread: each device has the same number of them), columns, channels. A TPU
convolves well where the batch is on the sublanes and taps run over leading axes. So the taps along the columns are made
channels first (:func:`with_columns`), and what is left is a convolution over frames and rows of which the columns are
the batch: nothing is shifted within a tile, and nothing is turned between two layers.

Channels few enough to leave most of the matrix unit's width idle go better in pairs of columns, ``[T, S, U/2, 2·C]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from comfyui_tpu.ops import column_kernels
from comfyui_tpu.ops.column_kernels import Part

KERNEL = 3  # of every axis; the past that a causal convolution needs is one less
PAST = KERNEL - 1
_DIMENSIONS = ("HWNC", "HWIO", "HWNC")


@dataclass(frozen=True)
class Rows:
    """How a video's rows lie over devices.

    Attributes:
        total: rows there are; the last devices may have some beyond, which hold anything.
        local: rows of each device.
        axes: mesh axes they are spread over, and their sizes.
    """

    total: int
    local: int
    axes: tuple[tuple[str, int], ...]

    @property
    def ways(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def all_real(self) -> bool:
        """Whether the rows divide by the devices, so that none has any beyond them."""
        return self.total == self.local * self.ways

    def doubled(self) -> Rows:
        return Rows(2 * self.total, 2 * self.local, self.axes)

    def real(self, x: jax.Array) -> jax.Array:
        """``[T, S, U, C]`` with zeros in the rows that are none."""
        if self.all_real:
            return x
        return jnp.where((jnp.arange(self.local) < self.count())[:, None, None], x, 0)

    def count(self) -> jax.Array:
        """How many of this device's rows are real; below 0 where even the one before is none."""
        return self.total - jax.lax.axis_index(self.names) * self.local

    def with_neighbours(self, x: jax.Array) -> jax.Array:
        """``[T, S, U, C]`` → ``[T, S+2, U, C]``: with the row before and the row after, zeros beyond the picture."""
        x = self.real(x)
        before, after = self.neighbours(x[:, :1], x[:, -1:])
        return jnp.concatenate([before, x, after], axis=1)

    def filled_in(self, x: jax.Array) -> jax.Array:
        """:meth:`with_neighbours` where there is room for them, ``[T, S+2, U, C]``, and zeros in rows that are none."""
        before, after = self.neighbours(x[:, 1:2], x[:, -2:-1])
        return x.at[:, :1].set(before).at[:, -1:].set(after)

    def neighbours(self, first: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rows before and after, from the first and the last ones of each device; zeros beyond the picture."""
        return self._from(last, 1), self._from(first, -1)

    def whole(self, x: jax.Array) -> jax.Array:
        """``[T, S, U, C]`` → ``[T, total, U, C]``, the same on every device."""
        if self.ways > 1:
            x = jax.lax.all_gather(x, self.names, axis=1, tiled=True)
        return x[:, : self.total]

    def _from(self, row: jax.Array, step: int) -> jax.Array:
        if self.ways == 1:
            return jnp.zeros_like(row)
        pairs = [(i, i + step) for i in range(self.ways) if 0 <= i + step < self.ways]
        return jax.lax.ppermute(row, self.names, pairs)


def rms_norm(x: jax.Array, gain: jax.Array, columns: int = 1) -> jax.Array:
    """The RMS norm over channels, ``x / max(|x|, 1e-12) · √C · gain``; ``columns`` of them lie side by side.

    Zeros stay zeros.
    """
    channels = gain.shape[0]
    # The sums as a product, which has each of them in all its lanes: one pass over the video, where sums of some lanes
    # and their way back into them are three.
    of_column = jnp.kron(jnp.eye(columns, dtype=x.dtype), jnp.ones((channels, channels), x.dtype))
    scale = jax.lax.rsqrt(jnp.maximum((x * x) @ of_column, 1e-24))
    return x * scale * (jnp.tile(gain, columns) * math.sqrt(channels))


def normed_columns(
    past: jax.Array,
    x: jax.Array,
    gain: jax.Array,
    rows: Rows,
    columns: int = 1,
    kernel: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """What a causal convolution of ``silu(rms_norm(x))`` reads, see :func:`with_columns`.

    Args:
        past: ``[2, S, U, columns·C]``, the frames before ``x`` ``[T, S, U, columns·C]``.
        gain: ``[C]``.
        kernel: run the Pallas kernel where it fits, in float32; it needs a TPU, or ``interpret``.
        interpret: run it in Pallas' interpreter (any backend; for tests).

    Returns:
        ``[T+2, S+2, U, (columns + 2)·C]``.
    """
    if not (kernel and x.dtype == jnp.float32 and column_kernels.fits(gain.shape[0], columns)):
        video = rows.with_neighbours(jnp.concatenate([past, x]))
        return with_columns(jax.nn.silu(rms_norm(video, gain, columns)), columns)
    turned = lambda video: video.swapaxes(2, 3)  # noqa: E731
    both = [rows.real(part) for part in (past, x)]
    first, last = (jnp.concatenate([part[:, rows_at] for part in both]) for rows_at in (slice(1), slice(-1, None)))
    edges = rows.neighbours(first, last)
    real = None if rows.all_real else rows.count()[None]
    parts = [
        Part(turned(x), frame=PAST, row=1, real=real),
        Part(turned(past), frame=0, row=1, real=real),
        Part(turned(jnp.concatenate(edges, axis=1)), frame=0, row=0, apart=rows.local + 1),
    ]
    return turned(column_kernels.normed_columns(parts, gain, PAST + x.shape[0], rows.local + 2, columns, interpret))


def with_columns(x: jax.Array, columns: int = 1) -> jax.Array:
    """``[T, S, U, columns·C]`` → ``[T, S, U, (columns + 2)·C]``: each with the column before it and the one after."""
    channels = x.shape[-1] // columns
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    before, after = padded[:, :, :-2, (columns - 1) * channels :], padded[:, :, 2:, :channels]
    return jnp.concatenate([before, x, after], axis=-1)


def weights_of(weight: jax.Array, columns: int = 1) -> jax.Array:
    """``[O, C, t, s, 3]`` → ``[t, s, (columns + 2)·C, columns·O]``, to go with :func:`with_columns`."""
    taps = weight.transpose(2, 3, 4, 1, 0)
    shifted = [jnp.pad(taps, ((0, 0), (0, 0), (at, columns - 1 - at), (0, 0), (0, 0))) for at in range(columns)]
    made = jnp.stack(shifted, axis=4)
    return made.reshape(*made.shape[:2], made.shape[2] * made.shape[3], -1)


def convolve(x: jax.Array, weight: jax.Array, bias: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    """``[T, S, U, C]`` by ``[t, s, C, O]`` without padding, plus bias ``[O]`` (or of one of several columns)."""
    out = jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=_DIMENSIONS)
    out = out + jnp.tile(bias, weight.shape[-1] // bias.shape[0])
    return out if residual is None else out + residual


def convolve_to_few(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """:func:`convolve` for few outputs, which leave the matrix unit idle: the products of all taps at once, then sums.

    The same products, summed in another order; the result is float32.
    """
    frames, rows, channels, few = weight.shape
    matrix = weight.transpose(2, 0, 1, 3).reshape(channels, -1)
    products = jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
    products = products.reshape(*products.shape[:-1], frames, rows, few)
    kept = [size - taps + 1 for size, taps in zip(x.shape, (frames, rows), strict=False)]
    out = jnp.tile(bias, few // bias.shape[0])
    for t in range(frames):
        for s in range(rows):
            out = out + products[t : t + kept[0], s : s + kept[1], :, t, s]
    return out


def upsampled(x: jax.Array, weight: jax.Array, bias: jax.Array, rows: Rows) -> jax.Array:
    """Every row and column twice, then a 3 × 3 convolution: ``[T, S, U, C]`` → ``[T, 2·S, U, 2·O]``, columns in pairs.

    A doubled picture's neighbours are alike, so each of the four results is two by two sums of the weights at single
    size: four ninths of the products.

    Args:
        weight: ``[O, C, 3 (rows), 3 (columns)]``.
    """
    taps = weight.transpose(2, 3, 1, 0)  # rows, columns, C, O
    first, middle, last = taps
    by_row = (jnp.stack([first, middle + last]), jnp.stack([first + middle, last]))
    wide = with_columns(rows.with_neighbours(x))
    made = [
        convolve(wide[:, at : at + rows.local + 1], _column_pair(part)[None], bias) for at, part in enumerate(by_row)
    ]
    return by_turns(made, 1)


def by_turns(parts: list[jax.Array], axis: int) -> jax.Array:
    """Arrays of one shape as one, which has an entry of each along ``axis`` by turns."""
    shape = parts[0].shape
    out = jax.lax.empty((*shape[: axis + 1], len(parts), *shape[axis + 1 :]), parts[0].dtype)
    # Set and not stacked: convolutions then write into place, and nothing is copied.
    for index, part in enumerate(parts):
        out = out.at[(slice(None),) * (axis + 1) + (index,)].set(part)
    return out.reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _column_pair(taps: jax.Array) -> jax.Array:
    """``[rows, 3, C, O]`` → ``[rows, 3·C, 2·O]``."""
    first, middle, last = jnp.moveaxis(taps, 1, 0)
    none = jnp.zeros_like(first)
    left = jnp.stack([first, middle + last, none], axis=1)
    right = jnp.stack([none, first + middle, last], axis=1)
    both = jnp.stack([left, right], axis=3)
    return both.reshape(both.shape[0], -1, 2 * taps.shape[-1])
