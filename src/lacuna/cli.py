"""The console scripts: each reads its page, and only then imports the room that runs it, for jax is slow to import."""

import os
import platform
import sys
from importlib.util import find_spec
from typing import NoReturn

from lacuna.config import (
    DEVICE_MEMORY_SHARE,
    GPU_PLUGINS,
    PLANS,
    ChatConfig,
    EvalConfig,
    GrpoConfig,
    PretrainConfig,
    ServeConfig,
    SftConfig,
    TrainingConfig,
    UserError,
)
from lacuna.options import did_you_mean, parse

PAGES = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "grpo": GrpoConfig,
    "eval": EvalConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
}
XLA_BASE_SHARE = 0.8  # of a GPU's memory, on which its compiler's limit is a percentage


def main() -> None:
    """`lacuna <command> …`, the same as the command's own script."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("usage: lacuna COMMAND [@ FILE.toml ...] [--option VALUE ...]\n")
        for name, page in PAGES.items():
            print(f"  {name:10}{page.__doc__}")
        print("  plan COMMAND  What a run of pretrain, sft or grpo would take on accelerators that are not here")
        print("\nEvery option of a command, with the value now in force: lacuna COMMAND --help")
    elif command in (*PAGES, "plan"):
        start(command, arguments)
    else:
        stop(f"error: {command} is not a command of lacuna{did_you_mean(command, (*PAGES, 'plan'))}", 2)


def pretrain() -> None:
    start("pretrain", sys.argv[1:])


def sft() -> None:
    start("sft", sys.argv[1:])


def grpo() -> None:
    start("grpo", sys.argv[1:])


def evaluate() -> None:
    start("eval", sys.argv[1:])


def chat() -> None:
    start("chat", sys.argv[1:])


def serve() -> None:
    start("serve", sys.argv[1:])


def plan() -> None:
    start("plan", sys.argv[1:])


def start(command: str, arguments: list[str]) -> None:
    """Run a command; a UserError exits with 2, an interrupt with 130, each in one line."""
    try:
        share_memory()
        if command == "grpo" and "--replay" in arguments[:-1]:  # a replay begins with the config of its run
            arguments = ["@", f"{arguments[arguments.index('--replay') + 1]}/config.toml", *arguments]
        if command == "plan":
            planned = parse(*page_to_plan(arguments))
            from lacuna.plan import run as look_ahead

            return look_ahead(planned)
        page = parse(PAGES[command], arguments, command)
        if isinstance(page, ChatConfig):
            from lacuna.chat import run as talk

            return talk(page)
        prepare_process()
        if isinstance(page, ServeConfig):
            from lacuna.serve import run as serve_requests

            return serve_requests(page)
        from lacuna.distributed import cluster

        with cluster():
            if isinstance(page, EvalConfig):
                from lacuna.eval import run as measure

                measure(page)
            elif isinstance(page, GrpoConfig):
                from lacuna.grpo import run as reinforce

                reinforce(page)
            else:
                from lacuna.sft import run as train

                train(page)
    except UserError as error:
        stop(f"error: {error}", 2)
    except KeyboardInterrupt as interrupt:
        stop(f"interrupted{interrupt}", 130)


def page_to_plan(arguments: list[str]) -> tuple[type[TrainingConfig], list[str], str]:
    """The page, arguments and program name of `plan COMMAND …`."""
    command, *rest = arguments or [""]
    if command in ("-h", "--help"):
        print(f"usage: plan COMMAND [@ FILE.toml ...] [--option VALUE ...]\n\nCOMMAND is one of {', '.join(PLANS)}; "
              "plan COMMAND --help shows its options")  # fmt: skip
        raise SystemExit(0)
    if command not in PLANS:
        asked = " (plan COMMAND --help shows its options)" if not command else ""
        raise UserError(
            f"plan needs a command that trains behind it, {', '.join(PLANS)}, as in plan sft @ FILE.toml{asked}"
        )
    return PLANS[command], rest, f"plan {command}"


def stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def share_memory() -> None:
    """Let XLA have its share of an accelerator's memory, and its compiler for GPUs know of it.

    That one counts on 76 % of what the arguments leave otherwise; for what is more it hides no communication and
    computes matrix products again, where all of it would have room.
    """
    usual = str(DEVICE_MEMORY_SHARE)  # JAX takes three quarters otherwise
    share = os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", usual)
    flags, limit = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_memory_limit_slop_factor"
    if limit not in flags and any(find_spec(plugin) for plugin in GPU_PLUGINS):
        try:
            percentage = round(100 * float(share) / XLA_BASE_SHARE)
        except ValueError as error:
            raise UserError(f"XLA_PYTHON_CLIENT_MEM_FRACTION = {share!r} should be a number, as 0.9") from error
        os.environ["XLA_FLAGS"] = f"{flags} {limit}={percentage}".strip()


def prepare_process() -> None:
    """Start again, once, with huge pages in malloc, as XLA on a CPU faults its temporaries in anew at every step."""
    share_memory()
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb=" in tunables or "pytest" in sys.modules:
        return
    environment = os.environ | {"GLIBC_TUNABLES": f"{tunables}:glibc.malloc.hugetlb=1".removeprefix(":")}
    os.execve(sys.executable, sys.orig_argv, environment)
