"""The command export: a checkpoint of a run as a model that any runtime reads."""

from dataclasses import replace
from pathlib import Path

from lacuna import checkpoint
from lacuna.apps.configs import ExportConfig
from lacuna.config import UserError
from lacuna.model import read_model_config
from lacuna.weights import ADAPTER, is_checkpoint, read_lora


def run_export(config: ExportConfig) -> None:
    """Write the weights of a checkpoint beside what its model has besides weights, as a run does when it ends.

    Raises:
        UserError: it is no checkpoint, or damaged, or there is something where the model should go.
    """
    directory = Path(config.directory)
    source = checkpoint.resolve_model(config.checkpoint) if Path(config.checkpoint).exists() else directory
    if not is_checkpoint(source):
        near = checkpoint.checkpoints_near(Path(config.checkpoint)) or "name one, as in runs/my_chats/best"
        raise UserError(f"checkpoint {config.checkpoint!r}: no checkpoint of a run; {near}")
    if directory.exists():
        raise UserError(f"directory {config.directory!r} is there already; name another")
    described, manifest = checkpoint.described_in(source), checkpoint.checked_manifest(source)
    model, base = read_model_config(described), checkpoint.stated_base(source)
    if is_adapter := (described / ADAPTER).is_file():
        model = replace(model, lora=read_lora(described))
    params, facts = checkpoint.saved_params(source, model), {checkpoint.BASE: base} if base else {}
    problems = checkpoint.save_model(directory, params, model, described, facts)
    what = "adapter in PEFT's" if is_adapter else "model in Hugging Face"
    print("; WARNING: ".join([f"{what} layout, of step {manifest.run.step}: {directory}", *problems]))
