"""Train a LoRA adapter with TRL and peft on rows that lacuna trains on, from the same adapter, and keep each loss.

Needs the environment of scripts/reference_adapters.py, and `pip install trl==1.16.0` there:

    python scripts/reference_adapter_run.py initial MODEL ADAPTER --rank 16
    python scripts/reference_adapter_run.py train MODEL ADAPTER ROWS OUT --steps 60 --batch-size 4

`initial` writes an adapter of every linear weight in peft's form, A random and B zero. `train` continues from it over
ROWS, a .jsonl of `input_ids` and `labels` in the order in which lacuna takes them (scripts/adapter_rows.py),
`--batch-size` rows a step, by lacuna's optimizer: AdamW (0.9, 0.95) without decay, clipping at norm 1, linear warm-up
and a cosine to a tenth. Into OUT go losses.json, the loss of each step, and the trained adapter. A line of JSON gives
the median seconds of a step after the third, and the most memory that the process held.
"""

import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch  # ty: ignore[import-not-found]
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model  # ty: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # ty: ignore[import-not-found]
from trl import SFTConfig, SFTTrainer  # ty: ignore[import-not-found]

WARM_STEPS = 3


def load(model: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")


def write_initial(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    alpha, rank = options.alpha or options.rank, options.rank
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(load(options.model), config).save_pretrained(options.adapter)


def rate_of(step: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate in a step; steps count from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


class Clock(TrainerCallback):
    """Seconds of each step, from its batch's forward pass to the new weights, and what the processor spent on it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began[0])
        self.cpu_seconds.append(time.process_time() - self.began[1])


def train(options: argparse.Namespace) -> None:
    lines = Path(options.rows).read_text().splitlines()[: options.steps * options.batch_size]
    rows = Dataset.from_list([json.loads(line) for line in lines])
    model = PeftModel.from_pretrained(load(options.model), options.adapter, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate_of(s, options.steps, options.warmup_steps))
    config = SFTConfig(
        output_dir=options.out,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        max_length=None,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock, tools = Clock(), {"processing_class": AutoTokenizer.from_pretrained(options.model)}
    tools |= {"callbacks": [clock], "optimizers": (optimizer, schedule)}
    trainer = SFTTrainer(model, config, train_dataset=rows, **tools)
    given: list[int] = []
    collate = trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        given.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()
    model.save_pretrained(options.out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (Path(options.out) / "losses.json").write_text(json.dumps(losses) + "\n")
    seconds, tokens = clock.seconds[WARM_STEPS:], given[WARM_STEPS : len(clock.seconds)]
    found = {
        "label": "trl",
        "step_seconds": statistics.median(seconds),
        "step_cpu_seconds": statistics.median(clock.cpu_seconds[WARM_STEPS:]),
        "tok_s": sum(tokens) / sum(seconds),
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    initial, training = commands.add_parser("initial"), commands.add_parser("train")
    for command in (initial, training):
        command.add_argument("model")
        command.add_argument("adapter")
    initial.add_argument("--rank", type=int, default=16)
    initial.add_argument("--alpha", type=int, default=0, help="0: the rank")
    initial.add_argument("--seed", type=int, default=0)
    initial.set_defaults(call=write_initial)
    training.add_argument("rows")
    training.add_argument("out")
    training.add_argument("--steps", type=int, default=60)
    training.add_argument("--batch-size", type=int, default=4)
    training.add_argument("--learning-rate", type=float, default=2e-4)
    training.add_argument("--warmup-steps", type=int, default=5)
    training.add_argument("--gradient-checkpointing", action="store_true")
    training.set_defaults(call=train)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
