"""Pin every package that any extra, group or platform of lacuna needs, in pyproject.toml.

    uv run python scripts/pins.py             add what is new, drop what is no longer needed, keep the other pins
    uv run python scripts/pins.py --upgrade   resolve everything anew first

Neither hashes nor addresses are written, so the pins hold wherever packages come from.
"""

import argparse
import re
import subprocess
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
BLOCK = re.compile(r"^constraint-dependencies = \[\n.*?^\]\n", re.MULTILINE | re.DOTALL)
EXPORT = "uv export --quiet --all-extras --all-groups --no-emit-project --no-hashes --no-header --no-annotate"


def with_pins(text: str, pins: list[str]) -> str:
    """The text of pyproject.toml with these pins."""
    lines = "".join(f'    "{pin}",\n' for pin in pins)
    return BLOCK.sub(lambda _: f"constraint-dependencies = [\n{lines}]\n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="resolve everything anew first")
    is_upgrade = parser.parse_args().upgrade
    text = PROJECT.read_text()
    if is_upgrade:
        PROJECT.write_text(with_pins(text, []))
    try:
        command = [*EXPORT.split(), *(["--upgrade"] if is_upgrade else [])]
        found = subprocess.run(command, cwd=PROJECT.parent, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        PROJECT.write_text(text)
        raise SystemExit(error.stderr) from error
    PROJECT.write_text(with_pins(text, found.replace(" ; ", "; ").splitlines()))


if __name__ == "__main__":
    main()
