"""Make the reference values under tests/reference with PyTorch and transformers, which lacuna itself never imports.

They live in an environment of their own, and the data shelf (`shared/data` beside the repository) lends the configs:

    python -m venv ../torch-environment
    ../torch-environment/bin/pip install torch==2.13.0 transformers==5.23.0
    ../torch-environment/bin/python scripts/reference_models.py

A run takes seconds, and every array is drawn from a seed, so a second run writes the same bytes.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch  # ty: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config  # ty: ignore[import-not-found]
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding  # ty: ignore[import-not-found]

REFERENCE = Path(__file__).parents[1] / "tests" / "reference"
SHELF = Path(__file__).parents[2] / "shared" / "data"
VOCABULARY = 160

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 1024,
    "rope_type": "llama3",
}
# Configs that the shelf lacks, as their authors published them, SmolLM3-3B and OLMo-2-0425-1B, less sizes
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "initializer_range": 0.02, "layer_types": ["full_attention"] * 4, "max_window_layers": 28, "mlp_bias": False,
    "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 2,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "torch_dtype": "bfloat16", "use_cache": False, "use_sliding_window": False,
}  # fmt: skip
OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "initializer_range": 0.02, "model_type": "olmo2", "pad_token_id": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
}  # fmt: skip
FAMILIES: dict[str, tuple[str | dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("Qwen2.5-0.5B-Instruct", {"max_window_layers": 2}),
    "qwen2_untied": ("Qwen2.5-7B-Instruct", {"max_window_layers": 2}),
    "qwen3": ("Qwen3-0.6B", {"head_dim": 16, "max_window_layers": 2}),
    "llama2": ("TinyLlama-1.1B-Chat-v1.0", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama3": ("Llama-3.2-1B-Instruct", {"head_dim": 12, "eos_token_id": [1, 2, 3], "rope_scaling": LLAMA3_ROPE}),
    "mistral": ("Mistral-7B-Instruct-v0.3", {"num_key_value_heads": 1}),
    "smollm2": ("SmolLM2-135M", {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "qwen3_yarn": ("Qwen3-0.6B", {"head_dim": 16, "max_window_layers": 2, "rope_scaling": YARN_ROPE}),
    "smollm3": (SMOLLM3, {"num_hidden_layers": 4}),
    "olmo2": (OLMO2, {}),
}

STEPS, WARMUP_STEPS, PEAK_LEARNING_RATE = 50, 5, 1e-3
DOCUMENT_LENGTHS = (24, 2, 9, 1, 13, 5, 31, 3)
CHOICES = (
    ("Once upon a time, there was a little girl named", ["Lily", "Tom Smith", "the big dog of the king"], 0),
    ("The sun was", ["shining", "very very hungry and sad", "a cat"], 0),
    ("Tom wanted to play with his", ["toy car", "the", "friends in the park all day long"], 2),
    ("Lily saw a big", ["dog", "tree", "of", "red ball in the park"], 3),
    ("They went to the", ["park", "running"], 0),
)


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def config_as_published(published: str | dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a published model with our sizes in it, in the form that model's authors wrote."""
    if isinstance(published, str):
        published = json.loads((SHELF / "configs" / published / "config.json").read_text())
    config = published | SIZES | changes
    config.pop("_name_or_path", None)
    config["dtype" if "dtype" in config else "torch_dtype"] = "float32"
    return config


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def draw(name: str, shape: tuple[int, ...], random: np.random.Generator) -> torch.Tensor:
    """A weight with the statistics of a trained one: no bias is zero and no norm scale is one."""
    normal = random.standard_normal(shape)
    if name.endswith("norm.weight"):
        value = 1 + 0.3 * normal
    elif name.endswith("bias"):
        value = 0.2 * normal
    elif name.endswith("embed_tokens.weight"):
        value = 0.5 * normal
    else:
        value = normal / math.sqrt(shape[1])
    return torch.tensor(value, dtype=torch.float32)


def random_weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    random = generator(folder.name)
    return {name: draw(name, tuple(weight.shape), random) for name, weight in model.named_parameters()}


def save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file(weights, path, metadata={"format": "pt"})


