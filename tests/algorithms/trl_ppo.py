"""What TRL's own PPOTrainer computes on a few batches: `python -m tests.algorithms.trl_ppo PATH/ppo_trainer.py`.

TRL 1.16, which the tests have, has no PPO any more. What the source of version 1.8 (trl/experimental/ppo) gives when
the statements of `PPOTrainer.train` are cut out and run is kept in trl_ppo.json.

Legend: B = rollouts of the batch, C = longest completion.
"""

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
GAMMA, LAM, CLIPRANGE, CLIPRANGE_VALUE, KL_COEF = 0.97, 0.9, 0.2, 0.2, 0.05
LENGTHS = ((6, 6, 6, 6), (6, 3, 1, 5), (2, 5, 4, 3))
"""Of the completions of each batch; the first batch is cut off by the limit throughout."""
LONGEST = 6
_NAMES = {
    "logr", "kl", "non_score_reward", "rewards", "actual_start", "actual_end", "lastgaelam", "advantages_reversed",
    "gen_length", "advantages", "returns", "vpredclipped", "vf_losses1", "vf_losses2", "vf_loss_max", "vf_loss",
    "vf_clipfrac", "logprobs_diff", "ratio", "pg_losses", "pg_losses2", "pg_loss_max", "pg_loss",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One batch; the numbers are from a formula, so that they are the same everywhere."""

    lengths: tuple[int, ...]
    logprobs_BC: Tensor
    reference_BC: Tensor
    values_BC: Tensor
    new_values_BC: Tensor
    new_logprobs_BC: Tensor
    scores_B: Tensor

    @property
    def steps(self) -> list[int]:
        """TRL gives the score one step after the last token, where there is room."""
        return [min(length + 1, LONGEST) for length in self.lengths]


def case(number: int) -> Case:
    def numbers(phase: float, size: float) -> Tensor:
        place_BC = torch.arange(4 * LONGEST, dtype=torch.float64).view(4, LONGEST)
        return size * torch.sin(12.9898 * place_BC + 7.0 * number + phase)

    return Case(
        lengths=LENGTHS[number],
        logprobs_BC=numbers(0.1, 0.8) - 2,
        reference_BC=numbers(0.2, 0.9) - 2,
        values_BC=numbers(0.3, 0.6),
        new_values_BC=numbers(0.3, 0.6) + numbers(0.4, 0.4),
        new_logprobs_BC=numbers(0.1, 0.8) - 2 + numbers(0.5, 0.5),
        scores_B=numbers(0.6, 1.5)[:, 0],
    )


def _statements(path: Path) -> tuple[str, str]:
    """The functions above the trainer, and of `train` what computes advantages and losses, in order."""
    tree = ast.parse(path.read_text("utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("masked_")]
    trainer = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "PPOTrainer")
    train = next(n for n in trainer.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    found = {node.lineno: node for node in ast.walk(train) if isinstance(node, ast.stmt)}
    chosen: list[ast.stmt] = []
    end = 0
    for line, node in sorted(found.items()):
        if line <= end:  # inside of one that is taken, or left out, whole
            continue
        if isinstance(node, ast.If) and "whiten_rewards" in ast.unparse(node.test):
            end = node.end_lineno or line
        elif isinstance(node, ast.For) and "gen_length" in ast.unparse(node.iter):
            end = node.end_lineno or line
            chosen.append(node)
        elif isinstance(node, ast.Assign | ast.AugAssign) and _name(node) in _NAMES:
            chosen.append(node)
    return "\n".join(map(ast.unparse, functions)), "\n".join(map(ast.unparse, chosen))


def _name(node: ast.Assign | ast.AugAssign) -> str:
    """What is assigned to, or is an entry of."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return ast.unparse(target).partition("[")[0]


def run(path: Path, number: int) -> dict[str, Any]:
    """What TRL's statements give."""
    batch = case(number)
    functions, statements = _statements(path)
    lengths_B1 = torch.tensor(batch.lengths)[:, None]
    place_BC = torch.arange(LONGEST).repeat(4, 1)
    padding_mask, padding_mask_p1 = place_BC >= lengths_B1, place_BC > lengths_B1
    vpred = batch.new_values_BC.masked_fill(padding_mask_p1, 0).requires_grad_()
    new_logprobs = batch.new_logprobs_BC.masked_fill(padding_mask, 1.0).requires_grad_()
    values = batch.values_BC.masked_fill(padding_mask_p1, 0)
    sequence_lengths = torch.tensor(batch.lengths) - 1
    args = SimpleNamespace(
        gamma=GAMMA, lam=LAM, cliprange=CLIPRANGE, cliprange_value=CLIPRANGE_VALUE, kl_coef=KL_COEF, kl_estimator="k1",
        whiten_rewards=False,
    )  # fmt: skip
    logprobs = batch.logprobs_BC.masked_fill(padding_mask, 1.0)
    scope: dict[str, Any] = {
        "torch": torch, "args": args, "self": SimpleNamespace(args=args), "values": values, "scores": batch.scores_B,
        "logprobs": logprobs, "ref_logprobs": batch.reference_BC.masked_fill(padding_mask, 1.0),
        "padding_mask": padding_mask, "padding_mask_p1": padding_mask_p1, "responses": place_BC,
        "sequence_lengths": sequence_lengths, "sequence_lengths_p1": sequence_lengths + 1, "vpred": vpred,
        "new_logprobs": new_logprobs, "mb_logprobs": logprobs, "micro_batch_inds": slice(None), "mb_values": values,
    }  # fmt: skip
    exec(functions, scope)
    before, _, after = statements.partition("vpredclipped = ")
    exec(before, scope)
    scope |= {"mb_return": scope["returns"], "mb_advantage": scope["advantages"]}
    exec("vpredclipped = " + after, scope)
    (value_gradient_BC,) = torch.autograd.grad(scope["vf_loss"], vpred)
    (policy_gradient_BC,) = torch.autograd.grad(scope["pg_loss"], new_logprobs)
    tensors = {
        "advantages": scope["advantages"], "returns": scope["returns"].masked_fill(padding_mask_p1, 0),
        "value_loss": scope["vf_loss"], "clip_fraction": scope["vf_clipfrac"], "value_gradient": value_gradient_BC,
        "policy_loss": scope["pg_loss"], "policy_gradient": policy_gradient_BC,
    }  # fmt: skip
    return {name: _rounded(tensor) for name, tensor in tensors.items()}


def _rounded(tensor: Tensor) -> list[float]:
    return [round(number, 12) for number in tensor.detach().double().flatten().tolist()]


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    found = [run(Path(sys.argv[1]), number) for number in range(len(LENGTHS))]
    FILE.write_text(json.dumps(found, indent=None).replace("], ", "],\n ").replace("}, ", "},\n") + "\n")
