"""A GPU that is not there: a row through a model goes as it would on one, and what a GPU would refuse or wait for is written down.

Numbers with a fraction are on torch's device `meta`, which has shapes and no values. Whole numbers have values, since lengths and
places follow from them; those on the device are `OnDevice`. A real tensor beside either is one that is still on the CPU. With
`values` all numbers have them, and a model answers what it does on the CPU.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE, ATEN = torch.device("meta"), torch.ops.aten
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default)
# What has a size, or a result, that only the values tell: CUDA copies it to the CPU, and so waits for all that comes before.
WAITS = {
    ATEN.nonzero.default, ATEN.masked_select.default, ATEN.masked_scatter_backward.default, ATEN._unique2.default,
    ATEN.unique_consecutive.default, ATEN.unique_dim.default, ATEN.repeat_interleave.Tensor, ATEN.bincount.default,
    ATEN._local_scalar_dense.default, ATEN.equal.default, ATEN.allclose.default,
}  # fmt: skip


class OnDevice(torch.Tensor):
    """Whole numbers on the device, which are really `held` here."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, rehearsal):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE)

    def __init__(self, held, rehearsal):
        self.held, self.rehearsal = held, rehearsal

    def tolist(self):
        self.rehearsal.waits["tolist", place()] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the rehearsal")


def on_device(tensor):
    return tensor.is_meta


def place():
    """The lines nearest to the operation that are no torch's."""
    frames = [of for of in traceback.extract_stack() if "/torch/" not in of.filename and of.filename != __file__]
    return " < ".join(f"{Path(of.filename).name}:{of.lineno}" for of in frames[:-4:-1])


class Rehearsal(TorchDispatchMode):
    """While it is entered, by operation and place: how often a GPU would be waited for (`waits`), be given a tensor of the CPU beside
    its own (`mixed`), which it refuses, or be sent one (`sent`)."""

    def __init__(self, values=False):
        super().__init__()
        self.values = values
        self.waits, self.mixed, self.sent = Counter(), Counter(), Counter()
        self.made = Made(self)

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.made.__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):  # without gradients they come whole
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        tensors = [of for of in tree_leaves((args, kwargs)) if isinstance(of, torch.Tensor)]
        there, here = [of for of in tensors if on_device(of)], [of for of in tensors if not on_device(of)]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        moves = func in (ATEN._to_copy.default, ATEN.copy_.default)
        if there and (func in WAITS or (func is ATEN.copy_.default and not on_device(args[0]))):
            self.waits[str(func), place()] += 1
        if there and asked and asked.type == "cpu":
            self.waits[str(func), place()] += 1
            return func(*tree_map_only(OnDevice, lambda of: of.held, args), **kwargs)
        index = func in INDEXING and on_device(args[0])  # which may be the CPU's, and is sent then
        if here and ((moves and (there or asked == DEVICE)) or index):
            self.sent[str(func), place()] += 1
        elif there and any(of.dim() for of in here):
            self.mixed[str(func), place()] += 1
        if not (there or asked == DEVICE):
            return func(*args, **kwargs)
        if func in INDEXING:
            args = (args[0], [index for of in args[1] for index in self.indices(of)], *args[2:])
        if any(of.is_meta and not isinstance(of, OnDevice) for of in tensors):
            with _disable_current_modes():
                shapes = tree_map_only(torch.Tensor, lambda of: getattr(of, "held", of).to(DEVICE), (args, kwargs))
                return func(*shapes[0], **shapes[1])
        values = tree_map_only(OnDevice, lambda of: of.held, (args, kwargs))
        made = func(*values[0], **values[1] | ({"device": torch.device("cpu")} if asked else {}))
        same = {id(of.held): of for of in tensors if isinstance(of, OnDevice)}  # what an operation in place returns
        return tree_map_only(torch.Tensor, lambda of: same[id(of)] if id(of) in same else self.as_on_device(of), made)

    def move(self, model):
        """A model to the device, in place, with its values."""
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in [(name, of) for name, of in tensors.items() if of is not None]:
                    moved = OnDevice(tensor.detach(), self)
                    tensors[name] = torch.nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved

    def as_on_device(self, of):
        return of.to(DEVICE) if of.is_floating_point() and not self.values else OnDevice(of, self)

    def indices(self, of):
        """Those of a mask are how many its values say."""
        if of is None or of.dtype != torch.bool:
            return [of]
        self.waits["a mask as index", place()] += 1
        return getattr(of, "held", of).nonzero().unbind(1)


class Made(TorchFunctionMode):
    """What is made of Python's numbers on the device, an index among it: it is sent there at once, which waits."""

    def __init__(self, rehearsal):
        super().__init__()
        self.rehearsal = rehearsal

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            self.rehearsal.waits[func.__name__, place()] += 1
            held = tree_map_only(OnDevice, lambda of: of.held, args)
            return self.rehearsal.as_on_device(func(*held, **kwargs | {"device": "cpu"}))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.new_tensor) and on_device(args[0]):
            of = args[1] if isinstance(args[1], tuple) else (args[1],)
            if func is torch.Tensor.new_tensor or any(isinstance(part, list) for part in of):
                self.rehearsal.waits[func.__name__, place()] += 1
        return func(*args, **kwargs)
