"""What a compiled program does: bytes moved and collectives from XLA's text, FLOPs from its jaxpr."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

ENTRY = "ENTRY"
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "iota",
}  # fmt: skip
IN_PLACE = ("dynamic-update-slice", "scatter")
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\]")
ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^{}]*S\([1-9]\d*\)\}")  # a TPU's own memories beside its large one
CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line of a computation: the name, kind and shape of its result, its operands, and the rest of the line."""

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> float:
        return shape_bytes(self.shape)

    @property
    def stored_bytes(self) -> float:
        """The part of its result in the device's large memory."""
        return shape_bytes(ON_CHIP.sub("", self.shape))

    @property
    def is_communication(self) -> bool:
        return self.kind.startswith(COLLECTIVES) and not self.kind.endswith("-done")

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = BRANCHES.search(self.text)
        return CALLED.findall(self.text) + (re.findall(r"[\w.-]+", branches[1]) if branches else [])


Computation = dict[str, Instruction]  # by name, in the order in which they run
Computations = dict[str, Computation]


class Collective(NamedTuple):
    """A kind of communication in one program run: how often, bytes that each device sends in all of them, how many
    devices a group has, among how many neighbours they lie, and whether it runs beside computation."""

    kind: str
    group: int
    reach: int
    is_overlapped: bool
    count: int
    bytes: float


def arrays(shape: str) -> list[tuple[float, list[int]]]:
    """The bytes per element and the sizes of each array in XLA's notation, whose type names contain their bits."""
    found = []
    for dtype, sizes in ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        found.append((int(bits[0]) / 8 if bits else 1.0, [int(size) for size in sizes.split(",") if size]))
    return found


def shape_bytes(shape: str) -> float:
    """Bytes of an array, or of a tuple's arrays."""
    return sum((width * math.prod(sizes) for width, sizes in arrays(shape)), 0.0)


def read_program(text: str) -> Computations:
    """The computations of a compiled program's text, the one it begins with under ENTRY."""
    computations: Computations = {}
    current: Computation = {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations[ENTRY if header[1] else header[2]] = {}
        elif found := INSTRUCTION.match(line):
            name, shape, kind, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.-]+)", rest.partition("), ")[0]))
            current[name] = Instruction(name, kind, shape, operands, rest)
    return computations


def runs_of(computations: Computations) -> dict[str, int]:
    """How often each computation runs, apart from the inside of fusions. Of branches only the one that writes least
    counts: the others run where a kernel has no room, or a request asks for more."""
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for each in computations[name].values():
            if each.kind == "while":
                visit(each.called[0], times * trips(each, computations))
            elif each.kind == "conditional":
                visit(min(each.called, key=lambda branch: sum(x.bytes for x in computations[branch].values())), times)
            elif each.kind in ("call", "async-start"):
                for called in each.called:
                    visit(called, times)

    visit(ENTRY, 1)
    return counts


def trips(loop: Instruction, computations: Computations) -> int:
    """How often a loop runs: as XLA says, else the largest number in its condition, else once."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.text)
    assert condition
    inside = computations[condition[1]].values()
    written = (each.text.partition(")")[0] for each in inside if each.kind == "constant")
    return max((int(number) for number in written if number.isdecimal()), default=1)


def computations_in(instruction: Instruction, computations: Computations) -> list[Computation]:
    """The computations inside an instruction."""
    return [computations[name] for name in instruction.called if name in computations]


def moved_bytes(computations: Computations) -> float:
    """Bytes that one run reads from and writes to the device's memory: operands and results of each fusion, of slices
    only the part that is read or written."""
    total = 0.0
    for name, times in runs_of(computations).items():
        here = computations[name]
        for each in here.values():
            if each.kind in MOVES_NOTHING or each.kind.endswith("-done"):
                continue
            if each.kind == "fusion":
                total += times * fusion_bytes(each, computations_in(each, computations)[0])
            elif each.kind in ("dynamic-slice", "gather", "slice"):
                total += times * 2 * each.stored_bytes
            elif each.kind in IN_PLACE:
                total += times * 2 * size_of(each.operands[1:], here)
            elif each.kind.endswith("-start") and each.shape.startswith("("):  # the result contains the operands
                total += times * each.stored_bytes
            else:
                total += times * (each.stored_bytes + size_of(each.operands, here))
    return total


def size_of(names: tuple[str, ...], here: Computation) -> float:
    return sum(here[name].stored_bytes for name in names if name in here)


def fusion_bytes(fusion: Instruction, inside: Computation) -> float:
    """Bytes that a fusion reads and writes."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    same = {each.name: each.name for each in inside.values()}  # by the name of a bitcast: what it is of
    for each in inside.values():
        if each.kind == "bitcast":
            same[each.name] = same[each.operands[0]]
            continue
        for operand in each.operands:
            users[same[operand]].append(each)
    updates = [each for each in inside.values() if each.kind in IN_PLACE]
    in_place = {same[each.operands[0]] for each in updates}
    written = fusion.stored_bytes - sum(each.stored_bytes - 2 * size_of(each.operands[1:], inside) for each in updates)
    written -= sum(each.stored_bytes for each in inside.values() if each.is_communication)
    read = 0.0
    for each in inside.values():
        if each.kind != "parameter" or each.name in in_place:
            continue
        uses = users[each.name]
        if uses and all(use.kind == "tuple" for use in uses):  # it is passed on as it came
            written -= each.stored_bytes
            continue
        is_sliced = uses and all(
            use.kind in ("dynamic-slice", "gather") and same[use.operands[0]] == each.name for use in uses
        )
        read += sum(use.stored_bytes for use in uses) if is_sliced else each.stored_bytes
    return max(written, 0) + read


