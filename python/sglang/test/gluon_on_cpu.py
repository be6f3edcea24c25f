"""Gluon kernels without a GPU: their bodies run as Python over torch tensors, one thread for each group of warps.

What is checked is what they compute, which slots they read and write, and that no barrier waits for ever; layouts,
which name no other values, are the compiler's to check. Products read shared memory as late as the kernel allows, and
copies land when what counts them arrives.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import types
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import constexpr

from sglang.kernels import launch
from sglang.kernels.ops import sm90_triton
from sglang.kernels.ops.moe.fused_experts import PairOrder
from sglang.kernels.registry import REGISTRY

# Seconds after which a wait is a deadlock.
PATIENCE = 10.0
LAYOUTS = (
    "NVMMASharedLayout", "SwizzledSharedLayout", "BlockedLayout", "SliceLayout", "NVMMADistributedLayout",
    "DotOperandLayout",
)  # fmt: skip
THREADS = 128


class Pointer:
    """An address of a tensor's elements: the flat storage from the tensor's first element on, and offsets."""

    def __init__(self, flat: torch.Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, offset
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        length = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        return cls(tensor.as_strided((length,), (1,), tensor.storage_offset()))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.flat, self.offset + other)

    def to(self, dtype: torch.dtype) -> Pointer:
        assert self.offset == 0, "only a tensor's beginning becomes a pointer to another type"
        return Pointer(self.flat.view(dtype))


class Shared:
    """A place in shared memory, which begins as NaN or, of whole numbers, as 0."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.data[int(at)])

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def store(self, value: torch.Tensor) -> None:
        self.data.copy_(value)


