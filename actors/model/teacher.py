"""A frozen model beside the policy, whose distribution is compared with the policy's at every loss token."""

from typing import Any

from actors.model.forward import PACKED_ATTENTION
from actors.model.head import put_scoring_head
from actors.model.heads import check_heads
from actors.model.load import Dtype, load_causal_lm
from actors.policy_calls import ModelSource


def load_teacher(source: ModelSource, dtype: Dtype, sequence_parallel_size: int = 1) -> Any:
    """The model, on the CPU; ValueError when its logits are more than its head gives, or a team cannot share it."""
    model: Any = load_causal_lm(
        source.path, source.revision, source.trust_remote_code, dtype, attn_implementation=PACKED_ATTENTION
    )
    check_heads(model, sequence_parallel_size, "policy.sequence_parallel_size: of the teacher")
    if not put_scoring_head(model):
        raise ValueError(
            f"reference: the logits of '{source.path}' are capped or changed behind its output head, so they cannot "
            "be compared slab by slab; choose another teacher, or kl_penalty 'advantage' without distillation"
        )
    return model.eval().requires_grad_(False)
