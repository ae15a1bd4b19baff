"""What a run will take on accelerators that are not here: its programs, compiled for them from shapes alone.

Memory is what the compiler says; times are bounds from the published figures of the chips, not measurements.
"""

import json
import math
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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

from lacuna import checkpoint, trainer
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
    accumulation_steps,
)
from lacuna.data import Batch
from lacuna.distributed import ROW_AXES, make_mesh, row_shards
from lacuna.grpo import INTEGERS, RolloutBatch, policy_loss
from lacuna.metrics import byte_size, flop_size, peak_flops, percent, short, step_flops
from lacuna.model import PAGE, ModelConfig, check_sequence_length, parameter_counts
from lacuna.sampler import (
    PREFILL_PAGES,
    Request,
    cast_params,
    decode_block,
    empty_slots,
    fill_cache,
    rules_of,
    slots_for,
    stacked,
)
from lacuna.trainer import TrainState

MOST_ROWS = 64  # the largest micro-batch that is tried
# what saves memory, from the cheapest: rematerialisation, and of the completions generated at once 1 / that many
SAVINGS = (("none", 1), ("matmuls", 1), ("matmuls", 2), ("layer", 1), ("layer", 2), ("layer", 4))
KERNEL = re.compile(r'custom_call_target="([^"]*(?:fmha|tpu_custom_call|flash|splash)[^"]*)"')


class Chip(NamedTuple):
    """Published figures of a device: memory in bytes, bandwidths in bytes a second, of links in one direction."""

    platform: str
    kind: str
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int


CHIPS = {
    # NVIDIA data sheets, SXM: half of NVLink's two-way bandwidth; DGX: one network card a GPU (400 Gb/s, A100 200); the
    # RTX 4090 talks over PCIe 4, about half of whose 32 GB/s are seen in practice
    "a100": Chip("cuda", "NVIDIA A100-SXM4-80GB", 80 * 2**30, 2.039e12, 300e9, 25e9, 8),
    "h100": Chip("cuda", "NVIDIA H100 80GB HBM3", 80 * 2**30, 3.35e12, 450e9, 50e9, 8),
    "h200": Chip("cuda", "NVIDIA H200", 140 * 2**30, 4.8e12, 450e9, 50e9, 8),
    "rtx4090": Chip("cuda", "NVIDIA GeForce RTX 4090", 24 * 2**30, 1.008e12, 16e9, 16e9, 8),
    # Google Cloud documentation, of each chip: interconnect 2400, 1600, 4800 and 3584 Gb/s over all its links
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
    "a100": {"cores": 108, "major": 8, "shared": 167936, "block": 166912, "cache": 41943040, "clock": 1.41},
    "h100": {"cores": 132, "major": 9, "shared": 233472, "block": 232448, "cache": 52428800, "clock": 1.98},
    "h200": {"cores": 132, "major": 9, "shared": 233472, "block": 232448, "cache": 52428800, "clock": 1.98},
    "rtx4090": {"cores": 128, "major": 8, "shared": 102400, "block": 101376, "cache": 75497472, "clock": 2.52},
}
MINOR = {"rtx4090": 9}  # of the compute capability
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
    """Devices that a compiler knows of, whether or not they are there."""

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
        figures = GPU_TARGETS[kind] | {"minor": MINOR.get(kind, 0), "fpus": 64 if kind == "a100" else 128}
        target = GPU_TARGET.format(**figures, kind=chip.kind, memory=chip.memory, bandwidth=chip.bandwidth)
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
    except Exception as error:  # each plugin fails in its own way, most of them where it is missing
        extra, packages = ("cuda", GPU_PLUGINS) if chip.platform == "cuda" else ("tpu", ("libtpu",))
        is_there = any(find_spec(package) for package in packages)
        mend = "mend that" if is_there else f"start it as uv run --extra {extra} plan"
        why = " ".join(str(error).split())[:200]
        raise UserError(f"topology {name!r}: its compiler can't be used ({why}); {mend}") from error
    return Topology(name, chip, list(devices))


