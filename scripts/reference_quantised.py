"""Make tests/reference/quantised/: matrices and what bitsandbytes makes of them on a CPU.

In the environment of reference_models.py, with bitsandbytes==0.50.2 installed there too, from the repository's root:

    ../torch-environment/bin/python scripts/reference_quantised.py

Widths are multiples of 64: for others the CPU dequantises wrongly.
"""

from pathlib import Path

import bitsandbytes.functional as functional  # ty: ignore[import-not-found]
import torch  # ty: ignore[import-not-found]
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "reference" / "quantised"


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
    maps = {"normal": functional.get_4bit_type("nf4", "cpu"), "dynamic": functional.create_dynamic_map()}
    save_file(maps, FOLDER / "maps.safetensors")


if __name__ == "__main__":
    main()
