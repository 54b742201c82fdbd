"""Memory, barriers, copies and products of a simulated GPU: `gluon_simulator.py` says what they find."""

import sys
import types
from typing import Any

import torch
from gluon_machine import Fault, current, switch


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


class Shared:
    """A view of shared memory."""

    def __init__(self, data: torch.Tensor, unfenced: torch.Tensor):
        self.data, self._unfenced = data, unfenced

    def index(self, i):
        if not 0 <= i < len(self.data):
            raise Fault(f"buffer {i} of {len(self.data)}")
        return Shared(self.data[i], self._unfenced[i])

    def reshape(self, shape):
        return Shared(self.data.view(shape), self._unfenced.view(shape))

    def permute(self, order):
        return Shared(self.data.permute(order), self._unfenced.permute(order))

    def slice(self, start, length, dim=0):
        return Shared(
            self.data.narrow(dim, start, length), self._unfenced.narrow(dim, start, length)
        )

    def store(self, x):
        if list(x.shape) != list(self.data.shape) or x.dtype != self.data.dtype:
            raise Fault(f"stores {x.dtype} {list(x.shape)} in {self.data.dtype} {self.shape}")
        self.data.copy_(x)
        self._unfenced.fill_(True)
        current.worker.unfenced.append(self._unfenced)
        switch()

    def load(self, layout=None):
        switch()
        return self.data.clone()

    def read_asynchronously(self) -> torch.Tensor:
        if self._unfenced.any():
            raise Fault(
                f"{current.worker.name} reads shared memory that was written without a fence"
            )
        return self.data.clone()

    @property
    def shape(self):
        return list(self.data.shape)

    @property
    def dtype(self):
        return self.data.dtype


class Barrier:
    def __init__(self, array: "Barriers", i: int):
        self.array, self.i = array, i
        self.count = 0
        self.missing = self.bytes = self.phase = 0

    def __str__(self):
        left = f"{self.missing} arrivals and {self.bytes} bytes short of phase {self.phase + 1}"
        return f"{self.array.name()}[{self.i}], {left}"

    def update(self, arrivals: int, num_bytes: int):
        if self.count == 0:
            raise Fault("a barrier is used before init")
        self.missing -= arrivals
        self.bytes += num_bytes
        if self.missing < 0:
            raise Fault(f"too many arrivals at {self}")
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count


class Barriers:
    def __init__(self, n: int):
        self.barriers = [Barrier(self, i) for i in range(n)]
        self.frames: list[Any] = []

    def index(self, i) -> Barrier:
        if not self.frames:
            self.frames.append(sys._getframe(1))
        return self.barriers[int(i)]

    def name(self) -> str:
        """What the first function that used it calls it."""
        names = (name for x in self.frames for name, value in x.f_locals.items() if value is self)
        return next(names, "barrier")


def init(barrier, count):
    barrier.count = barrier.missing = count


def wait(barrier, phase, pred=True, deps=()):
    if pred:
        if barrier.count == 0:
            raise Fault("a barrier is used before init")
        switch(lambda: barrier.phase & 1 != phase, lambda: f"{barrier}")


def arrive(barrier, *, count=1, pred=True):
    if pred:
        switch()
        barrier.update(count, 0)
        # what follows comes late if others go first
        switch()


def expect(barrier, num_bytes, pred=True):
    if pred:
        switch()
        barrier.update(1, num_bytes)
        switch()


class Descriptor:
    """A tensor in global memory and the block of it that one copy moves; coordinates outside read 0 and drop writes."""

    def __init__(self, base, shape, strides, block_shape, layout=None):
        if base.data_ptr() % 16 or any(x * base.element_size() % 16 for x in strides[:-1]):
            raise Fault("TMA needs addresses and strides that are multiples of 16 bytes")
        self.block_shape, self.dtype, self.layout = list(block_shape), base.dtype, layout
        self.view = torch.as_strided(base, shape, strides, base.storage_offset())

    def clip(self, at):
        source, block = [], []
        for a, n, size in zip(map(int, at), self.block_shape, self.view.shape, strict=True):
            low, high = max(a, 0), max(min(a + n, size), max(a, 0))
            source.append(slice(low, high))
            block.append(slice(low - a, high - a) if high > low else slice(0, 0))
        return tuple(source), tuple(block)


def tma_load(descriptor, at, barrier, destination, pred=True):
    if not pred:
        return
    if destination.shape != descriptor.block_shape:
        raise Fault(f"loads {descriptor.block_shape} into {destination.shape}")
    if destination._unfenced.any():
        raise Fault("loads over stores that no fence has followed")
    source, block = descriptor.clip(at)
    destination.data.fill_(float("nan"))

    def land():
        destination.data.zero_()
        destination.data[block] = descriptor.view[source]
        barrier.update(0, -destination.data.numel() * destination.data.element_size())

    current.machine.loads.append(land)
    switch()


def tma_store(descriptor, at, source, adds=False):
    if source.shape != descriptor.block_shape:
        raise Fault(f"stores {source.shape} to blocks {descriptor.block_shape}")
    current.worker.stores.append([descriptor, at, source, source.read_asynchronously(), adds])
    switch()


