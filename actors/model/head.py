"""An output head that can answer with the log-probabilities of given tokens instead of the logits of all.

Legend: N = loss tokens, H = hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from algorithms.divergence import Head, head_divergence
from algorithms.head import head_logprobs_and_entropy


class ScoringHead(nn.Linear):
    """The linear layer that it takes the place of, parameters and names included; inside `scoring` it scores, inside
    `comparing` it compares, inside `passing` it does nothing.

    It is a module that is called like any other, so whatever gathers, moves or watches modules finds it.
    """

    behind: float = 1.0
    """What the model multiplies with whatever the head gives; what the head is asked for it takes out beforehand."""
    _asked: Callable[[Tensor], Tensor] | None = None
    """What is done to the hidden states instead of making logits."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "ScoringHead":
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head

    @contextlib.contextmanager
    def scoring(self, targets_N: Tensor, temperature: float) -> Iterator[None]:
        """The next forward pass of the model gives, as its logits, what `scores_of` takes apart."""

        def score(hidden_1NH: Tensor) -> Tensor:
            found = head_logprobs_and_entropy(
                hidden_1NH[0], self.weight, self.bias, targets_N, temperature / self.behind
            )
            return torch.stack(found, -1)[None]

        with self._asking(score):
            yield

    @contextlib.contextmanager
    def comparing(self, teacher: Head, beta: float, temperature: float) -> Iterator[None]:
        """The same of divergences from the teacher in place of log-probabilities."""

        def compare(hidden_1NH: Tensor) -> Tensor:
            student = Head(hidden_1NH[0], self.weight, self.bias, self.behind)
            return torch.stack(head_divergence(student, teacher, beta, temperature), -1)[None]

        with self._asking(compare):
            yield

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """The model gives, as its logits, the hidden states of which they would be made; maybe in float32."""
        with self._asking(lambda hidden_1NH: hidden_1NH):
            yield

    @contextlib.contextmanager
    def _asking(self, what: Callable[[Tensor], Tensor]) -> Iterator[None]:
        self._asked = what
        try:
            yield
        finally:
            self._asked = None

    def forward(self, hidden_1NH: Tensor) -> Tensor:
        if self._asked is None:
            return super().forward(hidden_1NH)
        found = self._asked(hidden_1NH)
        if self.behind == 1:
            return found
        # In float32, so that it comes out of the model as it was to the last bits.
        return found.to(torch.promote_types(found.dtype, torch.float32)) / self.behind


def scores_of(logits_1N2: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, both with gradient, from what the model gave inside `scoring`."""
    logprobs_N, entropy_N = logits_1N2[0].unbind(-1)
    return logprobs_N, entropy_N


def put_scoring_head(model: PreTrainedModel) -> bool:
    """Whether the model has one now; it must still be whole.

    It gets none, and its logits are made in full, when its head is no plain linear layer, or when the model does more
    with what it gives than to multiply it with a number: some models cap it.
    """
    linear: Any = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return False
    head = ScoringHead.of(linear)
    model.set_output_embeddings(head)
    if model.get_output_embeddings() is head and (behind := _factor_behind(model, head)) is not None:
        head.behind = behind
        return True
    model.set_output_embeddings(linear)
    return False


def scoring_head(model: nn.Module) -> ScoringHead | None:
    """The model's, wherever it is wrapped."""
    return next((module for module in model.modules() if isinstance(module, ScoringHead)), None)


def _factor_behind(model: PreTrainedModel, head: ScoringHead) -> float | None:
    """What the model multiplies its head's output with; None when it does anything else. The layers are left out."""
    decoder: Any = model.base_model
    if decoder is model:
        return None
    # Far beyond all caps, and in float64, so that a factor is known exactly whatever the model's dtype.
    given_11V = torch.linspace(-1e4, 1e4, head.out_features, dtype=torch.float64, device=head.weight.device)[None, None]
    calls: list[Tensor] = []

    def give(*_: Any) -> Tensor:
        calls.append(given_11V.clone())
        return calls[-1]

    watch = head.register_forward_hook(give)
    hidden_11H: Any = head.weight.new_zeros(1, 1, head.in_features)
    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden_11H)
    try:
        with torch.no_grad():
            logits: Any = model(
                input_ids=torch.zeros(1, 1, dtype=torch.long), logits_to_keep=torch.tensor([0]), use_cache=False
            ).logits
    except (AttributeError, TypeError):  # it wants more of its layers than hidden states
        return None
    finally:
        del decoder.forward
        watch.remove()
    if len(calls) != 1 or logits.shape != given_11V.shape:
        return None
    factor = (logits[0, 0, -1].double() / given_11V[0, 0, -1]).item()
    is_all = factor > 0 and torch.allclose(logits.double(), factor * given_11V, rtol=1e-6, atol=0.0)
    return factor if is_all else None
