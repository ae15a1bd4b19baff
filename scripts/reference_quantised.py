"""Make tests/reference/quantised/: matrices and models, and what bitsandbytes makes of them on a CPU.

In the environment of reference_models.py, with bitsandbytes==0.50.2 and accelerate==1.15.0 there too, from the
repository's root:

    ../torch-environment/bin/python scripts/reference_quantised.py

Widths are multiples of 64: for others the CPU dequantises wrongly.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes.functional as functional  # ty: ignore[import-not-found]
import numpy as np
import torch  # ty: ignore[import-not-found]
from reference_models import random_weights, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # ty: ignore[import-not-found]

REFERENCE = Path(__file__).parents[1] / "tests" / "reference"
FOLDER = REFERENCE / "quantised"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama3": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "qwen2": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "qwen3": {"load_in_8bit": True},
}


def heavy_tailed(shape: tuple[int, int]) -> torch.Tensor:
    """Student's t distribution with five degrees of freedom."""
    return torch.distributions.StudentT(5.0).sample(shape)


def nested_scales(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales in 8 bits, by the kernel that takes the nearest value and by that for CPUs, which looks up a grid."""
    offset = absmax.mean()
    scale_cpu, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    quantise = torch.ops.bitsandbytes.quantize_blockwise.default
    scale, outer_scale = quantise._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd, absmax - offset, state.code, 256
    )
    assert torch.equal(outer_scale, state.absmax)
    return {"absmax": absmax, "scale": scale, "scale_cpu": scale_cpu, "outer_scale": outer_scale, "offset": offset}


def described(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nested_codes, nested = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(codes, nested_codes)
    scales = nested_scales(state.absmax)
    assert torch.equal(nested.offset, scales["offset"]) and torch.equal(nested.absmax, scales["scale_cpu"])
    rows, row_scale, _ = functional.int8_vectorwise_quant(weight.float())
    rows, row_scale = rows.clone(), row_scale.clone()
    return scales | {
        "weight": weight, "codes": codes.reshape(len(weight), -1),
        "dequantised": functional.dequantize_4bit(codes, state),
        "dequantised_nested": functional.dequantize_4bit(nested_codes, nested),
        "rows": rows, "row_scale": row_scale, "dequantised_rows": functional.int8_vectorwise_dequant(rows, row_scale),
    }  # fmt: skip


def write_model(family: str, settings: dict[str, Any]) -> None:
    """A model that transformers saved in 8 or 4 bits, and the logits of its dequantised weights in float64."""
    with tempfile.TemporaryDirectory() as scratch:
        dense, folder = Path(scratch) / family, FOLDER / family
        dense.mkdir()
        config = json.loads((REFERENCE / family / "config.json").read_text())
        (dense / "config.json").write_text(json.dumps(config | SIZES))
        weights = random_weights(dense)
        save(weights, dense / "model.safetensors")
        settings_of = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings_of, dtype=torch.float32)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        for name, module in model.named_modules():
            if f"{name}.SCB" in saved:
                rows = saved[f"{name}.weight"], saved[f"{name}.SCB"]
                weights[f"{name}.weight"] = functional.int8_vectorwise_dequant(*rows)
            elif f"{name}.weight.absmax" in saved:
                state = module.weight.quant_state
                weights[f"{name}.weight"] = functional.dequantize_4bit(module.weight.data, state)
        save(weights, dense / "model.safetensors")
        plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
        token = torch.randint(0, config["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = plain.double()(token).logits.float()
        np.savez(folder / "expected.npz", input_ids=token.numpy(), logits=logits.numpy())


def main() -> None:
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    weights = {
        "normal": 0.02 * torch.randn(64, 192),
        "heavy": 0.02 * heavy_tailed((64, 128)),
        "bfloat16": (0.02 * torch.randn(32, 256)).bfloat16(),
        "zeros": 0.02 * torch.randn(4, 128) * torch.tensor([1.0, 0, 0, 1])[:, None],
    }
    for name, weight in weights.items():
        save_file(described(weight), FOLDER / f"{name}.safetensors")
    save_file(nested_scales(0.02 * (2 + torch.randn(20000)).abs()), FOLDER / "scales.safetensors")
    for family, settings in MODELS.items():
        write_model(family, settings)
    maps = {"normal": functional.get_4bit_type("nf4", "cpu"), "dynamic": functional.create_dynamic_map()}
    save_file(maps, FOLDER / "maps.safetensors")
    for path in FOLDER.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