def tma_add(descriptor, at, source):
    tma_store(descriptor, at, source, True)


def tma_store_wait(pendings):
    switch()
    stores = current.worker.stores
    while len(stores) > pendings:
        descriptor, at, source, snapshot, adds = stores.pop(0)
        if not _equal(source.data, snapshot):
            raise Fault(
                f"{current.worker.name}: the source of a TMA store changed before the wait for it"
            )
        _send(current.worker, descriptor, at, snapshot, adds)


def _send(worker, descriptor, at, snapshot, adds):
    view, block = descriptor.clip(at)

    def land():
        descriptor.view[view] = snapshot[block] + (descriptor.view[view] if adds else 0)
        worker.num_landing -= 1

    worker.num_landing += 1
    current.machine.stores.append(land)


def tma_store_done():
    tma_store_wait(0)
    worker = current.worker
    switch(lambda: worker.num_landing == 0, lambda: "its stores")


class Token:
    """An accumulator whose product may still run."""

    def __init__(self):
        self.value: torch.Tensor | None = None


def _operand(x):
    return x.read_asynchronously() if isinstance(x, Shared) else x


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False, precision=None):
    token = Token()
    snapshots = [_operand(x) for x in (a, b)]
    current.worker.products.append([token, a, b, acc if use_acc else 0.0, snapshots])
    switch()
    return token if is_async else warpgroup_mma_wait(0, [token])


def warpgroup_mma_wait(num_outstanding=0, deps=()):
    switch()
    products = current.worker.products
    while len(products) > num_outstanding:
        token, a, b, acc, snapshots = products.pop(0)
        for x, snapshot in zip((a, b), snapshots, strict=True):
            if isinstance(x, Shared) and not _equal(x.data, snapshot):
                raise Fault(
                    f"{current.worker.name}: an operand of a product changed before the wait for it"
                )
        value = acc.value if isinstance(acc, Token) else acc
        token.value = snapshots[0].float() @ snapshots[1].float() + value
    values = []
    for x in deps:
        if isinstance(x, Token) and x.value is None:
            raise Fault(f"{current.worker.name} takes the result of a product that may still run")
        values.append(x.value if isinstance(x, Token) else x)
    return values[0] if len(values) == 1 else tuple(values)


def fence():
    for x in current.worker.unfenced:
        x.fill_(False)
    current.worker.unfenced.clear()


def named_sync(number, threads):
    worker = current.worker
    state = worker.program.named.setdefault(number, [0, 0])
    switch()
    state[0] += 32 * worker.num_warps
    if state[0] > threads:
        raise Fault(f"too many threads at named barrier {number}")
    before = state[1]
    if state[0] == threads:
        state[:] = 0, before + 1
    switch(lambda: state[1] != before, lambda: f"named barrier {number}")


def wait_turn(p, turn):
    switch(
        lambda: int(p.load()) >= turn, lambda: f"turn {turn} of a counter that is {int(p.load())}"
    )


def take_number(p):
    number = int(p.load())
    p.store(number + 1)
    switch()
    return number


def pass_turn(p):
    tma_store_done()
    p.store(int(p.load()) + 1)
    switch()


def trap_without_progress(progress):
    current.worker.program.progress = progress
    # a deadlock is found by the machine
    switch(lambda: int(progress.data) == -1, lambda: f"progress, now {int(progress.data)}")


def store_scalar(word, x):
    word.store(torch.tensor([int(x)], dtype=torch.int32))


def zero_rows(tile, first):
    x = tile.data.clone()
    x[:, first:] = 0
    tile.store(x)


class Pointer:
    """A tensor in global memory and an offset, or a tensor of offsets, in elements."""

    def __init__(self, base: torch.Tensor, offset: Any = 0):
        self.base, self.offset = base, offset
        size = 1 + sum((n - 1) * s for n, s in zip(base.shape, base.stride(), strict=True))
        self.size = size if base.numel() else 0
        self.flat = torch.as_strided(base, (self.size,), (1,), base.storage_offset())
        self.dtype = types.SimpleNamespace(element_ty=base.dtype)

    def __add__(self, offset):
        return Pointer(self.base, self.offset + offset)

    def _at(self, mask):
        at = torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else mask)
        at, mask = torch.broadcast_tensors(at, mask)
        if (mask & ((at < 0) | (at >= self.size))).any():
            raise Fault(f"{current.worker.name} accesses memory outside of its tensor")
        return at, mask

    def load(self, mask=None, other=0):
        at, mask = self._at(mask)
        other = torch.tensor(other, dtype=self.base.dtype)
        x = torch.where(mask, self.flat[torch.where(mask, at, 0)], other)
        return x.item() if x.dim() == 0 and not x.is_floating_point() else x

    def store(self, x, mask=None):
        at, mask = self._at(mask)
        self.flat[at[mask]] = torch.as_tensor(x).to(self.base.dtype).expand(at.shape)[mask]