@contextmanager
def heard_of(topology: Topology) -> Generator[None]:
    """jax's cuDNN functions, asking for the GPU that is here while they are traced, hear of the planned one."""
    if topology.chip.platform != "cuda":
        yield
        return
    kind = topology.name.lower().partition(":")[0]
    capability = GPU_TARGETS[kind]["major"] + MINOR.get(kind, 0) / 10
    answers = {
        "check_compute_capability": lambda least: float(least) <= capability,
        "is_cuda_compute_capability_equal": lambda exact: float(exact) == capability,
    }
    before = {name: getattr(fused_attention, name) for name in answers}
    for name, answer in answers.items():
        setattr(fused_attention, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(fused_attention, name, function)


# Programs


class TooLarge(Exception):
    """A compiler found no room for a program."""


class Program(NamedTuple):
    """A compiled program and what else a device holds while it runs (bytes), besides its arguments."""

    name: str
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
    """Shapes with where they lie; one sharding serves for all leaves, or a tree gives each its own."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def compiled(name: str, function: Any, *arguments: Any, beside: float = 0.0, attention: float | None = None) -> Program:
    """A jitted function for arguments given as shapes; `attention` are the FLOPs of attention, if that is done in
    kernels or loops, whose FLOPs no program tells."""
    began = time.perf_counter()
    traced = function.trace(*arguments)
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:  # those of TPUs refuse what has no room
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(f"{name}: {str(error).splitlines()[0]}") from error
    counted = matmul_flops(traced.jaxpr.jaxpr, rounds=1 if attention is None else 0)
    return Program(name, program, counted + (attention or 0.0), time.perf_counter() - began, beside)


def attention_flops(config: TrainingConfig, model: ModelConfig, row_count: int) -> float:
    """FLOPs of attention, forward and backward, over rows of one document each: two matrix products forward, five
    backward, as the scores are made again, and the forward ones once more where layers are recomputed."""
    width = model.kv_heads * model.group * model.head
    counted = step_flops(0, width, model.layers, np.full(row_count, config.sequence_length))
    return counted * (9 if config.rematerialisation == "layer" else 7) / 6


def programs_of(config: TrainingConfig, model: ModelConfig, mesh: Mesh) -> list[Program]:
    """The programs that a run of this page spends its time in."""
    state = trainer.abstract_state(model, mesh)
    recipe = placed(jax.eval_shape(lambda: trainer.recipe_of(config, 2)), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        if isinstance(config, RowsConfig):
            return [rows_program(config, model, mesh, state, recipe)]
        assert isinstance(config, GrpoConfig)
        return list(grpo_programs(config, model, mesh, state, recipe))


def rows_program(config: RowsConfig, model: ModelConfig, mesh: Mesh, state: TrainState, recipe: Any) -> Program:
    """The step of sft and pretrain."""
    shards = row_shards(mesh)
    shape = (accumulation_steps(config.batch_size, config.micro_batch_size, shards), config.micro_batch_size * shards,
             config.sequence_length)  # fmt: skip
    rows = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))
    batch: Any = [jax.ShapeDtypeStruct(shape, kind_of(name), sharding=rows) for name in Batch._fields]
    loss = trainer.RowLoss(config.rematerialisation, isinstance(config, SftConfig) and config.neftune_alpha > 0)
    arguments = state, Batch(*batch), np.float32(1), recipe, model, config.compute_dtype, loss
    attention = attention_flops(config, model, config.batch_size)
    return compiled("step", trainer.train_step, *arguments, attention=attention)


def kind_of(name: str) -> Any:
    return jnp.int32 if name in INTEGERS else jnp.float32


def abstract_slots(config: GrpoConfig, model: ModelConfig, mesh: Mesh) -> Any:
    """The batch of the sampler, with the largest cache that a run comes to need."""
    count, pages = slots_for(planned_slots(config), mesh), math.ceil(config.sequence_length / PAGE)
    slots = jax.eval_shape(partial(empty_slots, model, count, pages, config.compute_dtype))
    slots = placed(slots, NamedSharding(mesh, PartitionSpec(ROW_AXES)))
    return slots._replace(cache=placed(slots.cache, NamedSharding(mesh, PartitionSpec(ROW_AXES, "tensor"))))


def grpo_programs(
    config: GrpoConfig, model: ModelConfig, mesh: Mesh, state: TrainState, recipe: Any
) -> Iterator[Program]:
    """Prefill, decoding, the gradient of a micro-batch and the optimizer's step, which share the devices' memory."""
    shards = row_shards(mesh)
    rows, first = NamedSharding(mesh, PartitionSpec(ROW_AXES)), NamedSharding(mesh, PartitionSpec())
    slots, pages = abstract_slots(config, model, mesh), -(-config.sequence_length // PAGE)
    count = len(slots.token)
    casting = cast_params.trace(state.params, model, config.compute_dtype)
    params = placed(casting.out_info, casting.lower().compile().output_shardings)
    rules = stacked([rules_of(Request((0,)), 0, capacity=1)] * count)
    rules = placed(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, rules)), first)
    flags = jax.ShapeDtypeStruct((count,), jnp.bool_, sharding=first)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=first)
    trained, generating = device_bytes(state), device_bytes((params, slots))
    longest = -(-(config.sequence_length - config.max_completion_tokens) // PAGE) * PAGE
    most = min(config.prompts_per_step, max(PREFILL_PAGES // pages, 1))
    prompts = jax.ShapeDtypeStruct((slots_for(most, mesh), longest), jnp.int32, sharding=rows)
    yield compiled("prefill", fill_cache, params, prompts, model, beside=trained + device_bytes(slots))
    yield compiled("decode", decode_block, params, slots, rules, None, flags, number, number, model, beside=trained)
    rows_at_once = config.micro_batch_size * shards
    shape = 2, rows_at_once, config.sequence_length
    sharding = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))
    batch: Any = [jax.ShapeDtypeStruct(shape, kind_of(name), sharding=sharding) for name in RolloutBatch._fields]
    attention, beside = attention_flops(config, model, rows_at_once), generating
    arguments = state, RolloutBatch(*batch), np.float32(1), recipe, model, config.compute_dtype, policy_loss(config)
    yield compiled("update", trainer.train_step, *arguments, number, beside=beside, attention=attention)


# What is told of them


@dataclass(frozen=True)
class ProgramPlan:
    """Figures of a program, bytes and FLOPs for each device; `seconds` is the least that it can take."""

    name: str
    bytes: float
    argument_bytes: float
    temporary_bytes: float
    beside_bytes: float
    flops: float
    compiler_recomputed_flops: float
    moved_bytes: float
    collectives: list[Collective]
    compute_seconds: float
    memory_seconds: float
    exposed_seconds: float
    overlapped_seconds: float
    seconds: float
    kernels: list[str]
    compile_seconds: float


def program_plan(program: Program, chip: Chip, device_count: int) -> ProgramPlan:
    """A program's figures on a chip."""
    try:
        text = program.compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10.2 can't read all that the compiler for v6e writes
        text = "ENTRY unread () {"
    computations = read_program(text)
    talk = collectives(computations, device_count)
    again = recomputed_flops(computations)
    flops, moved = program.flops / device_count + again, moved_bytes(computations)
    seconds = {True: 0.0, False: 0.0}
    for each in talk:
        seconds[each.is_overlapped] += each.bytes / reached_bandwidth(each, chip)
    compute, memory = flops / peak(chip), moved / chip.bandwidth
    stats = program.compiled.memory_analysis()
    return ProgramPlan(
        name=program.name,
        bytes=program.bytes,
        argument_bytes=float(stats.argument_size_in_bytes),
        temporary_bytes=float(stats.temp_size_in_bytes),
        beside_bytes=program.beside,
        flops=flops,
        compiler_recomputed_flops=again,
        moved_bytes=moved,
        collectives=talk,
        compute_seconds=compute,
        memory_seconds=memory,
        exposed_seconds=seconds[False],
        overlapped_seconds=seconds[True],
        seconds=max(compute, memory, seconds[True]) + seconds[False],
        kernels=sorted(set(KERNEL.findall(text))),
        compile_seconds=program.compile_seconds,
    )


def reached_bandwidth(talk: Collective, chip: Chip) -> float:
    """Bytes a second at which each device of a group can send: between nodes the ring is spread over the network cards
    of all members in a node."""
    if talk.reach <= chip.per_node:
        return chip.link
    return min(chip.link, chip.network * max(talk.group * chip.per_node // talk.reach, 1))


def peak(chip: Chip) -> float:
    """Dense bfloat16 FLOP/s."""
    found = peak_flops(chip.kind)
    assert found
    return found


def fits(programs: list[Program], chip: Chip) -> bool:
    """Whether each of the programs has room; there are none where a compiler found no room."""
    return 0 < max((program.bytes for program in programs), default=0) <= DEVICE_MEMORY_SHARE * chip.memory


def run_plan(config: TrainingConfig) -> None:
    """The command plan: compile what a page's run would, and print and write down what it takes.

    Raises:
        UserError: the topology, the model or the mesh is not to be had.
    """
    assert isinstance(config, PlanKeys)
    if not Path(config.plan_file).parent.is_dir():
        raise UserError(f"plan_file = {config.plan_file}: no such directory; make it, or choose another")
    jax.config.update("jax_platforms", "cpu")
    topology = read_topology(config.topology)
    with heard_of(topology):
        report_plan(config, topology)


def report_plan(config: TrainingConfig, topology: Topology) -> None:
    """Print and write down what a run of the page takes on these devices."""
    assert isinstance(config, PlanKeys)
    chip, source = topology.chip, checkpoint.resolve_model(config.model_name, with_weights=False)
    mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor, topology.devices)
    model, attention = checkpoint.model_on(source, config, mesh)
    check_sequence_length(model, config.sequence_length)
    count, state = mesh.size, trainer.abstract_state(model, mesh)
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(
        f"{topology.name}: {count} × {chip.kind}, mesh {shape}; published of each: {byte_size(chip.memory)} at "
        f"{byte_size(chip.bandwidth)}/s, {flop_size(peak(chip))}/s in bfloat16, {byte_size(chip.link)}/s to others"
        + (f", {byte_size(chip.network)}/s between nodes of {chip.per_node}" if count > chip.per_node else "")
    )
    counts = parameter_counts(model)
    print(
        f"model: {config.model_name} ({model.family}), {counts['all']:,} parameters, compute in {config.compute_dtype}"
    )
    print(attention)
    refusal = ""
    try:
        programs = programs_of(config, model, mesh)
    except TooLarge as error:
        programs, refusal = [], f"DOES NOT FIT: {error}"
    plans = [program_plan(each, chip, count) for each in programs]
    weight_bytes, state_bytes = device_bytes(state.params), device_bytes(state)
    print(
        f"a device's part of the state: {byte_size(weight_bytes)} of parameters, "
        f"{byte_size(state_bytes - weight_bytes)} of optimizer; while they last, gradients take "
        f"{byte_size(weight_bytes)} of the temporaries"
    )
    cache_bytes = 0.0
    if isinstance(config, GrpoConfig):
        cache_bytes = device_bytes(abstract_slots(config, model, mesh).cache)
        print(f"its part of the cache: {byte_size(cache_bytes)} for {planned_slots(config):,} completions at once")
    for each in plans:
        print("\n".join(program_lines(each, chip)))
    facts: dict[str, Any] = {
        "topology": topology.name, "devices": count, "mesh": dict(mesh.shape), "chip": chip._asdict(),
        "model": config.model_name, "parameters": counts["all"], "parameter_bytes": weight_bytes,
        "optimizer_bytes": state_bytes - weight_bytes, "gradient_bytes": weight_bytes, "cache_bytes": cache_bytes,
        "attention": attention, "fits": fits(programs, chip),
        "programs": [asdict(each) | {"collectives": [talk._asdict() for talk in each.collectives]} for each in plans],
    }  # fmt: skip
    if isinstance(config, RowsConfig) and plans:
        facts |= step_facts(config, model, plans[0], chip, count)
        rated = "" if config.compute_dtype == "bfloat16" else " of bfloat16; float32 takes several times as long"
        print(
            f"a step of {config.batch_size} rows × {config.sequence_length} tokens, each row one document: model "
            f"{flop_size(facts['model_flops'])}, {percent(facts['recomputed_share'])} more in the program; no faster "
            f"than {plans[0].seconds:.3g} s, which is {short(facts['tokens_per_second'])} tokens/s and "
            f"{percent(facts['mfu'])} MFU (an estimate from published figures{rated})"
        )
    print(refusal or verdict(programs, chip))
    facts["advice"] = []
    for line in advice(config, model, topology, programs) if config.search else ():
        facts["advice"].append(line)
        print(line)
    Path(config.plan_file).write_text(json.dumps(facts, indent=1) + "\n")
    print(f"all of it: {config.plan_file}")


def program_lines(plan: ProgramPlan, chip: Chip) -> Iterator[str]:
    """What is printed of a program."""
    beside = f", {byte_size(plan.beside_bytes)} beside it" if plan.beside_bytes else ""
    yield (
        f"{plan.name}: {byte_size(plan.bytes)} ({byte_size(plan.argument_bytes)} of arguments, "
        f"{byte_size(plan.temporary_bytes)} of temporaries{beside}); compiled in {plan.compile_seconds:.1f} s"
    )
    yield (
        f"  compute {plan.compute_seconds:.3g} s ({flop_size(plan.flops)}), memory {plan.memory_seconds:.3g} s "
        f"({byte_size(plan.moved_bytes)} moved), kernels called by name: {', '.join(plan.kernels) or 'none'}"
    )
    if plan.compiler_recomputed_flops:
        yield f"  of it {flop_size(plan.compiler_recomputed_flops)} again by XLA's own choice, for want of memory"
    if not plan.moved_bytes:
        yield "  its text can't be read: bytes moved and sent are not known, the least time is that of its FLOPs"
    for each in plan.collectives:
        beside = "beside computation" if each.is_overlapped else "waited for"
        yield f"  {each.count} × {each.kind} among {each.group}: {byte_size(each.bytes)} a device, {beside}"


def step_facts(config: RowsConfig, model: ModelConfig, plan: ProgramPlan, chip: Chip, count: int) -> dict[str, float]:
    """What a step costs and how fast it can be."""
    tokens = config.batch_size * config.sequence_length
    width = model.kv_heads * model.group * model.head
    lengths = np.full(config.batch_size, config.sequence_length)
    flops = step_flops(parameter_counts(model)["matmul"], width, model.layers, lengths)
    return {
        "model_flops": flops,
        "recomputed_share": max(plan.flops * count / flops - 1, 0.0),
        "tokens_per_second": tokens / plan.seconds,
        "mfu": flops / (plan.seconds * count * peak(chip)),
    }


def verdict(programs: list[Program], chip: Chip) -> str:
    """Whether a run fits."""
    most = max(programs, key=lambda each: each.bytes)
    room = f"of the {byte_size(DEVICE_MEMORY_SHARE * chip.memory)} that programs can have of {byte_size(chip.memory)}"
    return f"{'fits' if fits(programs, chip) else 'DOES NOT FIT'}: {most.name} needs {byte_size(most.bytes)} {room}"


def advice(config: TrainingConfig, model: ModelConfig, topology: Topology, programs: list[Program]) -> Iterator[str]:
    """The largest micro-batch that fits, or the cheapest change after which the run does."""
    chip, mesh = topology.chip, make_mesh(config.data_parallel, config.fsdp, config.tensor, topology.devices)

    def needed(**changes: Any) -> list[Program]:
        try:
            return programs_of(config.model_copy(update=changes), model, mesh)
        except TooLarge:
            return []

    sizes = sizes_of(config, mesh)
    if fits(programs, chip):
        largest = config.micro_batch_size
        for size in (size for size in sizes if size > config.micro_batch_size):
            if not fits(needed(micro_batch_size=size), chip):
                yield f"largest micro_batch_size that fits: {largest} ({size} does not)"
                return
            largest = size
        yield f"largest micro_batch_size that fits: {largest}, the largest that divides the batch"
        return
    for change in cheapest_first(config):
        smaller = [size for size in sizes if size < config.micro_batch_size + bool(change)]
        if smaller and fits(needed(**change, micro_batch_size=smaller[0]), chip):
            for size in reversed(smaller):
                if fits(found := needed(**change, micro_batch_size=size), chip):
                    changed = config.model_copy(update=change | {"micro_batch_size": size})
                    told = ", ".join(f"{key} = {getattr(changed, key)}" for key in ("micro_batch_size", *change))
                    more = work(changed, found) / work(config, programs) - 1 if programs else 0.0
                    told += f", which computes {percent(more)} more" if more > 0.005 else ""
                    told += ", whose decoding reads the weights once for fewer tokens" if "slots" in change else ""
                    yield f"it fits with {told}"
                    return
    yield f"nothing that plan tries makes it fit on {topology.name}; try more devices, or a smaller model"


def cheapest_first(config: TrainingConfig) -> Iterator[dict[str, Any]]:
    """What can be changed besides the micro-batch, which goes with each of them; a smaller one makes no more work."""
    kinds = [kind for kind, _ in SAVINGS]
    for kind, parts in SAVINGS[kinds.index(config.rematerialisation) :]:
        change = {"rematerialisation": kind} if kind != config.rematerialisation else {}
        if parts == 1:
            yield change
        elif isinstance(config, GrpoConfig) and planned_slots(config) >= parts:
            yield change | {"slots": planned_slots(config) // parts}


def planned_slots(config: GrpoConfig) -> int:
    """Completions that are generated at once."""
    return min(config.slots, config.prompts_per_step * config.completions_per_prompt)


def work(config: TrainingConfig, programs: list[Program]) -> float:
    """FLOPs of a step, or of a row of grpo's update."""
    flops = {each.name: each.flops for each in programs}
    return flops["step"] if "step" in flops else flops["update"] / config.micro_batch_size


def sizes_of(config: TrainingConfig, mesh: Mesh) -> list[int]:
    """Micro-batches that a page could have, smallest first."""
    most = config.batch_size // row_shards(mesh) if isinstance(config, RowsConfig) else MOST_ROWS
    powers = [2**power for power in range(MOST_ROWS.bit_length()) if 2**power <= min(most, MOST_ROWS)]
    return [size for size in powers if not isinstance(config, RowsConfig) or most % size == 0]
