"""The documentation says what the code does: generated parts are current, examples and names exist."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from eadt.cli import app
from eadt.config import config_from_dict, load_config
from eadt.record.reference import USE_MEANINGS, fields_of, ledger_markdown
from eadt.record.rows import ROW_TYPES, USES, MeteredComponent, Row

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_configuration_reference_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == make_docs().configuration(), "run `make docs`"


def test_the_ledgers_reference_is_current() -> None:
    written = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    assert written == make_docs().TEXTS["ledger.md"](), "run `make docs`"


@pytest.mark.parametrize("kind", [*ROW_TYPES, MeteredComponent], ids=lambda kind: kind.__name__)
def test_the_ledgers_reference_explains_every_field(kind: type[Row]) -> None:
    page = ledger_markdown()
    for name, of_type, _, meaning in fields_of(kind):
        assert len(meaning.removesuffix("Null: not known.")) > 3, f"{kind.__name__}.{name} has no meaning"
        assert "null" not in of_type or "null" in meaning.lower()
        assert f"| `{name}` | {of_type} |" in page


def test_the_ledgers_reference_explains_every_use_and_links_to_its_own_headings() -> None:
    page = ledger_markdown()
    for use in USES:
        assert f"| `{use}` | {USE_MEANINGS[use]} |" in page
    headings = [line.strip("# `").lower() for line in page.splitlines() if line.startswith("#")]
    assert len(set(headings)) == len(headings)  # else a link would lead to the first of two
    assert set(re.findall(r"\]\(#(\w+)\)", page)) <= set(headings)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*.yaml")]), ids=str
)
def test_every_example_configuration_loads(path: Path) -> None:
    assert load_config(path).run.name == path.stem


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    named = set(re.findall(r"`((?:configs|docs|examples|eadt|scripts|tests|benchmarks)/[\w/.-]+)`", text))
    assert {name for name in links | named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_and_their_options_exist(path: Path) -> None:
    from typer.main import get_command

    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    for block in blocks(path.read_text(encoding="utf-8"), "sh"):
        for name, rest in re.findall(r"\beadt (\w+)([^\n#|>]*)", block):
            assert name in known
            assert set(re.findall(r"(?<!\S)(--?[a-z][\w-]*)", rest)) <= known[name]


def test_the_readmes_configuration_is_valid() -> None:
    for block in blocks((ROOT / "README.md").read_text(encoding="utf-8"), "yaml"):
        config_from_dict(yaml.safe_load(block))


def test_the_readmes_training_loop_is_that_of_the_example() -> None:
    example = (ROOT / "examples" / "own_loop.py").read_text(encoding="utf-8")
    loops = [
        block
        for block in blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
        if "session" in block
    ]
    assert loops
    for block in loops:
        body = block[block.index("    engine = ") :]
        assert body.strip() in example
