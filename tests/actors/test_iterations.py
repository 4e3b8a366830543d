"""Several updates on one batch are those that plain torch makes, against the policy that the step began with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.policy_group import PolicyGroup
from algorithms.config import GrpoConfig
from algorithms.types import Update
from tests.actors.test_policy import OPTIMIZER, batch, rollouts, settings_of, with_policy
from tests.prove import ONLY_PROVE

EPSILON = 0.02  # so that the second and third updates are clipped somewhere
ALGORITHM = GrpoConfig(
    loss_type="grpo", num_iterations=3, epsilon=EPSILON, vllm_importance_sampling_mode="token_truncate"
)


def train_plainly(path: Path) -> tuple[torch.nn.Module, list[float]]:
    """With torch alone, each sequence alone: the model after one batch, and the gradient norm of each update."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2]}],
        lr=1e-3,
        weight_decay=0.0,
    )
    starts: list[torch.Tensor] = []
    norms = []
    for _ in range(ALGORITHM.num_iterations):
        loss = torch.zeros(())
        for index, rollout in enumerate(rollouts()):
            ids = torch.tensor(rollout.token_ids_T[None].astype("int64"))
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            logprobs = logprobs[torch.from_numpy(rollout.loss_mask_T[1:])]
            if len(starts) == index:
                starts.append(logprobs.detach())
            weight = (starts[index] - torch.from_numpy(rollout.logprobs_T[rollout.loss_mask_T])).exp().clamp(max=3.0)
            advantage = (-1.0) ** index * (1 + index / 4)
            ratio = (logprobs - starts[index]).exp()
            clipped = torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
            loss = loss - (clipped * weight).mean() / len(rollouts())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm).item())
        optimizer.step()
    return model, norms


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "max_tokens"),
    [(2, 1, 16), pytest.param(1, 0, 10_000, marks=ONLY_PROVE), pytest.param(2, 3, 20, marks=ONLY_PROVE)],
)
def test_the_updates_are_plain_adamws(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int, max_tokens: int
) -> None:
    from safetensors.torch import load_file

    settings = settings_of(tiny_models["untied"], tmp_path, num_ranks, zero_stage, "float32")
    settings = replace(settings, objective=replace(settings.objective, grpo=ALGORITHM))

    async def run(group: PolicyGroup) -> Update:
        update = await group.step(*batch(num_ranks, max_tokens, 0, 0))
        await group.save(tmp_path)
        return update

    update = with_policy(settings, run)
    model, norms = train_plainly(tiny_models["untied"])
    assert (update.version, update.metrics["policy/updates"]) == (1, 3)
    assert update.metrics["grad_norm"] == pytest.approx(norms[-1], rel=1e-3)
    assert norms[-1] != pytest.approx(norms[0], rel=0.01)
    assert update.metrics["clip_ratio/region_mean"] > 0, "a batch on which nothing is clipped shows little"
    weights = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=5e-6), name
