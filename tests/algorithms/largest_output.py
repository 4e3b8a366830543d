"""How much memory operations take, seen from the tensors that they allocate."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestOutput(TorchDispatchMode):
    """Elements of the tensors that operations allocate: the largest one, and how many reach a threshold."""

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self.threshold, self.largest, self.num_large = threshold, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in storages:
                self.largest = max(self.largest, out.numel())
                self.num_large += out.numel() >= self.threshold
        return result
