"""What the critic minimises: half the squared distance of its values from the returns, with no gain from jumps.

Legend: N = loss tokens of the micro-batch.
"""

import torch
from torch import Tensor

from algorithms.stats import LossStats


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    *,
    cliprange_value: float,
    num_loss_tokens: int,
    fresh_N: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """This micro-batch's share of the mean over the `num_loss_tokens` of the global batch, and its statistics.

    max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2: nothing is gained by going further from the old value (as
    in TRL's PPOTrainer). Where `fresh_N` is False the token leaves the loss, and stays in the count that divides.
    Without a fresh token the share is 0 and still hangs on the graph of `values_N`.
    """
    if fresh_N is not None:
        values_N, old_values_N, returns_N = values_N[fresh_N], old_values_N[fresh_N], returns_N[fresh_N]
    near_N = torch.minimum(torch.maximum(values_N, old_values_N - cliprange_value), old_values_N + cliprange_value)
    errors_N, near_errors_N = (values_N - returns_N).square(), (near_N - returns_N).square()
    loss = 0.5 * torch.maximum(errors_N, near_errors_N).sum() / max(num_loss_tokens, 1)
    return loss, _measure(loss, near_errors_N > errors_N, old_values_N, returns_N)


@torch.no_grad()
def _measure(loss: Tensor, clipped_N: Tensor, old_values_N: Tensor, returns_N: Tensor) -> LossStats:
    """How well the critic knew the returns when the step began; the device is read once."""
    values_N, returns_N = old_values_N.double(), returns_N.double()
    misses_N = returns_N - values_N
    scalars = {
        "loss": loss.double(),
        "value_clipped": clipped_N.double().sum(),
        "values": values_N.sum(),
        "returns": returns_N.sum(),
        "returns_squared": returns_N.square().sum(),
        "value_misses": misses_N.sum(),
        "value_misses_squared": misses_N.square().sum(),
    }
    found = torch.stack(list(scalars.values())).tolist()
    return LossStats(num_value_tokens=len(values_N), **dict(zip(scalars, found, strict=True)))
