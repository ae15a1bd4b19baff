"""Write tests/reference/grpo.json: TRL's loss and its gradient by log-probability, on given inputs, in float64.

Runs in the environment that scripts/reference_models.py describes, with trl 1.16:

    ../torch-environment/bin/python scripts/reference_grpo.py

TRL's own method computes the loss; only the model's forward pass before it is replaced by the given log-probabilities.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch  # ty: ignore[import-not-found]
from trl.trainer.grpo_trainer import GRPOTrainer  # ty: ignore[import-not-found]

SAMPLES, LONGEST = 8, 9
LOSS_TYPES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def main() -> None:
    random = torch.Generator().manual_seed(0)
    lengths, truncated = torch.tensor([9, 4, 7, 1, 9, 5, 6, 3]), torch.arange(SAMPLES) == 4
    mask = ((torch.arange(LONGEST) < lengths[:, None]) & ~truncated[:, None]).double()

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(SAMPLES, LONGEST, generator=random, dtype=torch.float64) * scale

    current = -draw(1.0).abs()
    inputs = {
        "log_probability": current,
        "old": current + draw(0.3),
        "reference": current + draw(0.5),
        "sampled": current + draw(0.4),
        "advantage": torch.randn(SAMPLES, generator=random, dtype=torch.float64) * (torch.arange(SAMPLES) < 6),
        "lengths": lengths,
        "is_truncated": truncated,
    }
    cases = []
    for ratio in ("token", "sequence", "cispo"):
        for normalisation in LOSS_TYPES if ratio != "cispo" else ("token",):
            for kl_weight in (0.0, 0.04) if ratio != "sequence" else (0.0,):  # where TRL's has the sequence's ratio
                for limit in (0.0, 2.0) if ratio != "sequence" else (0.0,):  # nor is a token's weight its own there
                    settings = {"ratio": ratio, "loss_normalisation": normalisation, "kl_weight": kl_weight}
                    loss, gradient = trl_loss(inputs, mask, ratio, LOSS_TYPES[normalisation], kl_weight, limit)
                    case = settings | {"importance_limit": limit, "loss": loss, "gradient": gradient.tolist()}
                    cases.append(case)
    plain = {name: value.tolist() for name, value in inputs.items()}
    path = Path(__file__).parents[1] / "tests" / "reference" / "grpo.json"
    path.write_text(json.dumps({"inputs": plain, "longest": LONGEST, "cases": cases}) + "\n")
    print(f"{len(cases)} cases in {path}")


def trl_loss(inputs: dict, mask: torch.Tensor, ratio: str, loss_type: str, kl_weight: float, limit: float) -> tuple:
    """TRL's loss and its gradient by each log-probability, with the divergence's slope as TRL has it by default."""
    leaf = inputs["log_probability"].clone().requires_grad_()
    trainer, is_cispo = MagicMock(), ratio == "cispo"
    trainer.configure_mock(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=kl_weight,
        importance_sampling_level="token" if is_cispo else ratio, loss_type="cispo" if is_cispo else loss_type,
        epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH + is_cispo, use_vllm=limit > 0,
        vllm_importance_sampling_correction=True, max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )  # fmt: skip
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1)
    trainer.accelerator.gather = lambda value: value
    trainer.accelerator.num_processes = 1
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    importance = torch.exp(inputs["old"] - inputs["sampled"])
    batch = {
        "prompt_ids": torch.zeros(SAMPLES, 1, dtype=torch.long), "prompt_mask": torch.ones(SAMPLES, 1),
        "completion_ids": torch.zeros(SAMPLES, LONGEST, dtype=torch.long), "completion_mask": mask,
        "advantages": inputs["advantage"], "old_per_token_logps": inputs["old"],
        "ref_per_token_logps": inputs["reference"], "importance_sampling_ratio": importance.clamp(max=limit or 1e9),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, MagicMock(), batch)
    loss.backward()
    return loss.item(), leaf.grad


if __name__ == "__main__":
    main()
