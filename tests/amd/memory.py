"""Tensors in global memory and the local memory of workgroups.

Legend
    at                 addresses or offsets, in bytes; for global memory an array of any shape
    live               True for lanes that make the access
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


class Races:
    """Finds bytes that one user writes and another reads or writes, with nothing between that orders the two.

    Users of local memory are waves, and barriers order; users of a launch's tensors are workgroups, which nothing
    orders. A write of what is there already harms nobody: waves that hold the same numbers all store them. Memory is
    watched in units of two bytes, and accesses of one byte are not.
    """

    _NOBODY, _SEVERAL = -1, -2

    def __init__(self, size: int):
        self._writer, self._reader = (np.full(size // 2 + 1, self._NOBODY) for _ in range(2))

    def order(self) -> None:
        self._writer[:] = self._reader[:] = self._NOBODY

    def _note(self, table: np.ndarray, halves: np.ndarray, users: np.ndarray) -> np.ndarray:
        """Notes the users; returns where another one does the same at the same time."""
        before = table[halves]
        now = np.where((before == self._NOBODY) | (before == users), users, self._SEVERAL)
        table[halves] = now
        differs = table[halves] != now
        table[halves[differs]] = self._SEVERAL
        return differs

    def check(self, at, users, num_bytes: int, is_changed=None, is_lost=None) -> None:
        """Notes accesses and raises AccessError if one is a race.

        at, users: [accesses] first bytes, numbers of users. is_changed, is_lost: of writes, whether the bytes differed
        before, and whether they differ afterwards from what was written.
        """
        halves, users = (at >> 1)[:, None] + np.arange(num_bytes // 2), users[:, None]
        writer, reader = self._writer[halves], self._reader[halves]
        if is_changed is None:
            clash = (writer >= 0) & (writer != users)
            self._note(self._reader, halves, users)
        else:
            clash = [
                (x != self._NOBODY) & (x != users) & is_changed[:, None] for x in (writer, reader)
            ]
            clash = clash[0] | clash[1]
            clash |= self._note(self._writer, halves, users) & is_lost[:, None]
        if clash.any():
            i = clash.any(1).argmax()
            raise AccessError(
                f"a race: {num_bytes} bytes at {at[i]:#x}, which wave or workgroup {users[i, 0]} "
                f"{'reads' if is_changed is None else 'writes'} and another accesses with nothing to order the two"
            )


def _read(words: np.ndarray, races: Races, at, live, users, num_bytes: int) -> list[np.ndarray]:
    users = np.broadcast_to(users[:, None], at.shape)
    races.check(at[live], users[live], num_bytes)
    return _gather(words, at, num_bytes)


def _write(words: np.ndarray, races: Races, at, live, users, num_bytes: int, registers) -> None:
    at, users = at[live], np.broadcast_to(users[:, None], at.shape)[live]
    mask = np.uint32((1 << 8 * min(num_bytes, 4)) - 1)
    registers = [x[live] & mask for x in registers]

    def differs() -> np.ndarray:
        pieces = zip(_gather(words, at, num_bytes), registers, strict=True)
        return np.any([x != y for x, y in pieces], axis=0)

    is_changed = differs()
    _scatter(words, at, num_bytes, registers)
    races.check(at, users, num_bytes, is_changed, differs())


class Tensors:
    """Global memory: copies of the storages that a launch may touch, apart from each other; which bytes are a tensor's.

    A lane that does not execute reads the zeros at the start.
    """

    BASE = 1 << 40
    _FIRST = 256
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
        self._races = Races(self._end)
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

    def _offsets(self, at: np.ndarray, live: np.ndarray, num_bytes: int) -> np.ndarray:
        offset = np.where(live, at.astype(np.int64) - self.BASE, 0)
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

    def read(self, w: Waves, at: np.ndarray, live: np.ndarray, num_bytes: int) -> list[np.ndarray]:
        """at: [waves, 64], or [waves, 1] for what a wave reads as one."""
        at = self._offsets(at, live, num_bytes)
        return _read(self.words, self._races, at, live, w.workgroup, num_bytes)

    def write(self, w: Waves, at: np.ndarray, live: np.ndarray, num_bytes: int, registers) -> None:
        at = self._offsets(at, live, num_bytes)
        _write(self.words, self._races, at, live, w.workgroup, num_bytes, registers)


class Local:
    """Local memory of all workgroups, one after another."""

    def __init__(self, num_workgroups: int, size: int):
        self._size, self._stride = size, -(-size // 16) * 16
        # and some to read from for lanes that do not execute
        self._words = np.full(num_workgroups * self._stride // 4 + 16, POISON)
        self._races = Races(self._words.nbytes)
        self.barrier = self._races.order

    def _offsets(self, w: Waves, at: np.ndarray, num_bytes: int) -> np.ndarray:
        at = at.astype(np.int64)
        outside = w.live & (at + num_bytes > self._size)
        if outside.any():
            at, lane = at[outside][0], outside.any(0).argmax()
            raise AccessError(
                f"{num_bytes} bytes at {at} of {self._size} of local memory, lane {lane}"
            )
        return np.where(w.live, at + w.workgroup[:, None] * self._stride, 0)

    def read(self, w: Waves, at: np.ndarray, num_bytes: int) -> list[np.ndarray]:
        at = self._offsets(w, at, num_bytes)
        return _read(self._words, self._races, at, w.live, w.index, num_bytes)

    def write(self, w: Waves, at: np.ndarray, num_bytes: int, registers: list) -> None:
        at = self._offsets(w, at, num_bytes)
        _write(self._words, self._races, at, w.live, w.index, num_bytes, registers)