def recomputed_flops(computations: Computations) -> float:
    """FLOPs of the matrix products that the compiler repeats by itself where its memory limit is met: it names the
    repetitions after the first, with `.remat` appended."""
    total = 0.0
    for name, times in runs_of(computations).items():
        copies: dict[str, list[float]] = defaultdict(list)
        for each in computations[name].values():
            inside = computations_in(each, computations) if each.kind == "fusion" else [{each.name: each}]
            here = computations[name] if each.kind != "fusion" else {}
            flops = (dot_flops(x, here | part) for part in inside for x in part.values() if x.kind == "dot")
            copies[each.name.partition(".remat")[0]].append(sum(flops))
        total += times * sum(sum(flops) - max(flops) for flops in copies.values())
    return total


def dot_flops(dot: Instruction, here: Computation) -> float:
    """FLOPs of a matrix product."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.text)
    assert contracted
    sizes = arrays(here[dot.operands[0]].shape)[0][1]
    depth = math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis)
    return 2.0 * depth * math.prod(arrays(dot.shape)[0][1])


def collectives(computations: Computations, device_count: int) -> list[Collective]:
    """The communication of one run."""
    found: dict[tuple[str, int, int, bool], list[float]] = defaultdict(lambda: [0, 0.0])
    for each, times, is_overlapped in communicating(computations):
        kind = next(kind for kind in COLLECTIVES if each.kind.startswith(kind))
        group = first_group(each.text, device_count)
        if len(group) > 1:
            here = found[kind, len(group), max(group) - min(group) + 1, is_overlapped]
            here[0] += times
            here[1] += times * sent_bytes(kind, each, len(group))
    return [Collective(*key, int(count), size) for key, (count, size) in sorted(found.items())]


def communicating(computations: Computations) -> Iterator[tuple[Instruction, int, bool]]:
    """Each collective, those inside fusions too, how often it runs, and whether work is done before it is awaited."""
    fused: set[str] = set()  # a TPU spreads one collective over several fusions, from its start to its end
    for name, times in runs_of(computations).items():
        order = list(computations[name].values())
        for place, each in enumerate(order):
            if each.is_communication:
                yield each, times, each.kind.endswith("-start") and is_beside_work(order[place:], computations)
            elif each.kind in ("fusion", "custom-call"):
                for inner in (inner for part in computations_in(each, computations) for inner in part.values()):
                    channel = re.search(r"channel_id=\d+|$", inner.text)
                    assert channel
                    if inner.is_communication and channel[0] not in fused:
                        fused.add(channel[0] or inner.name)
                        yield inner, times, True


def is_beside_work(order: list[Instruction], computations: Computations) -> bool:
    """Whether a matrix product, a kernel or a loop runs between the first instruction, which starts a collective, and
    the one that awaits it."""
    work = ("dot", "convolution", "while", "conditional")
    for each in order[1:]:
        if order[0].name in each.operands:
            return False
        inside = [inner for part in computations_in(each, computations) for inner in part.values()]
        is_kernel = each.kind == "custom-call" and not re.search(r'target="(AllocateBuffer|ConcatBitcast)"', each.text)
        if is_kernel or any(part.kind in work for part in (each, *inside)):
            return True
    return False


def first_group(text: str, device_count: int) -> list[int]:
    """The devices of a collective's first group, by their place in the mesh; the other groups are alike."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(device) for device in listed[1].split(",")]
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return in_order(counted[2], counted[3]).ravel()[: int(counted[1])].tolist()
    ordered = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]" + ordered + r" ?\{([^}]*)\}", text):
        axes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[4])
        devices = in_order(named[2] or str(math.prod(axes.values())), named[3]).reshape(tuple(axes.values()))
        return devices[tuple(slice(None) if axis in inside else 0 for axis in axes)].ravel().tolist()
    return list(range(device_count))


def in_order(sizes: str, order: str | None) -> np.ndarray:
    """Devices by their number, in the shape of these sizes, its axes in this order."""
    shape = [int(size) for size in sizes.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)


def sent_bytes(kind: str, instruction: Instruction, group: int) -> float:
    """Bytes that each device sends in one collective, around a ring, which is best for large arrays."""
    size, is_started = instruction.bytes, instruction.kind.endswith("-start")
    if kind == "all-reduce":
        return 2 * size * (group - 1) / group
    if kind in ("all-to-all", "collective-permute"):
        return (size / 2 if is_started else size) * (group - 1) / group
    if is_started:  # its result contains the operands too: the whole and one part
        return size * (group - 1) / (group + 1)
    return size * (group - 1) * (1 if kind == "reduce-scatter" else 1 / group)


def matmul_flops(jaxpr: Any, rounds: int = 1, nested_rounds: int = 1) -> float:
    """FLOPs of the matrix products in a jaxpr over all devices, recomputation included; of branches the largest counts,
    and of loops of unknown length that many rounds, where they are in another loop and where not. Kernels that are
    called by name count nothing."""
    total = 0.0
    for each in jaxpr.eqns:
        name = each.primitive.name
        if name == "dot_general":
            (contracted, _), _ = each.params["dimension_numbers"]
            depth = math.prod(each.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(each.outvars[0].aval.shape)
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr, rounds, nested_rounds) for branch in each.params["branches"])
        else:
            inner = (getattr(value, "jaxpr", value) for value in each.params.values())
            here = nested_rounds if name in ("scan", "while") else rounds
            within = sum(matmul_flops(part, here, nested_rounds) for part in inner if hasattr(part, "eqns"))
            total += within * {"scan": each.params.get("length"), "while": rounds}.get(name, 1)
    return total