class Barrier:
    """An mbarrier: a phase is over when ``count`` have arrived and no announced bytes are missing."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.missing = 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, number: int) -> None:
        with self.changed:
            self.left -= number
            assert self.left >= 0, "more arrivals than a phase counts"
            self.settle()

    def settle(self) -> None:
        if self.left == self.missing == 0:
            self.left, self.phase = self.count, self.phase + 1
            self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE):
                raise AssertionError("a barrier was waited for in vain")


class Barriers:
    """The array that an allocation of barriers gives."""

    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, at: Any) -> Barrier:
        return self.all[int(at)]


def _elements(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.as_tensor(pointer.offset)
    wanted = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(at.shape)
    inside = (at >= 0) & (at < len(pointer.flat))
    assert bool((inside | ~wanted).all()), "an address outside of its tensor"
    return torch.where(wanted, at, 0), wanted


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> torch.Tensor:
    at, wanted = _elements(pointer, mask)
    found = (
        pointer.flat.view(torch.uint8)[at].view(pointer.flat.dtype) if pointer.flat.itemsize == 1 else pointer.flat[at]
    )
    # Numbers of 8 bits know no where().
    return found if mask is None else torch.where(wanted, found.float(), other).to(found.dtype)


def store(pointer: Pointer, value: torch.Tensor, mask: Any = None) -> None:
    at, wanted = _elements(pointer, mask)
    bits = torch.uint8 if pointer.flat.itemsize == 1 else pointer.flat.dtype
    values = torch.as_tensor(value).to(pointer.flat.dtype).expand(at.shape)
    pointer.flat.view(bits)[at[wanted]] = values.contiguous().view(bits)[wanted]


def _atomic_add(pointer: Pointer, value: int, sem: str) -> int:
    before = int(pointer.flat[pointer.offset])
    pointer.flat[pointer.offset] += value
    return before


def _copy_rows(place: Shared, pointer: Pointer, mask: Any = None) -> None:
    _pending().append(lambda: place.store(load(pointer, mask)))


def _copy_tile(descriptor: Any, coord: list[Any], barrier: Barrier, place: Shared) -> None:
    row, column = (int(one) for one in coord)
    rows, columns = descriptor.block_shape
    place.store(descriptor.base[row : row + rows, column : column + columns])
    with barrier.changed:
        barrier.missing -= place.data.numel() * place.data.itemsize
        barrier.settle()


def _rows_arrive(barrier: Barrier, increment_count: bool) -> None:
    for copy in _pending():
        copy()
    _pending().clear()
    barrier.arrive(THREADS)


def _commit() -> None:
    _groups().append(list(_pending()))
    _pending().clear()


def _wait_group(outstanding: int) -> None:
    while len(_groups()) > outstanding:
        for copy in _groups().pop(0):
            copy()


def _expect(barrier: Barrier, num_bytes: int) -> None:
    with barrier.changed:
        barrier.missing += num_bytes
    barrier.arrive(1)


_own = threading.local()


def _pending() -> list[Callable[[], None]]:
    if not hasattr(_own, "copies"):
        _own.copies = []
    return _own.copies


def _groups() -> list[list[Callable[[], None]]]:
    if not hasattr(_own, "groups"):
        _own.groups = []
    return _own.groups


@dataclass(frozen=True)
class Products:
    """Products in flight: a sum, and the operands that are added to it when the kernel waits for them."""

    sum: torch.Tensor
    operands: tuple[tuple[Shared, Shared], ...] = ()


def _multiply(a: Shared, b: Shared, acc: Any, is_async: bool, use_acc: bool = True) -> Products:
    assert is_async
    before = acc if isinstance(acc, Products) else Products(acc)
    assert use_acc or not before.operands
    return Products(before.sum if use_acc else torch.zeros_like(before.sum), (*before.operands, (a, b)))


def _wait_for_products(number: int, deps: list[Products]) -> Any:
    if len(deps) > 1:
        return tuple(_wait_for_products(number, [each]) for each in deps)
    (products,) = deps
    done = len(products.operands) - number
    total = sum((a.data.float() @ b.data.float() for a, b in products.operands[: max(done, 0)]), products.sum)
    return Products(total, products.operands[max(done, 0) :]) if number else total


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(shape, torch.nan if dtype.is_floating_point else 0).to(dtype))


def _specialize(
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    errors: list[BaseException] = []

    def run(body: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            body(*args)
        except BaseException as error:  # raised again by the thread that started this one
            errors.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _pair(function: Callable[..., torch.Tensor]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _dropping(exact: Callable[..., torch.Tensor], floats: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda a, b: (floats if a.is_floating_point() else exact)(a, b)


def _language(program: tuple[int, ...], programs: tuple[int, ...]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        int32=torch.int32, int64=torch.int64, float32=torch.float32,
        program_id=lambda axis: torch.tensor(program[axis]),
        num_programs=lambda axis: programs[axis],
        arange=lambda start, end, layout: torch.arange(start, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        load=load, store=store, atomic_add=_atomic_add, static_range=range,
        where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
        cast=lambda x, dtype, bitcast: x.view(dtype),
        # As the hardware does, maxima and minima of floats drop NaN.
        minimum=_pair(_dropping(torch.minimum, torch.fmin)), maximum=_pair(_dropping(torch.maximum, torch.fmax)),
        max=lambda x, axis: x.nan_to_num(-math.inf, math.inf, -math.inf).amax(axis),
        min=torch.amin, associative_scan=lambda x, axis, combine: torch.cumsum(x, axis),
        join=lambda a, b: torch.stack((a, b), -1), permute=torch.permute, broadcast=torch.broadcast_tensors,
        pointer_type=lambda dtype: dtype,
        abs=torch.abs, exp=torch.exp, exp2=torch.exp2, log2=torch.log2, cdiv=lambda a, b: -(-a // b),
        sum=lambda x, axis: x.sum(axis), div_rn=torch.div, expand_dims=torch.unsqueeze,
        convert_layout=lambda value, layout, assert_trivial=False: value,
        split=lambda value: value.unbind(-1),
        allocate_shared_memory=_allocate, warp_specialize=_specialize,
        **dict.fromkeys(LAYOUTS, lambda *args, **kwargs: None),
    )  # fmt: skip


_HOPPER = {
    "mbarrier": types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        arrive=lambda barrier, pred=True: barrier.arrive(1) if pred else None,
        expect=_expect,
    ),
    "async_copy": types.SimpleNamespace(mbarrier_arrive=_rows_arrive, commit_group=_commit, wait_group=_wait_group),
    "mma_v2": lambda a, b, acc: acc + a.float() @ b.float(),
    "copy_rows": _copy_rows,
    "copy_tile": _copy_tile,
    "fence_async_shared": lambda: None,
    "join_warps": lambda: None,  # a group of warps is one thread here
    "warpgroup_mma": _multiply,
    "warpgroup_mma_wait": _wait_for_products,
}


def _with_type(arg: Any) -> Any:
    if not isinstance(arg, TensorDescriptor):
        return arg
    return types.SimpleNamespace(base=arg.base, block_shape=arg.block_shape, layout=arg.layout, dtype=arg.base.dtype)


def run_program(
    kernel: GluonJITFunction, program: tuple[int, ...], programs: tuple[int, ...], *args: Any, **kwargs: Any
) -> None:
    """One program of ``kernel``, at a place of the grid ``programs``.

    Tensors become pointers, and descriptors say their type as they do on the device.
    """
    given = dict(kernel.fn.__globals__)
    scope = {name: value.value if isinstance(value, constexpr) else value for name, value in given.items()}
    scope |= _HOPPER | {"gl": _language(program, programs)}
    for name, value in given.items():
        if isinstance(value, GluonJITFunction):
            scope[name] = types.FunctionType(value.fn.__code__, scope, name, value.fn.__defaults__)
    values = [Pointer.of(arg) if isinstance(arg, torch.Tensor) else _with_type(arg) for arg in args]
    types.FunctionType(kernel.fn.__code__, scope, kernel.fn.__name__, kernel.fn.__defaults__)(*values, **kwargs)


class OnHost:
    """In the place of a kernel: a launch runs its programs one after the other, and is recorded.

    Fields:
        launched: number of warps and named arguments of each launch.
    """

    def __init__(self, kernel: GluonJITFunction) -> None:
        self.kernel = kernel
        self.launched: list[tuple[int, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch_all(*args: Any, num_warps: int, **options: Any) -> None:
            for program in itertools.product(*map(range, grid)):
                run_program(self.kernel, program, grid, *args, **options)
            self.launched.append((num_warps, options))

        return launch_all


def order_on_host(ids: torch.Tensor, num_experts: int, block: int) -> PairOrder:
    """What ``order_pairs`` gives, past its end filled with what must not be read."""
    flat, pairs, owners = ids.flatten(), list[int](), list[int]()
    for expert in range(num_experts):
        mine = (flat == expert).nonzero().flatten().tolist()
        mine += [flat.numel()] * (-len(mine) % block)
        pairs += mine
        owners += [expert] * (len(mine) // block)
    ints = (pairs + [1 << 30] * block, [*owners, 1 << 30], [len(owners), 0])
    order, block_expert, num_blocks = (torch.tensor(one, dtype=torch.int32) for one in ints)
    return PairOrder(order, block_expert, num_blocks, len(owners) + 1)


def check_without_gluon(case: unittest.TestCase, kernels: types.ModuleType, fits: Callable[[], bool]) -> None:
    """Where Triton has no Gluon or is too old for it, ``fits`` says so twice; a line of the log and /server_info why.

    kernels: the module of the kernels that ``fits`` asks for, which must not be imported by what declares the ops.
    """
    hidden = mock.patch.dict(sys.modules, {"triton.experimental.gluon": None})
    older = mock.patch.object(triton, "__version__", "3.5.1")
    case.addCleanup(launch.imports_gluon.cache_clear)
    for name, patch in (("hidden", hidden), ("older", older)):
        missing: dict[str, str] = {}
        shown = mock.patch.object(REGISTRY, "missing_modules", missing)
        with case.subTest(name), mock.patch.dict(sys.modules), patch, shown:
            del sys.modules[kernels.__name__], sys.modules[sm90_triton.__name__]
            launch.imports_gluon.cache_clear()
            with case.assertLogs(launch.logger, "WARNING") as logs:
                case.assertFalse(fits())
                case.assertFalse(fits())
            case.assertEqual(len(logs.output), 1)
            case.assertIn("Error: ", logs.output[0])
            ((module, reason),) = missing.items()
            case.assertEqual(module, kernels.__name__)
            case.assertIn(reason, logs.output[0])
    launch.imports_gluon.cache_clear()
    case.assertNotIn(kernels, REGISTRY.load_all())
