"""What a run will take on accelerators that are not here: its programs, compiled for them from shapes alone.

Memory is what the compiler says; times are bounds from the published figures of the chips, not measurements. All that
is printed is also in the JSON file.
"""

import json
import math
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lacuna import checkpoint, optimizer, sampler
from lacuna.apps.configs import PlanKeys
from lacuna.apps.programs import Collective, collectives, matmul_flops, moved_bytes, read_program, recomputed_flops
from lacuna.attention import fused_attention
from lacuna.cli import DEVICE_MEMORY_SHARE, GPU_PLUGINS
from lacuna.config import (
    GrpoConfig,
    RowsConfig,
    SftConfig,
    TrainingConfig,
    UserError,
    VocabularyKeys,
    accumulation_steps,
)
from lacuna.data import Batch
from lacuna.distributed import ROW_AXES, make_mesh, row_shards
from lacuna.grpo import slot_count
from lacuna.metrics import byte_size, flop_size, peak_flops, percent, short, step_flops
from lacuna.model import PAGE, ModelConfig, check_trainable, joined, parameter_counts
from lacuna.objective import INTEGERS, RolloutBatch, policy_loss, update_shape
from lacuna.optimizer import TrainState, everywhere

MOST_ROWS = 64  # the largest micro-batch that is tried
# What saves memory, cheapest first: rematerialisation, and the divisor of the completions generated at once
SAVINGS = (("none", 1), ("matmuls", 1), ("matmuls", 2), ("layer", 1), ("layer", 2), ("layer", 4))


class Chip(NamedTuple):
    """Published figures of a device: memory in bytes, bandwidths in bytes a second; links count one direction."""

    platform: str
    kind: str
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int


CHIPS = {
    # NVIDIA data sheets, SXM: half of NVLink's two-way bandwidth; DGX: a network card per GPU (400 Gb/s, A100 200); the
    # RTX 4090 communicates over PCIe 4, which reaches about half of its 32 GB/s in practice
    "a100": Chip("cuda", "NVIDIA A100-SXM4-80GB", 80 * 2**30, 2.039e12, 300e9, 25e9, 8),
    "h100": Chip("cuda", "NVIDIA H100 80GB HBM3", 80 * 2**30, 3.35e12, 450e9, 50e9, 8),
    "h200": Chip("cuda", "NVIDIA H200", 140 * 2**30, 4.8e12, 450e9, 50e9, 8),
    "rtx4090": Chip("cuda", "NVIDIA GeForce RTX 4090", 24 * 2**30, 1.008e12, 16e9, 16e9, 8),
    # Google Cloud documentation, per chip: interconnect 2400, 1600, 4800 and 3584 Gb/s over all its links
    "v4": Chip("tpu", "TPU v4", 32 * 2**30, 1.228e12, 150e9, 150e9, 4096),
    "v5e": Chip("tpu", "TPU v5e", 16 * 2**30, 819e9, 100e9, 100e9, 256),
    "v5p": Chip("tpu", "TPU v5", 95 * 2**30, 2.765e12, 300e9, 300e9, 8960),
    "v6e": Chip("tpu", "TPU v6e", 32 * 2**30, 1.64e12, 224e9, 224e9, 256),
}
SLICES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
}
GPU_TARGETS = {
    "a100": {"major": 8, "minor": 0, "cores": 108, "fpus": 64, "shared": 167936, "block": 166912, "cache": 41943040,
             "clock": 1.41},
    "h100": {"major": 9, "minor": 0, "cores": 132, "fpus": 128, "shared": 233472, "block": 232448, "cache": 52428800,
             "clock": 1.98},
    "rtx4090": {"major": 8, "minor": 9, "cores": 128, "fpus": 128, "shared": 102400, "block": 101376, "cache": 75497472,
                "clock": 2.52},
}  # fmt: skip
GPU_TARGETS["h200"] = GPU_TARGETS["h100"]  # but for its memory
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 fpus_per_core: {fpus}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {block}
  core_count: {cores} l2_cache_size: {cache} clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{kind}"
