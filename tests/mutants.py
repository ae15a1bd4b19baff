"""Runs `check` with faults built into a copy of the source, one after the other: python tests/mutants.py FOLDER NAME…

A fault is a text of a room and what takes its place; the text has to be there exactly once, so that no fault rots
unseen. Each is checked in a process that forks from this one, which has imported jax but none of our rooms. The folder
holds a config for each kind; of every fault a line of JSON says which promises were kept.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src"


class Fault(NamedTuple):
    """Which promise catches it, for which config, and what it does to which room."""

    promise: str
    config: str
    room: str
    text: str
    instead: str


FAULTS = {
    "segments ignored": Fault(
        "packed = alone", "sft", "model",
        "attention(query, key, value, segment, model.attention, prompt_offset)",
        "attention(query, key, value, jnp.ones_like(segment), model.attention, prompt_offset)",
    ),
    "kernel attends across documents": Fault(
        "attention = plain formula", "sft", "attention",
        "is_own = part(document, query_block)[:, :, None] == key_document",
        "is_own = part(document, query_block)[:, :, None] >= key_document",
    ),
    "a document is seen by the next": Fault(
        "no document sees another", "sft", "attention",
        "is_own = part(document, query_block)[:, :, None] == key_document",
        "is_own = part(document, query_block)[:, :, None] - key_document <= 1",
    ),
    "mask dropped": Fault(
        "supervised = the answers", "sft", "data",
        "token[:-1], token[1:], is_learned[1:]", "token[:-1], token[1:], 1",
    ),
    "all of a chat learned": Fault(
        "supervised share", "sft", "data", "token[:-1], token[1:], is_learned[1:]", "token[:-1], token[1:], 1",
    ),
    "EOS unsupervised": Fault(
        "every answer ends", "sft", "tokenizer",
        "inside = token_end <= span_end[", "inside = token_end < span_end[",
    ),
    "two BOS": Fault(
        "BOS once", "sft", "tokenizer",
        "tokenizer.backend.encode_batch([text for text, _ in texts], add_special_tokens=False)",
        "tokenizer.backend.encode_batch([text for text, _ in texts], add_special_tokens=True)",
    ),
    "mean of means": Fault(
        "1 = n micro-batches", "sft", "optimizer",
        "weighted = batch.target, batch.weight,", "weighted = batch.target, batch.weight / jnp.sum(batch.weight),",
    ),
    "rope base at its default": Fault(
        "loss and gradient = plain formula", "sft", "model",
        "frequency = model.rope_theta **", "frequency = 10000.0 **",
    ),
    "tied head untied": Fault(
        "loss and gradient = plain formula", "sft", "model",
        'return params["embedding"] if model.is_tied',
        'return jax.lax.stop_gradient(params["embedding"]) if model.is_tied',
    ),
    "gradient of one tensor zero": Fault(
        "gradient wherever it trains", "sft", "model",
        'linear(normed, layer["up"])', 'linear(normed, jax.lax.stop_gradient(layer["up"]))',
    ),
    "uphill": Fault(
        "a step lowers its loss", "sft", "optimizer", "new = param - rate * (", "new = param + rate * (",
    ),
    "decay of norms": Fault(
        "first update = AdamW", "sft", "model", 'return self.role not in ("norm", "bias")', "return True",
    ),
    "learning rate off by the warm-up": Fault(
        "learning rate", "sft", "optimizer",
        "jnp.where(step < warmup, (step + 1) / ", "jnp.where(step < warmup, step / ",
    ),
    "resume skips a batch": Fault(
        "resumed = uninterrupted", "sft", "trainer",
        "self.ready or self.prepare(self.run.step)",
        "self.ready or self.prepare(self.run.step + bool(self.run.resumed))",
    ),
    "second moments lost": Fault(
        "saved = loaded", "sft", "checkpoint",
        "return tensor.placed(leaf)\n\n    return jax.tree.map_with_path(load, abstract, shapes)",
        'return tensor.placed(leaf) * ("nu" not in name)\n\n    return jax.tree.map_with_path(load, abstract, shapes)',
    ),
    "export transposed": Fault(
        "exported = loaded again", "sft", "weights",
        "(file_tensor(*tensors[name], model, dtype) for name in names)",
        "(file_tensor(*tensors[name], model, dtype)[::-1] for name in names)",
    ),
    "cache turned by one": Fault(
        "cached decoding = full forward", "sft", "model",
        "rotation = rotations[0][length], rotations[1][length]",
        "rotation = rotations[0][length + 1], rotations[1][length + 1]",
    ),
    "slot in the seed": Fault(
        "answers = answers alone", "sft", "sampler",
        "uniform = jax.vmap(uniforms)(seed, index, made)",
        "uniform = jax.vmap(uniforms)(seed + jnp.arange(len(seed), dtype=seed.dtype), index, made)",
    ),
    "temperature ignored": Fault(
        "sampler = trainer", "sft", "sampler",
        "scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature",
        "scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.ones_like(temperature)",
    ),
    "devices not summed": Fault(
        "1 = all devices", "sft", "model",
        "jnp.sum(head_gradients, axis=0).astype(trained.dtype)",
        "head_gradients[0].astype(trained.dtype)",
    ),
    "sampler on the base": Fault(
        "sampler has the adapter", "lora", "linear",
        "return replace(self.cast(dtype), base=", "return replace(self, a=None, b=None, base=",
    ),
    "adapter not used": Fault(
        "adapter on ≠ off", "lora", "linear", "if weight.a is not None:", "if weight.a is None:",
    ),
    "merged unscaled": Fault(
        "adapter merged = on", "lora", "apps/convert",
        "self.base[layer] + self.scale * np.tensordot", "self.base[layer] + np.tensordot",
    ),
    "advantages turned round": Fault(
        "advantage's sign", "grpo", "objective",
        "loss, divergence = -gain, jnp.zeros(())", "loss, divergence = gain, jnp.zeros(())",
    ),
}  # fmt: skip


def mutated(fault: Fault, folder: Path) -> Path:
    """A copy of the source with a fault. Raises AssertionError if its text is not there exactly once."""
    copy = Path(shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__")))
    file = copy / "lacuna" / f"{fault.room}.py"
    source = file.read_text()
    assert source.count(fault.text) == 1, f"{fault.room}.py has {source.count(fault.text)} times {fault.text!r}"
    file.write_text(source.replace(fault.text, fault.instead))
    return copy


def checked(fault: Fault, folder: Path, name: str) -> None:
    """Check the promise that the fault breaks, in this process."""
    place = folder / name.replace(" ", "_")
    source = mutated(fault, place / "src")
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)  # of the run that is killed
    from lacuna import cli

    assert Path(cli.__file__).is_relative_to(source)
    config = cli.parse(cli.COMMANDS[f"check {fault.config.replace('lora', 'sft')}"], [
        "@", str(folder / f"{fault.config}.toml"), "--only", fault.promise, "--check-file", str(place / "check.json"),
    ], "check")  # fmt: skip
    try:
        cli.run(config)
    except SystemExit as ended:
        assert ended.code == 1
    shutil.rmtree(source)


def main() -> None:
    import jax  # noqa: F401

    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        if not (child := os.fork()):
            code = 1
            try:
                with (folder / "log.txt").open("a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                checked(FAULTS[name], folder, name)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        report = folder / name.replace(" ", "_") / "check.json"
        lines = json.loads(report.read_text())["promises"] if status == 0 else []
        print(json.dumps({"fault": name, "promises": lines}), flush=True)


if __name__ == "__main__":
    main()
