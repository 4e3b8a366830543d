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
            found = head_logprobs_and_entropy(hidden_1NH[0], self.weight, self.bias, targets_N, temperature)
            return torch.stack(found, -1)[None]

        with self._asking(score):
            yield

    @contextlib.contextmanager
    def comparing(self, teacher: Head, beta: float, temperature: float) -> Iterator[None]:
        """The same of divergences from the teacher in place of log-probabilities."""

        def compare(hidden_1NH: Tensor) -> Tensor:
            student = Head(hidden_1NH[0], self.weight, self.bias)
            return torch.stack(head_divergence(student, teacher, beta, temperature), -1)[None]

        with self._asking(compare):
            yield

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """The model gives, as its logits, the hidden states of which they would be made."""
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
        return super().forward(hidden_1NH) if self._asked is None else self._asked(hidden_1NH)


def scores_of(logits_1N2: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, both with gradient, from what the model gave inside `scoring`."""
    logprobs_N, entropy_N = logits_1N2[0].unbind(-1)
    return logprobs_N, entropy_N


def put_scoring_head(model: PreTrainedModel) -> bool:
    """Whether the model has one now; it must still be whole.

    It gets none, and its logits are made in full, when its head is no plain linear layer or has not the last word:
    some models scale or cap what it gives.
    """
    linear: Any = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return False
    head = ScoringHead.of(linear)
    model.set_output_embeddings(head)
    if model.get_output_embeddings() is head and _has_last_word(model, head):
        return True
    model.set_output_embeddings(linear)
    return False


def scoring_head(model: nn.Module) -> ScoringHead | None:
    """The model's, wherever it is wrapped."""
    return next((module for module in model.modules() if isinstance(module, ScoringHead)), None)


def _has_last_word(model: PreTrainedModel, head: ScoringHead) -> bool:
    """Whether the model's logits are the very tensor that the head gives; the layers are left out of this pass."""
    decoder: Any = model.base_model
    if decoder is model:
        return False
    given: list[Tensor] = []
    watch = head.register_forward_hook(lambda module, inputs, output: given.append(output))
    hidden_11H: Any = head.weight.new_zeros(1, 1, head.in_features)
    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden_11H)
    try:
        with torch.no_grad():
            logits = model(
                input_ids=torch.zeros(1, 1, dtype=torch.long), logits_to_keep=torch.tensor([0]), use_cache=False
            ).logits
        return len(given) == 1 and logits is given[0]
    except (AttributeError, TypeError):  # it wants more of its layers than hidden states
        return False
    finally:
        del decoder.forward
        watch.remove()
