"""Make the LoRA adapters and logits under tests/reference/adapters with peft, or check an adapter that lacuna wrote.

Needs the environment of scripts/reference_models.py, whose models are the bases, and `pip install peft==0.21.2` there:

    PYTHONHASHSEED=0 ../torch-environment/bin/python scripts/reference_adapters.py
    ../torch-environment/bin/python scripts/reference_adapters.py check ADAPTER BASE EXPECTED

The first writes the same bytes each time (peft lists target modules in the order of their hashes). The second loads the
directories ADAPTER and BASE by peft over transformers, prints the largest difference of the `logits` of EXPECTED, an
.npz that has their `input_ids` [row, token] too, from those in float64, and that of peft's own in float32, and exits
with 1 where the former is over 1e-5 of the largest logit.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # ty: ignore[import-not-found]
from peft import (  # ty: ignore[import-not-found]
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from reference_models import REFERENCE, VOCABULARY, generator, load, logits_of

ADAPTERS = REFERENCE / "adapters"
FAMILIES = ("qwen2", "qwen3", "llama2", "llama3", "mistral", "smollm2", "smollm3", "olmo2")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORAS: dict[str, dict[str, Any]] = {
    "all_linear": {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": list(ALL_LINEAR)},
    "query_value": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
}
NEW_IDS = [150, 151, 159]
NEW_TOKENS: dict[str, Any] = {"qwen3": NEW_IDS, "llama2": {"embed_tokens": NEW_IDS, "lm_head": NEW_IDS}}
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 32}},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding_target": {"target_modules": ["q_proj", "embed_tokens"]},
    "regular_expression": {"target_modules": r".*layers\.\d+\.self_attn\.(q|v)_proj"},
    "one_layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "activated": {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    "classification": {"task_type": "SEQ_CLS"},
}
OTHER_METHODS: dict[str, PeftConfig] = {
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def base_of(family: str) -> torch.nn.Module:
    """The base named by its path from the repository's root, which is what peft writes into adapter_config.json."""
    return load((REFERENCE / family).relative_to(Path.cwd()))


def randomise(model: torch.nn.Module, name: str) -> None:
    """A and B as after some training, so that the adapter moves the logits as much as the base's own weights do."""
    random = generator(name)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            values = random.standard_normal(parameter.shape) / parameter.shape[1] ** 0.5 / 3
        elif "trainable_tokens_delta" in parameter_name:
            values = random.standard_normal(parameter.shape) / 2
        else:
            continue
        parameter.data = torch.tensor(values, dtype=torch.float32)


@torch.no_grad()
def wide_logits(model: torch.nn.Module, input_ids: np.ndarray) -> np.ndarray:
    """Logits of float32 weights, computed in float64 where the model has no float32 of its own, stored in float32."""
    return logits_of(model.double(), input_ids).float().numpy()


def write_adapter(family: str, name: str, settings: dict[str, Any], input_ids: np.ndarray) -> np.ndarray:
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model, folder = get_peft_model(base_of(family), config).eval(), ADAPTERS / family / name
    randomise(model, f"{family} {name}")
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return wide_logits(model, input_ids)


def write_family(family: str) -> None:
    input_ids, adapters = generator(family + " adapters").integers(VOCABULARY, size=(2, 6), dtype=np.int32), LORAS
    if family in NEW_TOKENS:
        input_ids[:, 1::2] = NEW_IDS
        adapters = LORAS | {"new_tokens": LORAS["query_value"] | {"trainable_token_indices": NEW_TOKENS[family]}}
    logits = {"base": wide_logits(base_of(family), input_ids)}
    logits |= {name: write_adapter(family, name, settings, input_ids) for name, settings in adapters.items()}
    np.savez_compressed(ADAPTERS / family / "expected.npz", input_ids=input_ids, **logits)


def write_configs() -> None:
    configs = {name: LoraConfig(**{"task_type": "CAUSAL_LM"} | PLAIN | change) for name, change in CONFIGS.items()}
    for name, config in (configs | OTHER_METHODS).items():
        config.base_model_name_or_path, config.inference_mode = "tests/reference/qwen3", True
        config.save_pretrained(ADAPTERS / "configs" / name)


@torch.no_grad()
def check(adapter: str, base: str, expected: str) -> bool:
    with np.load(expected) as file:
        input_ids, ours = file["input_ids"], file["logits"]
    model, described = load(Path(base)), Path(adapter) / "config.json"
    if described.is_file():  # with new words the vocabulary has grown, which AutoPeftModelForCausalLM sees to
        model.resize_token_embeddings(json.loads(described.read_text())["vocab_size"], mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter).eval()
    narrow = logits_of(model, input_ids).numpy()
    theirs = wide_logits(model, input_ids)
    difference, own, largest = (np.abs(x).max() for x in (ours - theirs, narrow - theirs, theirs))
    print(f"largest difference {difference:.3g}, of peft in float32 {own:.3g}, largest logit {largest:.3g}")
    return bool(difference <= 1e-5 * max(1, largest))


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["check"]:
        sys.exit(not check(*sys.argv[2:]))
    os.chdir(REFERENCE.parents[1])
    shutil.rmtree(ADAPTERS, ignore_errors=True)
    for family in FAMILIES:
        write_family(family)
    write_configs()


if __name__ == "__main__":
    main()
