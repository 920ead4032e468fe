"""Writes the parts of the documentation that are made from the code: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from eadt.config import reference_markdown

ROOT = Path(__file__).parents[1]
HEAD = """\
# Configuration reference

One YAML file per run. Every key below is optional unless it says *required*; unknown keys are refused with
the nearest valid one. `eadt validate FILE` checks a file without starting anything, `eadt schema` prints a
JSON schema for editors, and `--set training.max_steps=20` changes a value on the command line. Ready files
lie in [configs/](../configs).

Made from the code by `make docs`; do not edit by hand.

"""


def configuration() -> str:
    """The text of ``docs/configuration.md``."""
    return HEAD + reference_markdown()


if __name__ == "__main__":
    target = ROOT / "docs" / "configuration.md"
    target.write_text(configuration(), encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
