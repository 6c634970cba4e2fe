"""What a GPU would be waited for, counted on torch's meta device: values read by the host."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Records operations that make the host wait for a device, on meta tensors.

    A value that the host reads is zero, and nothing is nonzero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        """Operations that return something to the host, or a shape that depends on values."""
        self.uploads: list[tuple[int, ...]] = []
        """Shapes of tensors copied from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "is_nonzero") and args[0].is_meta:
            self.reads.append(name)
            return False if args[0].dtype == torch.bool else 0
        if (
            name in ("_to_copy", "to")
            and args[0].is_meta
            and kwargs.get("device") == torch.device("cpu")
        ):
            self.reads.append(name)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "nonzero" and args[0].is_meta:
            self.reads.append(name)
            return torch.zeros(0, args[0].dim(), dtype=torch.long, device="meta")
        result = func(*args, **kwargs)
        if name in ("_to_copy", "to") and not args[0].is_meta and result.is_meta:
            self.uploads.append(tuple(args[0].shape))
        if name in ("index", "index_put_") and args[0].is_meta:
            self._check_indices(args[1])
        return result

    def _check_indices(self, indices: Any) -> None:
        for index in indices:
            if isinstance(index, Tensor) and index.dim() and not index.is_meta:
                self.uploads.append(tuple(index.shape))
