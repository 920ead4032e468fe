"""Writes the parts of the documentation that are made from the code: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from eadt.config import reference_markdown
from eadt.record.reference import ledger_markdown

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


TEXTS = {"configuration.md": configuration, "ledger.md": ledger_markdown}
"""What is made, by its name in ``docs/``."""


if __name__ == "__main__":
    for name, text in TEXTS.items():
        target = ROOT / "docs" / name
        target.write_text(text(), encoding="utf-8")
        print(f"wrote {target.relative_to(ROOT)}")