"""


class Topology(NamedTuple):
    """Devices that a compiler knows, whether or not they are here."""

    name: str
    chip: Chip
    devices: list[jax.Device]


def read_topology(name: str) -> Topology:
    """The topology of a name such as h200:8, h100:64, v5e:16 or v5p:4x4x4.

    Raises:
        UserError: no such chip or slice, or its compiler is not installed.
    """
    kind, _, size = name.lower().partition(":")
    if kind not in CHIPS:
        raise UserError(f"topology {name!r}: {kind!r} is none of {', '.join(CHIPS)}; write it as in h200:8 or v5e:16")
    chip = CHIPS[kind]
    if chip.platform == "cuda":
        if not size.isdecimal() or not int(size) or (int(size) > chip.per_node and int(size) % chip.per_node):
            raise UserError(f"topology {name!r}: give 1 to {chip.per_node} GPUs, or whole nodes of {chip.per_node}")
        nodes, count = max(int(size) // chip.per_node, 1), min(int(size), chip.per_node)
        target = GPU_TARGET.format(**GPU_TARGETS[kind], kind=chip.kind, memory=chip.memory, bandwidth=chip.bandwidth)
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        arguments = {"topology_name": "", "topology": f"1x{nodes}x{count}", "target_config": target}
    else:
        known = SLICES[3 if kind in ("v4", "v5p") else 2]
        shape = known.get(int(size), "") if size.isdecimal() else size
        if shape not in known.values():
            raise UserError(f"topology {name!r}: {kind} comes as {', '.join(f'{kind}:{count}' for count in known)}")
        arguments = {"topology_name": f"{kind}:{shape}"}
    try:
        devices = topologies.get_topology_desc(platform=chip.platform, **arguments).devices
    except Exception as error:  # each plugin fails in its own way, mostly because it is missing
        extra, packages = ("cuda", GPU_PLUGINS) if chip.platform == "cuda" else ("tpu", ("libtpu",))
        is_there = any(find_spec(package) for package in packages)
        fix = "fix that" if is_there else f"start it as uv run --extra {extra} plan"
        why = " ".join(str(error).split())[:200]
        raise UserError(f"topology {name!r}: its compiler can't be used ({why}); {fix}") from error
    return Topology(name, chip, list(devices))


@contextmanager
def tracing_for(topology: Topology) -> Generator[None]:
    """Let jax's cuDNN functions, which ask the local GPU for its generation while traced, see the planned one."""
    if topology.chip.platform != "cuda":
        yield
        return
    target = GPU_TARGETS[topology.name.lower().partition(":")[0]]
    capability = target["major"] + target["minor"] / 10
    answers = {
        "check_compute_capability": lambda least: float(least) <= capability,
        "is_cuda_compute_capability_equal": lambda exact: float(exact) == capability,
    }
    before = {name: getattr(fused_attention, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused_attention, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(fused_attention, name, function)


# Programs


class TooLarge(Exception):
    """A compiler found no room for a program."""


class Program(NamedTuple):
    """A compiled program, what one run of it is counted for, its FLOPs for that over all devices, and what else each
    device holds while it runs (bytes)."""

    name: str
    scope: str
    compiled: Any
    flops: float
    compile_seconds: float
    beside: float

    @property
    def bytes(self) -> float:
        """The most that a device holds while it runs."""
        memory = self.compiled.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return float(memory.argument_size_in_bytes + new + memory.temp_size_in_bytes) + self.beside


def device_bytes(tree: PyTree) -> float:
    """Bytes of one device's part of arrays given as shapes with shardings."""
    return sum(
        float(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=float)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def placed(tree: PyTree, shardings: Any) -> Any:
    """Shapes with their sharding: the same for all leaves, or a tree of them."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def abstract_batch(kind: Any, shape: tuple[int, int, int], mesh: Mesh) -> Any:
    """Shapes of the micro-batches of a step, [micro_batch, row, token]."""
    sharding = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))
    types = (jnp.int32 if name in INTEGERS else jnp.float32 for name in kind._fields)
    return kind(*(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in types))


def compiled(
    name: str, scope: str, function: Any, *arguments: Any, beside: float = 0.0, attention: float | None = None
) -> Program:
    """A jitted function for arguments given as shapes. `attention` are the FLOPs of attention where it runs in kernels
    or loops whose FLOPs no program shows."""
    began = time.perf_counter()
    traced = function.trace(*arguments)
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:  # the compilers for TPUs refuse what has no room
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(f"{name}: {str(error).splitlines()[0]}") from error
    flops = matmul_flops(traced.jaxpr.jaxpr, nested_rounds=1 if attention is None else 0) + (attention or 0.0)
    return Program(name, scope, program, flops, time.perf_counter() - began, beside)


def attention_flops(config: TrainingConfig, model: ModelConfig, row_count: int) -> float:
    """FLOPs of attention, forward and backward, over rows of one document each: two matrix products forward, five
    backward, as the scores are recomputed, and the two forward ones again where layers are recomputed."""
    width = model.kv_heads * model.group * model.head
    counted = step_flops(0, 0, width, model.layers, np.full(row_count, config.sequence_length))
    return counted * (9 if config.rematerialisation == "layer" else 7) / 6


def programs_of(config: TrainingConfig, model: ModelConfig, mesh: Mesh) -> list[Program]:
    """The programs in which a run of this config spends its time."""
    state = optimizer.abstract_state(model, mesh)
    recipe = placed(jax.eval_shape(lambda: optimizer.recipe_of(config, 2)), everywhere(mesh))
    with jax.set_mesh(mesh):
        if isinstance(config, RowsConfig):
            return [rows_program(config, model, mesh, state, recipe)]
        assert isinstance(config, GrpoConfig)
        return list(grpo_programs(config, model, mesh, state, recipe))


def rows_program(config: RowsConfig, model: ModelConfig, mesh: Mesh, state: TrainState, recipe: Any) -> Program:
    """The step of sft and pretrain."""
    count, rows = accumulation_steps(config.batch_size, config.micro_batch_size, row_shards(mesh)), config.batch_size
    batch = abstract_batch(Batch, (count, rows // count, config.sequence_length), mesh)
    has_noise = isinstance(config, SftConfig) and config.neftune_alpha > 0
    loss = optimizer.RowLoss(config.compute_dtype, config.rematerialisation, has_noise)
    arguments = state, batch, np.float32(1), recipe, model, loss, None, checkpoint.abstract_frozen(model, mesh)
    scope = f"{rows} rows in {count} micro-batch{'es' * (count > 1)}, and the optimizer"
    return compiled("step", scope, optimizer.train_step, *arguments, attention=attention_flops(config, model, rows))


def abstract_slots(config: GrpoConfig, model: ModelConfig, mesh: Mesh) -> Any:
    """The batch of the sampler, with the largest cache that a run comes to need."""
    count, pages = slot_count(config, mesh), math.ceil(config.sequence_length / PAGE)
    slots = jax.eval_shape(partial(sampler.empty_slots, model, count, pages, config.compute_dtype))
    slots = placed(slots, NamedSharding(mesh, PartitionSpec(ROW_AXES)))
    return slots._replace(cache=placed(slots.cache, NamedSharding(mesh, PartitionSpec(ROW_AXES, "tensor"))))


def grpo_programs(
    config: GrpoConfig, model: ModelConfig, mesh: Mesh, state: TrainState, recipe: Any
) -> Iterator[Program]:
    """Prefill, decoding and the update, each beside what the other two keep on the devices."""
    slots, pages = abstract_slots(config, model, mesh), math.ceil(config.sequence_length / PAGE)
    frozen = checkpoint.abstract_frozen(model, mesh)
    casting = sampler.cast_params.trace(joined(frozen, state.params, model), model, config.compute_dtype)
    params = placed(casting.out_info, casting.lower().compile().output_shardings)
    weights, generating = device_bytes(params), device_bytes((params, slots))
    policy = device_bytes(state.params) * jnp.dtype(config.compute_dtype).itemsize / 4  # a copy, as of the starting one
    training = device_bytes((state, frozen)) + policy * (config.kl_weight > 0)
    prompt = math.ceil((config.sequence_length - config.max_completion_tokens) / PAGE) * PAGE
    rows = sampler.slots_for(min(config.prompts_per_step, max(sampler.PREFILL_PAGES // pages, 1)), mesh)
    token = jax.ShapeDtypeStruct((rows, prompt), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(ROW_AXES)))
    beside = training + generating - weights
    yield compiled(
        "prefill", f"{rows} prompts of {prompt:,} tokens", sampler.fill_cache, params, token, model, beside=beside
    )
    count = len(slots.token)
    rules = sampler.stacked([sampler.rules_of(sampler.Request((0,)), 0, capacity=1)] * count)
    arguments = params, slots, rules, None, np.ones(count, bool), np.int32(1), np.int32(1), model
    scope = f"a token in each of {count:,} slots of {pages * PAGE:,}"
    yield compiled("decode", scope, sampler.decode_block, *arguments, beside=training)
    shape = update_shape(config, mesh)
    batch, loss = abstract_batch(RolloutBatch, shape, mesh), policy_loss(config)
    arguments = state, batch, None, recipe, model, loss, np.int32(1), frozen
    scope = f"one micro-batch of {shape[1]} row{'s' * (shape[1] > 1)}, of up to {shape[0]:,}, and the optimizer"
    beside = training - device_bytes((state, frozen)) + generating + policy * (config.updates_per_rollout > 1)
    attention = attention_flops(config, model, shape[1])
    yield compiled("update", scope, optimizer.train_step, *arguments, beside=beside, attention=attention)


# Their figures


def program_facts(program: Program, chip: Chip, device_count: int) -> dict[str, Any]:
    """A program's figures on a chip: bytes and FLOPs for each device, `seconds` the least that it can take."""
    try:
        text = program.compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10.2 can't read all that the compiler for v6e writes
        text = "ENTRY unread () {"
    computations = read_program(text)
    found, recomputed = collectives(computations, device_count), recomputed_flops(computations)
    flops, moved = program.flops / device_count + recomputed, moved_bytes(computations)
    seconds = {True: 0.0, False: 0.0}
    for each in found:
        seconds[each.is_overlapped] += each.bytes / reached_bandwidth(each, chip)
    compute, memory = flops / peak(chip), moved / chip.bandwidth
    stats = program.compiled.memory_analysis()
    return {
        "name": program.name, "scope": program.scope, "bytes": program.bytes,
        "argument_bytes": float(stats.argument_size_in_bytes), "temporary_bytes": float(stats.temp_size_in_bytes),
        "beside_bytes": program.beside, "flops": flops, "compiler_recomputed_flops": recomputed, "moved_bytes": moved,
        "collectives": [each._asdict() for each in found], "compute_seconds": compute, "memory_seconds": memory,
        "exposed_seconds": seconds[False], "overlapped_seconds": seconds[True],
        "seconds": max(compute, memory, seconds[True]) + seconds[False], "compile_seconds": program.compile_seconds,
    }  # fmt: skip


def reached_bandwidth(collective: Collective, chip: Chip) -> float:
    """Bytes a second at which each device of a group can send: between nodes the ring is spread over the network cards
    of all members in a node."""
    if collective.reach <= chip.per_node:
        return chip.link
    return min(chip.link, chip.network * max(collective.group * chip.per_node // collective.reach, 1))


def peak(chip: Chip) -> float:
    """Dense bfloat16 FLOP/s."""
    found = peak_flops(chip.kind)
    assert found
    return found


def step_facts(
    config: RowsConfig, model: ModelConfig, step: dict[str, Any], chip: Chip, count: int
) -> dict[str, float]:
    """The model FLOPs of a step of sft or pretrain, and how fast it can be."""
    width = model.kv_heads * model.group * model.head
    lengths = np.full(config.batch_size, config.sequence_length)
    counts = parameter_counts(model)
    flops = step_flops(counts["matmul"], counts["trained_matmul"], width, model.layers, lengths)
    return {
        "model_flops": flops,
        "recomputed_share": max(step["flops"] * count / flops - 1, 0.0),
        "tokens_per_second": config.batch_size * config.sequence_length / step["seconds"],
        "mfu": flops / (step["seconds"] * count * peak(chip)),
    }


def fits(programs: list[Program], chip: Chip) -> bool:
    """Whether each of the programs has room; there are none where a compiler found no room."""
    return 0 < max((program.bytes for program in programs), default=0) <= DEVICE_MEMORY_SHARE * chip.memory


# The command plan


def run_plan(config: TrainingConfig) -> None:
    """The command plan: compile what a run of the config would, and print and write what it takes.

    Raises:
        UserError: the topology, the model or the mesh can't be had.
    """
    assert isinstance(config, PlanKeys)
    if not Path(config.plan_file).parent.is_dir():
        raise UserError(f"plan_file = {config.plan_file}: no such directory; make it, or choose another")
    jax.config.update("jax_platforms", "cpu")
    topology = read_topology(config.topology)
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor, topology.devices)
    config = checkpoint.settled(config, topology.chip.platform)
    place = checkpoint.find_model(config, with_weights=False)
    grown = isinstance(config, VocabularyKeys) and config.new_tokens
    tokenizer = checkpoint.tokenizer_of(place, config) if grown else None
    model, attention = checkpoint.model_on(place, config, mesh, tokenizer)
    check_trainable(model, config.sequence_length)
    facts = setting_facts(config, model, topology, mesh) | {"attention": attention}
    print(*setting_lines(config, model, topology, facts), sep="\n", flush=True)
    with tracing_for(topology):
        try:
            programs, refusal = programs_of(config, model, mesh), ""
        except TooLarge as error:
            programs, refusal = [], f"DOES NOT FIT: {error}"
        facts["fits"] = fits(programs, topology.chip)
        facts["programs"] = [program_facts(each, topology.chip, mesh.size) for each in programs]
        for each in facts["programs"]:
            print(*program_lines(each), sep="\n")
        if isinstance(config, RowsConfig) and programs:
            facts |= step_facts(config, model, facts["programs"][0], topology.chip, mesh.size)
            print(step_line(config, facts))
        print(refusal or verdict(programs, topology.chip), flush=True)
        facts["advice"] = []
        for line in advice(config, model, topology, mesh, programs) if config.search else ():
            facts["advice"].append(line)
            print(line)
    Path(config.plan_file).write_text(json.dumps(facts, indent=1) + "\n")
    print(f"all of it: {config.plan_file}")


def setting_facts(config: TrainingConfig, model: ModelConfig, topology: Topology, mesh: Mesh) -> dict[str, Any]:
    """What is known before anything is compiled; bytes for each device."""
    state, cache, slots = optimizer.abstract_state(model, mesh), 0.0, 0
    if isinstance(config, GrpoConfig):
        cache, slots = device_bytes(abstract_slots(config, model, mesh).cache), slot_count(config, mesh)
    weights, frozen = device_bytes(state.params), device_bytes(checkpoint.abstract_frozen(model, mesh))
    return {
        "topology": topology.name, "devices": mesh.size, "mesh": dict(mesh.shape), "chip": topology.chip._asdict(),
        "model": config.model_name, "parameters": parameter_counts(model)["all"], "parameter_bytes": weights,
        "frozen_bytes": frozen, "optimizer_bytes": device_bytes(state) - weights, "gradient_bytes": weights,
        "cache_bytes": cache, "slots": slots,
    }  # fmt: skip


def setting_lines(
    config: TrainingConfig, model: ModelConfig, topology: Topology, facts: dict[str, Any]
) -> Iterator[str]:
    """What is printed before anything is compiled."""
    chip, count = topology.chip, facts["devices"]
    network = f", {byte_size(chip.network)}/s between nodes of {chip.per_node}" if count > chip.per_node else ""
    yield (
        f"{topology.name}: {count} × {chip.kind}, mesh "
        f"{' × '.join(f'{axis} {size}' for axis, size in facts['mesh'].items())}; published of each: "
        f"{byte_size(chip.memory)} at {byte_size(chip.bandwidth)}/s, {flop_size(peak(chip))}/s in bfloat16, "
        f"{byte_size(chip.link)}/s to others{network}"
    )
    yield (
        f"model: {config.model_name} ({model.family}), {facts['parameters']:,} parameters, compute in "
        f"{config.compute_dtype}"
    )
    yield facts["attention"]
    kind = "adapters" if model.is_adapter else "parameters"
    base = f"{byte_size(facts['frozen_bytes'])} of the frozen base, " if model.is_adapter else ""
    yield (
        f"a device's part of the state: {base}{byte_size(facts['parameter_bytes'])} of {kind}, "
        f"{byte_size(facts['optimizer_bytes'])} of optimizer; while they last, gradients take "
        f"{byte_size(facts['gradient_bytes'])} of the temporaries"
    )
    if isinstance(config, GrpoConfig):
        yield f"its part of the cache: {byte_size(facts['cache_bytes'])} for {facts['slots']:,} completions at once"


def program_lines(facts: dict[str, Any]) -> Iterator[str]:
    """What is printed of a program."""
    beside = f", {byte_size(facts['beside_bytes'])} beside it" if facts["beside_bytes"] else ""
    yield (
        f"{facts['name']}: {byte_size(facts['bytes'])} ({byte_size(facts['argument_bytes'])} of arguments, "
        f"{byte_size(facts['temporary_bytes'])} of temporaries{beside}); compiled in {facts['compile_seconds']:.1f} s"
    )
    yield (
        f"  {facts['scope']}: compute {facts['compute_seconds']:.3g} s ({flop_size(facts['flops'])}), memory "
        f"{facts['memory_seconds']:.3g} s ({byte_size(facts['moved_bytes'])} moved)"
    )
    if facts["compiler_recomputed_flops"]:
        yield f"  of it {flop_size(facts['compiler_recomputed_flops'])} recomputed by XLA's own choice, to save memory"
    if not facts["moved_bytes"]:
        yield "  its text can't be read: bytes moved and sent are not known, the least time is that of its FLOPs"
    for each in facts["collectives"]:
        beside = "beside computation" if each["is_overlapped"] else "waited for"
        yield f"  {each['count']} × {each['kind']} among {each['group']}: {byte_size(each['bytes'])} a device, {beside}"


def step_line(config: RowsConfig, facts: dict[str, Any]) -> str:
    """How fast a step of sft or pretrain can be."""
    rated = "" if config.compute_dtype == "bfloat16" else " of bfloat16; float32 takes several times as long"
    return (
        f"a step of {config.batch_size} rows × {config.sequence_length} tokens, each row one document: model "
        f"{flop_size(facts['model_flops'])}, {percent(facts['recomputed_share'])} more in the program; no faster than "
        f"{facts['programs'][0]['seconds']:.3g} s, which is {short(facts['tokens_per_second'])} tokens/s and "
        f"{percent(facts['mfu'])} MFU (an estimate from published figures{rated})"
    )


def verdict(programs: list[Program], chip: Chip) -> str:
    """Whether a run fits."""
    most = max(programs, key=lambda each: each.bytes)
    room = f"of the {byte_size(DEVICE_MEMORY_SHARE * chip.memory)} that programs can have of {byte_size(chip.memory)}"
    return f"{'fits' if fits(programs, chip) else 'DOES NOT FIT'}: {most.name} needs {byte_size(most.bytes)} {room}"


# What would fit


def advice(
    config: TrainingConfig, model: ModelConfig, topology: Topology, mesh: Mesh, programs: list[Program]
) -> Iterator[str]:
    """The largest micro-batch that fits, or the cheapest change after which the run does."""
    chip, sizes = topology.chip, micro_batch_sizes(config, mesh)

    def needed(**changes: Any) -> list[Program]:
        try:
            return programs_of(config.model_copy(update=changes), model, mesh)
        except TooLarge:
            return []

    if fits(programs, chip):
        largest = config.micro_batch_size
        for size in (size for size in sizes if size > config.micro_batch_size):
            if not fits(needed(micro_batch_size=size), chip):
                yield f"largest micro_batch_size that fits: {largest} ({size} does not)"
                return
            largest = size
        yield f"largest micro_batch_size that fits: {largest}, the largest that divides the batch"
        return
    for change in cheapest_first(config, mesh):
        smaller = [size for size in sizes if size < config.micro_batch_size + bool(change)]
        if smaller and fits(needed(**change, micro_batch_size=smaller[0]), chip):
            for size in reversed(smaller):
                if fits(found := needed(**change, micro_batch_size=size), chip):
                    changed = config.model_copy(update=change | {"micro_batch_size": size})
                    line = ", ".join(f"{key} = {getattr(changed, key)}" for key in ("micro_batch_size", *change))
                    more = flops_per_row(changed, found) / flops_per_row(config, programs) - 1 if programs else 0.0
                    line += f", which computes {percent(more)} more" if more > 0.005 else ""
                    line += ", whose decoding reads the weights once for fewer tokens" if "slots" in change else ""
                    yield f"it fits with {line}"
                    return
    yield f"nothing that plan tries makes it fit on {topology.name}; try more devices, or a smaller model"


def cheapest_first(config: TrainingConfig, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """The changes that are tried, each with every smaller micro-batch, which makes no more work."""
    kinds = [kind for kind, _ in SAVINGS]
    for kind, divisor in SAVINGS[kinds.index(config.rematerialisation) :]:
        change = {"rematerialisation": kind} if kind != config.rematerialisation else {}
        if divisor == 1:
            yield change
        elif isinstance(config, GrpoConfig) and slot_count(config, mesh) >= divisor:
            yield change | {"slots": slot_count(config, mesh) // divisor}


def flops_per_row(config: TrainingConfig, programs: list[Program]) -> float:
    """FLOPs of a row of the step, or of the update, whose program is counted for one micro-batch."""
    rows = config.batch_size if isinstance(config, RowsConfig) else config.micro_batch_size
    return programs[-1].flops / rows


def micro_batch_sizes(config: TrainingConfig, mesh: Mesh) -> list[int]:
    """The sizes of a micro-batch that are tried, smallest first."""
    powers = [2**power for power in range(MOST_ROWS.bit_length())]
    if not isinstance(config, RowsConfig):
        return powers
    return [size for size in powers if config.batch_size // row_shards(mesh) % size == 0]
