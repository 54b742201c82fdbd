"""Tensors in global memory and the local memory of workgroups.

Legend
    at                 addresses or offsets, in bytes; for global memory an array of any shape
    live               True where an access takes place
"""

import numpy as np
import torch

from amd.registers import POISON, Waves


class AccessError(Exception):
    """An access outside every tensor, or outside a workgroup's local memory."""


def num_registers(num_bytes: int) -> int:
    return -(-num_bytes // 4)


def _gather(words: np.ndarray, at: np.ndarray, num_bytes: int) -> list[np.ndarray]:
    """Registers' worth of the bytes [at, at + num_bytes) of memory; one or two bytes are extended by zeros."""
    data = words.view(np.uint8)
    if num_bytes < 4:
        x = data[at].astype(np.uint32)
        return [x | data[at + 1].astype(np.uint32) << np.uint32(8) if num_bytes == 2 else x]
    if not (at & 3).any():
        return [words[(at >> 2) + j] for j in range(num_bytes // 4)]
    pieces = (data[at[..., None] + np.arange(4 * j, 4 * j + 4)] for j in range(num_bytes // 4))
    return [np.ascontiguousarray(x).view(np.uint32)[..., 0] for x in pieces]


def _scatter(words: np.ndarray, at: np.ndarray, num_bytes: int, registers: list) -> None:
    """Writes what `_gather` reads."""
    if num_bytes >= 4 and not (at & 3).any():
        for j in range(num_bytes // 4):
            words[(at >> 2) + j] = registers[j]
    else:
        for j in range(num_bytes):
            words.view(np.uint8)[at + j] = registers[j // 4] >> np.uint32(8 * (j % 4))


class Tensors:
    """Global memory: copies of the storages that a launch may touch, apart from each other; which bytes are a tensor's.

    What does not take place reads zeros at the start, or writes to bytes after them that nothing reads.
    """

    BASE = 1 << 40
    _ZEROS, _BIN, _FIRST = 0, 256, 512
    # between storages: an index that is wrong by a row shall not meet another tensor
    _GAP = 4096

    def __init__(self):
        self._end = self._FIRST
        # address of a storage on the host -> offset in the copy, bytes
        self._storages: dict[int, tuple[int, torch.Tensor]] = {}
        self._views: list[tuple[str, int, torch.Tensor]] = []

    def add(self, name: str, x: torch.Tensor) -> int:
        """Makes the elements of a tensor accessible; returns its address."""
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages:
            self._storages[key] = self._end, torch.empty(0, dtype=torch.uint8).set_(storage)
            self._end = -(-(self._end + len(storage) + self._GAP) // 256) * 256
        offset = self._storages[key][0] + x.data_ptr() - key
        self._views.append((name, offset, x))
        return self.BASE + offset

    def __enter__(self) -> "Tensors":
        self.words = np.zeros(self._end // 4, np.uint32)
        self._is_tensor = np.zeros(self._end, bool)
        self._is_tensor[: self._FIRST] = True
        for offset, data in self._storages.values():
            self.words.view(np.uint8)[offset : offset + len(data)] = data.numpy()
        for _, offset, x in self._views:
            if x.numel():
                size = x.element_size()
                shape, strides = (*x.shape, size), (*(s * size for s in x.stride()), 1)
                np.lib.stride_tricks.as_strided(self._is_tensor[offset:], shape, strides)[...] = (
                    True
                )
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            for offset, data in self._storages.values():
                data.numpy()[:] = self.words.view(np.uint8)[offset : offset + len(data)]

    def _offsets(self, at: np.ndarray, live: np.ndarray, num_bytes: int, idle: int) -> np.ndarray:
        offset = np.where(live, at.astype(np.int64) - self.BASE, idle)
        inside = (offset >= 0) & (offset < self._end - num_bytes)
        safe = np.where(inside, offset, 0)
        inside &= self._is_tensor[safe] & self._is_tensor[safe + num_bytes - 1]
        if not inside.all():
            self._fail(offset, inside, num_bytes)
        return offset

    def _fail(self, offset: np.ndarray, inside: np.ndarray, num_bytes: int) -> None:
        where = np.unravel_index(np.argmin(inside), inside.shape)
        at = int(offset[where])
        near = [
            f"byte {at - start} of {name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            for name, start, x in self._views
            if -self._GAP <= at - start < x.untyped_storage().nbytes() + self._GAP
        ]
        raise AccessError(
            f"{num_bytes} bytes at {self.BASE + at:#x}, lane {where[-1]}, are in no tensor"
            + (f"; it would be {' or '.join(near)}" if near else "")
        )

    def read(self, at: np.ndarray, live: np.ndarray, num_bytes: int) -> list[np.ndarray]:
        return _gather(self.words, self._offsets(at, live, num_bytes, self._ZEROS), num_bytes)

    def write(self, at: np.ndarray, live: np.ndarray, num_bytes: int, registers: list) -> None:
        _scatter(self.words, self._offsets(at, live, num_bytes, self._BIN), num_bytes, registers)


class Local:
    """Local memory of all workgroups, one after another; what does not take place goes to the bytes after them."""

    def __init__(self, num_workgroups: int, size: int):
        self._size, self._stride = size, -(-size // 16) * 16
        self._idle = num_workgroups * self._stride
        self._words = np.full(self._idle // 4 + 64, POISON)

    def _offsets(self, w: Waves, at: np.ndarray, num_bytes: int) -> np.ndarray:
        at = at.astype(np.int64)
        outside = w.live & (at + num_bytes > self._size)
        if outside.any():
            at, lane = at[outside][0], outside.any(0).argmax()
            raise AccessError(
                f"{num_bytes} bytes at {at} of {self._size} of local memory, lane {lane}"
            )
        return np.where(w.live, at + w.workgroup[:, None] * self._stride, self._idle)

    def read(self, w: Waves, at: np.ndarray, num_bytes: int) -> list[np.ndarray]:
        return _gather(self._words, self._offsets(w, at, num_bytes), num_bytes)

    def write(self, w: Waves, at: np.ndarray, num_bytes: int, registers: list) -> None:
        _scatter(self._words, self._offsets(w, at, num_bytes), num_bytes, registers)