def save_sharded(weights: dict[str, torch.Tensor], folder: Path) -> None:
    names, weight_map = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save({name: weights[name] for name in part}, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": {name: weight_map[name] for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_models() -> None:
    for family, (published, changes) in FAMILIES.items():
        folder = REFERENCE / family
        write_config(folder, config_as_published(published, changes))
        save(random_weights(folder), folder / "model.safetensors")

    AutoConfig.from_pretrained(REFERENCE / "llama3").save_pretrained(REFERENCE / "llama3_new")
    shutil.copy(REFERENCE / "llama3" / "model.safetensors", REFERENCE / "llama3_new")

    for dtype in (torch.bfloat16, torch.float16):
        dtype_name = str(dtype).removeprefix("torch.")
        folder = REFERENCE / f"qwen2_{dtype_name}"
        write_config(folder, config_as_published(*FAMILIES["qwen2"]) | {"torch_dtype": dtype_name})
        weights = load_file(REFERENCE / "qwen2" / "model.safetensors")
        save({name: weight.to(dtype) for name, weight in weights.items()}, folder / "model.safetensors")

    write_config(REFERENCE / "qwen3_sharded", config_as_published(*FAMILIES["qwen3"]))
    save_sharded(load_file(REFERENCE / "qwen3" / "model.safetensors"), REFERENCE / "qwen3_sharded")


def write_rope() -> None:
    """Radians per position and magnitude of the rotation that transformers makes of keys in a config.json."""
    plain, yarn = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "yarn", "factor": 8.0}
    changes: list[dict[str, Any]] = [
        {"rope_scaling": yarn | {"original_max_position_embeddings": 512}},
        {"rope_scaling": yarn},
        {"rope_scaling": yarn | {"truncate": False, "beta_fast": 16, "beta_slow": 2}},
        {"rope_scaling": yarn | {"attention_factor": 1.25, "rope_theta": 5e5}},
        {"rope_scaling": yarn | {"mscale": 0.7, "mscale_all_dim": 1.5, "original_max_position_embeddings": 64}},
        {"rope_scaling": yarn | {"original_max_position_embeddings": 4}},
        {"rope_parameters": yarn | {"rope_theta": 1e4}},
        {"rope_parameters": plain, "rope_scaling": yarn, "rope_theta": 1e4},
        {"rope_parameters": plain, "rope_scaling": LLAMA3_ROPE | {"rope_theta": 1e4}},
        {"rope_parameters": plain, "rope_scaling": None},
        {"rope_parameters": {}, "rope_scaling": yarn},
    ]
    rows = []
    for change in changes:
        config = config_as_published("Qwen3-0.6B", {"head_dim": 32} | change)
        rope = Qwen3RotaryEmbedding(Qwen3Config(**json.loads(json.dumps(config))))
        rows.append({"change": change, "frequencies": rope.inv_freq.tolist(), "magnitude": rope.attention_scaling})
    (REFERENCE / "rope.json").write_text(json.dumps(rows) + "\n")


def load(folder: Path) -> torch.nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def logits_of(model: torch.nn.Module, input_ids: np.ndarray, position_ids: np.ndarray | None = None) -> torch.Tensor:
    """Logits under plain causal attention; the explicit mask keeps transformers from cutting rows at position jumps."""
    token = torch.tensor(input_ids, dtype=torch.long)
    position = None if position_ids is None else torch.tensor(position_ids, dtype=torch.long)
    return model(input_ids=token, attention_mask=torch.ones_like(token), position_ids=position, use_cache=False).logits


def nll_of(logits: torch.Tensor, target: np.ndarray) -> torch.Tensor:
    chosen = torch.tensor(target, dtype=torch.long)[..., None]
    return -torch.log_softmax(logits, dim=-1).gather(-1, chosen)[..., 0]


def probe(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of tokens: positions of the first count up, those of the second jump, so long distances matter too."""
    random = generator(family + " probe")
    input_ids = random.integers(VOCABULARY, size=(2, 28), dtype=np.int32)
    jumps = np.cumsum(random.integers(1, 65, size=28), dtype=np.int32)
    return input_ids, np.stack([np.arange(28, dtype=np.int32), jumps])


@torch.no_grad()
def write_expected() -> None:
    for folder in sorted(path.parent for path in REFERENCE.glob("*/config.json")):
        input_ids, position_ids = probe(folder.name)
        logits = logits_of(load(folder), input_ids, position_ids)
        nll = nll_of(logits[:, :-1], input_ids[:, 1:])
        np.savez_compressed(
            folder / "expected.npz",
            input_ids=input_ids,
            position_ids=position_ids,
            logits=logits.numpy(),
            nll=nll.numpy(),
        )


def learning_rate(step: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))
    return PEAK_LEARNING_RATE * (0.1 + 0.9 * cosine)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    undecayed = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)


def clip(model: torch.nn.Module, maximum: float) -> float:
    """The global gradient norm before clipping; torch's own clipping divides by norm + 1e-6, this one by the norm."""
    gradients = [parameter.grad for parameter in model.parameters()]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, maximum / norm))
    return norm


