"""TRL's side of `benchmarks.end_to_end`: its GRPOTrainer on one case, in a process of its own.

    python -m benchmarks.end_to_end_trl CASE.json

CASE.json holds the fields of `Case`; `Measured` is written beside it, as CASE.out.json.
"""

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.end_to_end_case import Case, Measured, reward_function
from benchmarks.usage import parser_of


def run(case: Case, folder: Path) -> Measured:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(case.trl_threads)
    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            ended.append(time.monotonic())

    config: Any = GRPOConfig
    arguments = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_transformers_continuous_batching=case.trl_mode == "continuous batching",
        per_device_train_batch_size=case.trl_micro_batch,
        gradient_accumulation_steps=case.num_rollouts // case.trl_micro_batch,
        num_generations=case.num_generations,
        max_completion_length=case.max_completion_length,
        temperature=1.0,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        max_steps=case.trl_steps,
        beta=0.0,
        seed=case.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer: Any = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32),
        reward_funcs=reward_function(case.reward),
        args=arguments,
        train_dataset=Dataset.from_json(case.data),
        processing_class=AutoTokenizer.from_pretrained(case.model),
        callbacks=[Clock()],
    )
    trainer.train()
    steps = [line for line in trainer.state.log_history if "reward" in line]
    warm = case.num_warm_up_steps if case.trl_warm_up_steps is None else case.trl_warm_up_steps
    lengths = [line["completions/mean_length"] for line in steps[warm:]]
    seconds = ended[-1] - ended[warm - 1]
    return Measured(
        samples_per_s=len(lengths) * case.num_rollouts / seconds,
        step_s=seconds / len(lengths),
        num_steps=len(lengths),
        mean_length=sum(lengths) / len(lengths),
        max_length=max(line["completions/max_length"] for line in steps[warm:]),
        rewards=[line["reward"] for line in steps],
    )


def main() -> None:
    parser = parser_of("benchmarks.end_to_end_trl", __doc__)
    parser.add_argument("case", metavar="CASE.json", type=Path)
    path: Path = parser.parse_args().case
    case = Case.model_validate_json(path.read_text())
    measured = run(case, path.parent / "trl")
    path.with_suffix(".out.json").write_text(json.dumps(measured.model_dump()))


if __name__ == "__main__":
    main()
