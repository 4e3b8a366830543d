"""What publishing weights costs: the wire against a bare broadcast, the pause against its bound, changes against all.

    python -m benchmarks.weight_sync

Prints a table and, as its last line, one JSON object; about four minutes on two cores. Everything is measured in this
run on this machine, in turns with what it is compared with, medians; but for relay_over_bound.

    packed_over_raw         a 512 MiB model of large tensors, announced, streamed and verified, over one flat
                            torch.distributed (gloo) broadcast of as many bytes
    packed_over_per_tensor  a model of 310 small tensors, against one torch.distributed broadcast for each
    pause_over_bound        pause of a vLLM replica that generates with a 218 MB model, over one memory copy of the
                            model + one engine step + the 20 ms that vLLM's pause always takes
    pause_share             that pause over the whole publication
    relay_over_bound        simulated: 15 GB to 1,024 workers by a relay tree, each on a machine of its own, over the
                            policy's link carrying them once (12.5 GB/s, 0.3 ms for each message)
    relay_over_group        a bucket to five receivers on this machine, by a relay tree over by one gloo group; no
                            link is spared here, so this is what passing on costs
    throughput_kept         tokens/s with a version in full every 2 s, over without; neighbouring windows
    delta_overhead          bytes of a version sent as changes over 6 for each element that a step of AdamW (learning
                            rate 1e-6, float32 masters) changed in bf16
    lora_bytes_share        bytes of a version that is an adapter on all linear layers over those of the whole model,
                            the one of 218 MB
"""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.usage import parser_of
from benchmarks.weight_sync_engine import EngineFigures
from benchmarks.weight_sync_engine import measure as measure_engine
from benchmarks.weight_sync_lora import LORA, LoraFigures
from benchmarks.weight_sync_lora import measure as measure_lora
from benchmarks.weight_sync_relay import LINKS, NUM_RANKS, Measured, Predicted, predict
from benchmarks.weight_sync_relay import measure as measure_relay
from benchmarks.weight_sync_wire import (
    Comparison,
    DeltaCost,
    Wire,
    compare,
    delta_cost,
    large_parameters,
    small_parameters,
)


@dataclass(frozen=True, slots=True)
class FanOut:
    """To many workers in virtual time, on each of LINKS, and to few in this run."""

    predicted: tuple[Predicted, ...]
    measured: Measured

    def figures(self) -> dict[str, float]:
        first = self.predicted[0]
        return {
            "relay_over_bound": first.relay_s / first.bound_s,
            "relay_over_group": self.measured.relay_s / self.measured.group_s,
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, target and how."""
        each = "; ".join(
            f"{p.bytes_per_s / 1e9:g} GB/s: fan-out {p.fanout} {p.relay_s / p.bound_s:.2f} (closed form "
            f"{p.closed_form_s / p.bound_s:.2f}), one group {p.group_s / p.bound_s:.2f}"
            for p in self.predicted
        )
        here = self.measured
        return [
            ("relay_over_bound", "2.5 or less", f"simulated, not measured: 15 GB to 1,024 workers; {each}"),
            (
                "relay_over_group",
                "",
                f"{here.relay_s * 1e3:.0f} ms over {here.group_s * 1e3:.0f} ms; {here.num_bytes / 1e6:.0f} MB, "
                f"{NUM_RANKS} processes of one machine, {here.num_runs} runs in turns",
            ),
        ]


def figures(
    large: Comparison, small: Comparison, fan_out: FanOut, delta: DeltaCost, lora: LoraFigures, engine: EngineFigures
) -> dict[str, Any]:
    return fan_out.figures() | {
        "packed_over_raw": large.theirs_s / large.ours_s,
        "packed_over_per_tensor": small.theirs_s / small.ours_s,
        "pause_share": engine.pause_s / engine.total_s,
        "pause_ms": engine.pause_s * 1e3,
        "pause_over_bound": engine.pause_s / engine.bound_s,
        "throughput_kept": engine.throughput_kept,
        "delta_overhead": delta.overhead,
        "delta_exact": delta.exact,
        "lora_bytes_share": lora.share,
        "lora_seconds_share": lora.seconds / lora.full_s,
    }


def table(
    large: Comparison, small: Comparison, fan_out: FanOut, delta: DeltaCost, lora: LoraFigures, engine: EngineFigures
) -> Table:
    result = figures(large, small, fan_out, delta, lora, engine)
    rows = [
        (
            "packed_over_raw",
            "0.85 or more",
            f"{_rate(large.num_bytes, large.ours_s)} over {_rate(large.num_bytes, large.theirs_s)}; "
            f"{large.num_bytes / 1e6:.0f} MB in {large.num_tensors} tensors, {large.num_runs} runs in turns",
        ),
        (
            "packed_over_per_tensor",
            "5 or more",
            f"{small.ours_s * 1e3:.1f} ms against {small.theirs_s * 1e3:.1f} ms; {small.num_tensors} tensors",
        ),
        *fan_out.rows(),
        (
            "pause_over_bound",
            "3 or less",
            f"{engine.pause_s * 1e3:.0f} ms (swap {engine.swap_s * 1e3:.1f} ms) over "
            f"{engine.copy_s * 1e3:.0f} ms copy + {engine.step_s * 1e3:.0f} ms step + 20 ms; "
            f"{engine.num_bytes / 1e6:.0f} MB",
        ),
        ("pause_share", "0.5 or less", f"of {engine.total_s * 1e3:.0f} ms; {engine.num_publications} publications"),
        (
            "throughput_kept",
            "0.9 or more",
            f"{engine.tokens_per_s_published:.0f} against {engine.tokens_per_s:.0f} tokens/s; "
            f"{engine.num_windows} pairs of windows, sender and receiver on the same 2 cores",
        ),
        (
            "delta_overhead",
            "1.2 or less",
            f"{delta.num_changed / delta.num_elements:.2%} of {delta.num_elements / 1e6:.0f} M elements changed: "
            f"{delta.num_bytes / 1e6:.2f} MB for {delta.full_bytes / 1e6:.0f} MB, {delta.seconds * 1e3:.0f} ms for "
            f"{delta.full_s * 1e3:.0f} ms, {'bit for bit' if delta.exact else 'NOT EXACT'}",
        ),
        (
            "lora_bytes_share",
            "",
            f"{lora.num_bytes / 1e6:.2f} MB for {lora.full_bytes / 1e6:.0f} MB, {lora.seconds * 1e3:.1f} ms for "
            f"{lora.full_s * 1e3:.0f} ms; rank {LORA.r} on all linear layers",
        ),
    ]
    shown = Table("figure", "value", "target", "how")
    for name, target, how in rows:
        shown.add_row(name, f"{result[name]:.3g}", target, how)
    return shown


def _rate(num_bytes: int, seconds: float) -> str:
    return f"{num_bytes / seconds / 1e9:.2f} GB/s"


def main() -> None:
    parser_of("benchmarks.weight_sync", __doc__).parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    large = compare(large_parameters(), Wire.flat, num_runs=15)
    small = compare(small_parameters(), Wire.per_tensor, num_runs=15)
    fan_out = FanOut(tuple(predict(link) for link in LINKS), measure_relay())
    delta = delta_cost()
    lora = measure_lora()
    engine = measure_engine()
    Console().print(table(large, small, fan_out, delta, lora, engine))
    print(json.dumps(figures(large, small, fan_out, delta, lora, engine)))


if __name__ == "__main__":
    main()
