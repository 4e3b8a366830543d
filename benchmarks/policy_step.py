"""What a policy step does not waste: padding, logits that nobody needs, and ranks that wait for the heaviest.

    python -m benchmarks.policy_step

Prints a table and, as its last line, one JSON object; about a minute on two cores. No cluster: the forward pass of
the policy, plain torch around it, a small model in float32. Everything is measured in this run, padded and packed in
turns, medians. The load has a long tail: completions are lognormal (sigma 1, at most 10 medians), prompts of 8 to 40
tokens.

    packing_gain       a step on padded sequences over one on packed rows, as a share of padded over real tokens;
                       both score through the same head, the padded one every place of the completions, as trainers do
    logit_memory_share peak memory of the log-probabilities, forward and backward, over that with full logits, at a
                       vocabulary of 32,768
    sequence_memory_share peak memory of a long row's forward and backward pass on each of two ranks that share it out
                       (policy.sequence_parallel_size: 2), over that on one rank
    balance            heaviest over mean rank, in cost, 8 ranks and 32 groups of 8 rollouts: the worst of 20 batches
    loss_difference    between the packed step's GRPO loss and that of padded sequences with full logits
"""

import copy
import ctypes
import gc
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from actors.model.costs import costs_of
from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.head import put_scoring_head
from algorithms.config import GrpoConfig
from algorithms.head import head_logprobs_and_entropy
from algorithms.logprobs import logprobs_and_entropy
from algorithms.losses import Normalizer, grpo_loss
from algorithms.packed import PackedRow, pack_row
from algorithms.packing import Sequences, pack, pack_sharing
from algorithms.types import Rollout
from benchmarks.policy_step_team import NUM_TOKENS, memory_share
from benchmarks.usage import parser_of

NUM_SEQUENCES, MEDIAN, MAX_TOKENS = 32, 40, 2048
"""Of a timed step; the last is the token budget of a forward pass, padded or packed."""
NUM_ROUNDS = 5
MEMORY = {"num_tokens": 4096, "vocabulary": 32_768, "hidden": 256}
NUM_RANKS, NUM_BATCHES = 8, 20
GROUP = 8
"""Rollouts of a prompt, where batches are dealt out."""
CONFIG = GrpoConfig(old_logprobs="sampled", vllm_importance_sampling_correction=False)


def model() -> Any:
    """4.2 M parameters, a third of them in the output head."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def lengths(num: int, median_length: int, seed: int) -> tuple[list[int], list[int]]:
    """Of prompts and completions."""
    random = np.random.default_rng(seed)
    completions = np.clip(random.lognormal(math.log(median_length), 1.0, num), 1, 10 * median_length).astype(int)
    return random.integers(8, 41, num).tolist(), completions.tolist()


def rollouts() -> list[Rollout]:
    """With log-probabilities at sampling as they may be a version or two later."""
    random, made = np.random.default_rng(0), []
    for prompt, completion in zip(*lengths(NUM_SEQUENCES, MEDIAN, seed=0), strict=True):
        total = prompt + completion
        mask_T = np.arange(total) >= prompt
        logprobs_T = np.where(mask_T, random.normal(-math.log(4096), 0.3, total), 0.0).astype(np.float32)
        made.append(Rollout(random.integers(2, 4096, total).astype(np.int32), mask_T, logprobs_T, (), "stop"))
    return made


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Prompts padded on the left and completions on the right, to the longest of a forward pass, as trainers do."""

    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    num_completion: int
    row: PackedRow
    """The same sequences, packed: what the loss needs of them."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], advantages: Sequence[float]) -> "PaddedRows":
        starts = [int(np.argmax(rollout.loss_mask_T)) for rollout in rollouts]
        prompt = max(starts)
        completion = max(rollout.num_tokens - start for rollout, start in zip(rollouts, starts, strict=True))
        ids_BT, mask_BT = (torch.zeros(len(rollouts), prompt + completion, dtype=torch.long) for _ in range(2))
        for ids_T, mask_T, rollout, start in zip(ids_BT, mask_BT, rollouts, starts, strict=True):
            place = slice(prompt - start, prompt - start + rollout.num_tokens)
            ids_T[place] = torch.from_numpy(rollout.token_ids_T.astype(np.int64))
            mask_T[place] = 1
        return cls(ids_BT, mask_BT, completion, pack_row(rollouts, advantages, pad_id=0))

    @property
    def num_tokens(self) -> int:
        return self.token_ids_BT.numel()

    @property
    def loss_BC(self) -> Tensor:
        """Where the completions are that are none of the padding."""
        return self.attention_mask_BT[:, -self.num_completion :].bool()

    def hidden(self, model: Any) -> Tensor:
        """Of the places that predict the completions, padding included, flat."""
        position_BT = (self.attention_mask_BT.cumsum(-1) - 1).clamp(min=0)
        hidden_BTH = model.model(self.token_ids_BT, self.attention_mask_BT, position_BT, use_cache=False)[0]
        return hidden_BTH[:, -self.num_completion - 1 : -1].flatten(0, 1)

    def logprobs(self, model: Any) -> tuple[Tensor, Tensor]:
        """Every place of the completions is scored, and the padding's left out after."""
        targets = self.token_ids_BT[:, -self.num_completion :].flatten()
        found = head_logprobs_and_entropy(self.hidden(model), model.lm_head.weight, None, targets, 1.0)
        kept = self.loss_BC.flatten()
        return found[0][kept], found[1][kept]

    def full_logprobs(self, model: Any) -> tuple[Tensor, Tensor]:
        """The same by plain torch, from logits of every place."""
        targets = self.token_ids_BT[:, -self.num_completion :].flatten()
        all_NV = model.lm_head(self.hidden(model)).log_softmax(-1)
        kept = self.loss_BC.flatten()
        return all_NV.gather(-1, targets[:, None])[kept, 0], -(all_NV.exp() * all_NV).sum(-1)[kept].detach()