def training_batches() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, their next tokens and 0/1 weights, each [step, row, token]; low tokens are likelier, so losses fall."""
    random = generator("training")
    rows = (VOCABULARY * random.random((STEPS, 4, 33)) ** 2).astype(np.uint8)
    weights = random.integers(2, size=(STEPS, 4, 32), dtype=np.uint8)
    return rows[..., :-1], rows[..., 1:], weights


def train(model: torch.nn.Module) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    optimizer = adamw(model)
    for step, (token, target, weight) in enumerate(zip(*training_batches(), strict=True)):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(step)
        optimizer.zero_grad()
        loss = (nll_of(logits_of(model, token), target) * torch.tensor(weight)).sum() / int(weight.sum())
        loss.backward()
        gradient_norm = clip(model, maximum=1.0)
        optimizer.step()
        yield loss.item(), gradient_norm


def write_training() -> None:
    tokens, targets, weights = training_batches()
    rates = [learning_rate(step) for step in range(STEPS)]
    arrays: dict[str, Any] = {"tokens": tokens, "targets": targets, "weights": weights, "learning_rates": rates}
    for family in ("qwen3", "llama2"):
        model = load(REFERENCE / family)
        losses, gradient_norms = zip(*train(model), strict=True)
        names, parameters = zip(*model.named_parameters(), strict=True)
        with torch.no_grad():
            logits = logits_of(model, *probe(family))
        arrays |= {
            f"{family}/losses": losses,
            f"{family}/gradient_norms": gradient_norms,
            f"{family}/parameter_names": names,
            f"{family}/parameter_sums": [parameter.double().sum().item() for parameter in parameters],
            f"{family}/parameter_norms": [parameter.double().norm().item() for parameter in parameters],
            f"{family}/probe_logits": logits.numpy(),
        }
    np.savez_compressed(REFERENCE / "training.npz", **arrays)


def write_packed() -> None:
    """Every document runs alone; the gradient is that of the NLL summed over all of them."""
    random, model = generator("packed"), load(REFERENCE / "qwen3")
    documents = [random.integers(VOCABULARY, size=length, dtype=np.uint8) for length in DOCUMENT_LENGTHS]
    nll = [nll_of(logits_of(model, document[None])[:, :-1], document[None, 1:])[0] for document in documents]
    torch.cat(nll).sum().backward()
    names, parameters = zip(*model.named_parameters(), strict=True)
    index = np.stack([random.integers(parameter.numel(), size=16, dtype=np.int32) for parameter in parameters])
    values = [parameter.grad.flatten()[entry].numpy() for parameter, entry in zip(parameters, index, strict=True)]
    np.savez_compressed(
        REFERENCE / "packed.npz",
        lengths=DOCUMENT_LENGTHS,
        tokens=np.concatenate(documents),
        nll=torch.cat(nll).detach().numpy(),
        gradient_names=names,
        gradient_norms=[parameter.grad.double().norm().item() for parameter in parameters],
        gradient_index=index,
        gradient_values=np.stack(values),
    )


@torch.no_grad()
def write_evaluation() -> None:
    folder, source = SHELF / "weights" / "stories260k", "chat/rasbt_instruct_1100.jsonl"
    with open(SHELF / source) as lines:
        texts = [json.loads(next(lines))["messages"][0]["content"] for _ in range(20)]
    tokenizer, model = Tokenizer.from_file(str(folder / "tokenizer.json")), load(folder)
    end = tokenizer.token_to_id("</s>")
    rows = [np.array([[*tokenizer.encode(text).ids, end]]) for text in texts]
    nll = [nll_of(logits_of(model, row)[:, :-1], row[:, 1:]).double().sum().item() for row in rows]
    result = {
        "model": "weights/stories260k",
        "source": source,
        "text": "content of the first message of each of the first 20 lines",
        "input_ids": f"tokenizer.json's ids, its post-processor's <s> (1) in front, then </s> ({end}); each text alone",
        "targets": "every id after the first",
        "target_tokens": sum(row.shape[1] - 1 for row in rows),
        "total_nll": sum(nll),
        "eval_loss": sum(nll) / sum(row.shape[1] - 1 for row in rows),
        "nll_per_text": nll,
        "length_per_text": [row.shape[1] for row in rows],
    }
    (REFERENCE / "eval_stories260k.json").write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def write_choices() -> None:
    """Each choice after its prompt and a space, in a row of its own."""
    folder = SHELF / "weights" / "stories260k"
    tokenizer, model = Tokenizer.from_file(str(folder / "tokenizer.json")), load(folder)
    rows = []
    for prompt, choices, right in CHOICES:
        start, sums, greedy = len(tokenizer.encode(prompt).ids), [], []
        for choice in choices:
            ids = np.array([tokenizer.encode(f"{prompt} {choice}").ids])
            logits = logits_of(model, ids)[:, :-1]
            sums.append(-nll_of(logits, ids[:, 1:])[0, start - 1 :].double().sum().item())
            greedy.append(bool((logits.argmax(-1).numpy() == ids[:, 1:])[0, start - 1 :].all()))
        rows.append({"question": prompt, "choices": choices, "answer": right, "sums": sums, "is_greedy": greedy})
    (REFERENCE / "choices_stories260k.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    for folder in [path.parent for path in REFERENCE.glob("*/config.json")]:
        shutil.rmtree(folder)
    write_models()
    write_rope()
    write_expected()
    write_training()
    write_packed()
    write_evaluation()
    write_choices()


if __name__ == "__main__":
    main()
