"""A device without hardware: tensors that live "elsewhere".

`Far` wraps a CPU tensor and claims to be on the meta device.  While
`FarDevice` is active, tensors made for that device are wrapped, operations
run on what they wrap, and mixing far and near tensors in one operation is
an error, as on a GPU.  What reads a far tensor's value (``item``,
``tolist``, ``.cpu()``) is counted: on a GPU each is a wait.

CUDA allows two mixtures, so they are allowed here: near scalars without a
dimension, and near indices into a far tensor.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAR = torch.device("meta")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default}
MOVES = {aten._to_copy, aten.to, aten.copy_}
INDEXES = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Far(torch.Tensor):
    """A tensor elsewhere; ``near`` is the CPU tensor that it wraps."""

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
            requires_grad=False,
        )
        out.near = near
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return FarDevice().__torch_dispatch__(func, types, args, kwargs)

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Far({self.near!r})"


class _Literals(TorchFunctionMode):
    """``torch.tensor(values, device=far)``: made near, then sent."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            target = kwargs.pop("device", None)
            out = func(*args, **kwargs)
            return out if target is None else out.to(target)
        return func(*args, **kwargs)


class FarDevice(TorchDispatchMode):
    """Runs operations on far tensors; ``reads`` counts values read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.literals = _Literals()

    def __enter__(self) -> FarDevice:
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = tree_flatten((args, kwargs))[0]
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        target = next((x for x in flat if isinstance(x, torch.device)), None)
        if func is aten.to.other:
            target = args[1].device
        if far and func.overloadpacket not in MOVES:
            self._check(func, tensors, args)
        if func in READS and far:
            self.reads += 1
        args, kwargs = tree_map(_near, (args, kwargs))
        out = func(*args, **kwargs)
        if target is not None:
            away = torch.device(target).type == FAR.type
            self.reads += bool(far) and not away
        elif func is aten.copy_.default:
            away = isinstance(tensors[0], Far)
            self.reads += not away and bool(far)
        else:
            away = bool(far)
        if not away:
            return out
        return _wrap(out, tensors)

    def _check(self, func, tensors, args) -> None:
        near = [
            x for x in tensors if not isinstance(x, Far) and x.dim()
        ]
        if func in INDEXES and isinstance(args[0], Far):
            near = [x for x in args[2:3] if near and not isinstance(x, Far)]
        if near:
            raise RuntimeError(
                f"{func} mixes devices: {[tuple(x.shape) for x in tensors]}"
            )


def _near(x):
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.near if isinstance(x, Far) else x


def _wrap(out, tensors):
    """Wrap what came back; results in place keep their wrapper."""
    known = {id(x.near): x for x in tensors if isinstance(x, Far)}

    def one(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Far(x)

    return tree_map(one, out)


def send(module: torch.nn.Module) -> torch.nn.Module:
    """Put a module's parameters and buffers elsewhere, in place."""
    seen: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = seen.setdefault(
                    id(weight),
                    torch.nn.Parameter(Far(weight.detach()), False),
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Far(buffer)
    return module