def loss_of(scored: tuple[Tensor, Tensor], row: PackedRow, normalizer: Normalizer) -> Tensor:
    return grpo_loss(
        *scored, row.sampled_logprobs_N, None, row.advantages_N, row.sequence_N, num_sequences=len(row.lengths_S),
        config=CONFIG, normalizer=normalizer,
    )[0]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Steps:
    """The same batch, packed and padded; each way has its own copy of the model and its own AdamW."""

    packed: Sequence[PackedRow]
    padded: Sequence[PaddedRows]
    normalizer: Normalizer
    packed_model: Any
    padded_model: Any

    @classmethod
    def make(cls) -> "Steps":
        made, base = rollouts(), model()
        advantages = np.random.default_rng(1).normal(size=len(made)).tolist()
        sizes = [rollout.num_tokens for rollout in made]
        packed = [
            pack_row([made[i] for i in indices], [advantages[i] for i in indices], 0)
            for indices in pack(sizes, 1, MAX_TOKENS)[0]
        ]
        width = max(PaddedRows.of(made, advantages).token_ids_BT.shape[1], 1)
        at_once = max(1, MAX_TOKENS // width)
        cuts = [slice(start, start + at_once) for start in range(0, len(made), at_once)]
        padded = [PaddedRows.of(made[cut], advantages[cut]) for cut in cuts]
        num_loss_tokens = sum(rollout.num_loss_tokens for rollout in made)
        normalizer = Normalizer(len(made), num_loss_tokens, 10 * MEDIAN, len(packed))
        other = copy.deepcopy(base)
        base.set_attn_implementation(PACKED_ATTENTION)
        assert put_scoring_head(base), "this model's head has the last word"
        return cls(packed, padded, normalizer, base, other)

    @property
    def token_ratio(self) -> float:
        return sum(rows.num_tokens for rows in self.padded) / sum(sum(row.lengths_S) for row in self.packed)

    def run(self, model: Any, rows: Sequence[Any], score: Callable[[Any, Any], tuple[Tensor, Tensor]]) -> float:
        """Gradients of a whole batch; its loss."""
        total = 0.0
        for row in rows:
            loss = loss_of(score(model, row), row.row if isinstance(row, PaddedRows) else row, self.normalizer)
            loss.backward()
            total += loss.item()
        return total

    def run_packed(self) -> float:
        return self.run(self.packed_model, self.packed, lambda model, row: row_logprobs(model, row, 1.0))

    def run_padded(self) -> float:
        return self.run(self.padded_model, self.padded, lambda model, rows: rows.logprobs(model))

    def loss_difference(self) -> float:
        full = self.run(self.padded_model, self.padded, lambda model, rows: rows.full_logprobs(model))
        return abs(self.run_packed() - full)


def timed_step(run: Callable[[], float], optimizer: torch.optim.Optimizer) -> float:
    started = time.perf_counter()
    run()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def peak_bytes(full: bool, num_tokens: int, vocabulary: int, hidden: int) -> tuple[int, float]:
    """Resident memory beyond what was there before, at most, and seconds; of log-probabilities with their gradients."""
    torch.manual_seed(0)
    hidden_NH = torch.randn(num_tokens, hidden, requires_grad=True)
    weight_VH = torch.randn(vocabulary, hidden).mul_(hidden**-0.5).requires_grad_()
    targets_N = torch.randint(vocabulary, (num_tokens,))

    def logprobs(rows: slice) -> Tensor:
        if full:
            return logprobs_and_entropy(nn.functional.linear(hidden_NH[rows], weight_VH), targets_N[rows], 1.0, 2048)[0]
        return head_logprobs_and_entropy(hidden_NH[rows], weight_VH, None, targets_N[rows], 1.0)[0]

    def step() -> float:
        started = time.perf_counter()
        logprobs(slice(None)).mean().backward()
        return time.perf_counter() - started

    logprobs(slice(16)).sum().backward()  # the gradients' own memory, and the libraries'
    return peak_of(step)


def peak_of(step: Callable[[], float]) -> tuple[int, float]:
    """Resident memory of this process beyond what was there before, at most, and what the step gives."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kilobytes("VmRSS")
    given = step()
    return (_kilobytes("VmHWM") - before) * 1024, given


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def apart(*arguments: Any) -> tuple[int, float]:
    """`peak_bytes` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_bytes, *arguments).result()


def balance() -> float:
    """Of whole batches as they are dealt out: groups whose rollouts share their prompt."""
    with torch.device("meta"):
        costs = costs_of(model())
    worst = 0.0
    for seed in range(NUM_BATCHES):
        prompts, completions = lengths(256, 400, seed)
        group = [index // GROUP for index in range(256)]
        prompt = [prompts[GROUP * number] for number in group]
        sizes = [first + completion for first, completion in zip(prompt, completions, strict=True)]
        each = [costs.of(size, completion) for size, completion in zip(sizes, completions, strict=True)]
        sequences = Sequences(sizes, each, group, [costs.shared(first) for first in prompt])
        ranks = pack_sharing(sequences, NUM_RANKS, 8192)
        loads = [sum(sequences.cost(micro) for micro in rank) for rank in ranks]
        worst = max(worst, max(loads) / (sum(loads) / NUM_RANKS))
    return worst


def main() -> None:
    parser_of("benchmarks.policy_step", __doc__).parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    steps = Steps.make()
    difference = steps.loss_difference()
    ways = {"packed": steps.run_packed, "padded": steps.run_padded}
    models = {"packed": steps.packed_model, "padded": steps.padded_model}
    optimizers = {way: torch.optim.AdamW(models[way].parameters()) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(NUM_ROUNDS + 1):
        for way in sorted(ways, reverse=round_number % 2 == 1):
            took = timed_step(ways[way], optimizers[way])
            if round_number:  # the first warms up
                seconds[way].append(took)
    packed_s, padded_s = median(seconds["packed"]), median(seconds["padded"])
    (ours, ours_s), (full, full_s) = (apart(whole, *MEMORY.values()) for whole in (False, True))
    team_share, (alone, *team) = memory_share()
    bare = MEMORY["num_tokens"] * MEMORY["vocabulary"] * 4
    figures = {
        "packing_gain": padded_s / packed_s / steps.token_ratio,
        "logit_memory_share": ours / full,
        "sequence_memory_share": team_share,
        "balance": balance(),
        "loss_difference": difference,
        "token_ratio": steps.token_ratio,
        "padded_step_s": padded_s,
        "packed_step_s": packed_s,
        "head_time_ratio": ours_s / full_s,
    }
    table = Table("figure", "value", "target", "how")
    how = f"{padded_s:.2f} s over {packed_s:.2f} s, {steps.token_ratio:.2f} times the tokens; {os.cpu_count()} threads"
    table.add_row("packing_gain", f"{figures['packing_gain']:.3g}", "0.75 or more", how)
    how = f"{ours / 2**20:.0f} MiB over {full / 2**20:.0f} MiB; the logits alone are {bare / 2**20:.0f} MiB"
    table.add_row("logit_memory_share", f"{figures['logit_memory_share']:.3g}", "0.125 or less", how)
    each = " and ".join(f"{peak / 2**20:.0f}" for peak in team)
    how = f"{each} MiB over {alone / 2**20:.0f} MiB, one row of {NUM_TOKENS:,} tokens"
    table.add_row("sequence_memory_share", f"{team_share:.3g}", "0.65 or less", how)
    how = f"{NUM_RANKS} ranks, the worst of {NUM_BATCHES} batches of 256 rollouts"
    table.add_row("balance", f"{figures['balance']:.4g}", "1.02 or less", how)
    table.add_row("loss_difference", f"{difference:.2g}", "1e-5 or less", "packed rows; padded with full logits")
    how = f"{ours_s:.2f} s over {full_s:.2f} s, log-probabilities forward and backward"
    table.add_row("head_time_ratio", f"{figures['head_time_ratio']:.3g}", "", how)
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
