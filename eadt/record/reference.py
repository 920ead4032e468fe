"""The ledger described for its readers: ``docs/ledger.md``, from the row types and the rules of the books.

Owns the words; what a field is called, is and means is in :mod:`eadt.record.rows`. A reader must be able to
recompute every total from this page alone: a change of a rule in :mod:`eadt.record.books` belongs here too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect as types

from eadt.record.rows import ROW_TYPES, SCHEMA_VERSION, USES, MeteredComponent

USE_MEANINGS = {
    "startup": "From the start of a session to its first step: connecting, loading, compiling, and restoring "
    "the state where the session goes on from one.",
    "useful": "Optimizer steps that count.",
    "validation": "Validation losses.",
    "input": "Waiting for data: the part of the steps' time in which rank 0 waited for its next batch. "
    "Shared out of `useful` by that fraction.",
    "change": "From the last step before a change of setting, or before a recovery, to the first step after "
    "it; and what building the next engines beside training cost. The latter is estimated: of CPU and DRAM "
    "alone, the fraction of the run's CPU time that those engines took.",
    "checkpoint": "Saving the state, snapshots too.",
    "idle": "Paused or parked, a card of a training node that no rank uses, and the time after the end.",
    "lost": "Never in a row: what was booked as `useful`, `validation` or `input` for steps that a rollback "
    "or a crash undid.",
}

# What the types leave to their names.
_MEANINGS = {
    "hostname": "Name of the machine.",
    "NodeRow.components": "The columns of its `energy` rows, in order.",
    "DevicesRow.components": "The cards, as the `node` row names them.",
    "memory_total_bytes": "All of the card's memory.",
    "learning_rate": "Learning rate of each.",
    "TimeRow.use": "What the time was for.",
    "reason": "Why, in words.",
    "from_workers": "Workers before.",
    "to_workers": "Workers after.",
    "ordinary_step_s": "Length of an ordinary step after it, s.",
    "lost_steps": "Steps that it undid.",
    "decision_id": "Names the decision.",
    "action": "What was decided: hold, or a change.",
    "CheckpointRow.step": "Optimizer steps that are in it.",
    "path": "Where it is, from the run's folder.",
    "CheckpointRow.seconds": "How long training waited for it, s.",
    "num_bytes": "Its size.",
    "FaultRow.kind": "What sort of fault.",
    "detail": "What happened, in words.",
    "FaultRow.generation": "Generation that it hit; null: none in particular.",
    "text": "The sentence.",
}

_INTRO = f"""\
# The ledger

The ledger is the record of a run: a folder of files, `runs/<name>/ledger/`, that only ever grow. Every
figure that EADT shows (display, `eadt status`, `eadt report`) is recomputed from its rows by the rules on
this page, and can be recomputed by you: [examples/recompute_energy.py](../examples/recompute_energy.py)
does it with nothing but Python's standard library, and prints a run's totals as JSON:

```sh
python examples/recompute_energy.py runs/demo
eadt report demo -o json                      # says the same
```

Made from the code by `make docs`; do not edit by hand. This is version {SCHEMA_VERSION} of the format.

## Files

- `events-<k>.jsonl`, `k` counting up from 1: one row a line, as a JSON object in UTF-8; every line ends
  with a newline. Each session of the run begins a new file, and so do 64 MiB and a day.
- A finished file is compressed with gzip to `events-<k>.jsonl.gz`. If a number is there in both ways, both
  hold the same: read one.
- Read the files by number (10 comes after 9), and the rows of a file in their order. That order is the
  record's; where this page says *before*, *latest* or *so far*, it means this order, not times.
- The first row of each file is a [`ledger`](#ledger) row with the version of the format. A file of a newer
  version must not be read: say so. A row of a `type` that you do not know, and a field that you do not
  know, are left out.
- A last line without its end is what a crash left of a row. Any other line that is not a JSON object is
  damage. Leave both out and say so; nothing on this page needs a row that it does not have.
- A missing number means that a file was lost.
- `digest.json` is what the rows came to up to a place in the files, so that a report need not read a month.
  It can be removed at any time; `eadt report --from-ledger` does without. `*.part` is half-written: ignore
  it.

A row reaches the operating system some milliseconds after it is made, and the disk itself within 2 s: a
killed coordinator loses the former, a power cut the latter. Steps are written in blocks, at most 5 s late.
While a disk is full, rows wait; beyond 100 000 of them they are dropped, and a [`note`](#note) row with the
code EADT-330 in their place says how many.

## Fields

- Units are in the names: `_s` seconds, `_w` watts, `_bytes`, `_c` °C, `_mhz`; `joules` are joules. A
  fraction goes from 0 to 1.
- **A field that has its default is not in the row.** The tables below say what it then is; *always there*
  is said of those that have none.
- **Null is unknown, never zero.** What it means is said where it is more than that. NaN and infinities are
  null: JSON has neither.
- Numbers of generations and settings count anew in each session.

## Time axes

- *Node time* (`t0`, `t1`, `monotonic_s`): the monotonic clock of one machine, comparable on that machine
  alone, and only as long as its `boot_id` stays.
- *Session time* (`at_s`, `t0_s`, `t1_s`): seconds since the session began, the same for all nodes. Of a
  moment `t` in node time it is `at_s + (t - monotonic_s)`, with `at_s` and `monotonic_s` of the node's
  latest [`node`](#node) row.
- *The run's axis*: the sessions one after the other, without the time between them, which is not the run's.
  A session is as long as the largest session time that one of its rows tells of (an `at_s`, a `t1_s`, the
  `t1` of an `energy` row, the end of a step). It begins where the one before was last heard of; the first
  begins at 0.
- `unix_s` is the wall clock, for people and for joining with other data. No figure is computed from it.

## Sessions of a run

A [`session`](#session) row begins a session; what comes before the first one belongs to it. The session has
ended as its [`end`](#end) row says. Without one, the newest session is running, or has crashed if its last
row's `unix_s` is old; an earlier one ended without a word. A session goes on from `resumed_step` steps:
what earlier sessions did beyond them is lost.

## Uses

| use | what it is |
|---|---|
"""

_RULES = """\

## Adding up energy

An [`energy`](#energy) row is what one node used between two readings, in one number for each component that
it booked. To add them up:

1. **Columns.** `joules[i]` is of `components[i]` of the latest `node` row of that `node`.
2. **Once only.** A row that begins more than 1 ms before the end of that node's last row that counted, with
   the same session and `boot_id`, was delivered twice: leave it out.
3. **Whole numbers.** Take every value in thousandths of a joule, rounded to a whole number. Sums are then
   exact in any order. A value that is null, negative or above 10^12 J is unknown, and so is every value of
   a component whose quality is null.
4. **Quality** of a component: `qualities[component]`, or else that of the `node` row: `measured`,
   `estimated`, `simulated`, or `stale` (went on as last seen while the sensor did not answer).
5. **Use** of a component: `uses[component]`, or else the row's `use`.
6. **Shared out.** Of each component whose use is the row's `use`, every other use `u` in `shared` is given
   `shared[u]` of the joules; of `cpu` and `dram`, every `u` in `shared_cpu` is given `shared_cpu[u]` of the
   joules on top. In the order of the row, each part is rounded to a whole thousandth (a half to the even
   one), and is at most what is left; the use itself keeps the rest, so that the parts are the whole. This
   is a model's doing, not a reading's: reports say how much of a use it is.
7. **Lost.** After all of this, energy whose use is `useful`, `validation` or `input` is `lost` if what it
   was for was undone:
   - A [`rollback`](#rollback) row with generation `g` and `resumed_step` `R` undoes rows of its session
     with a generation of at most `g`, and rows of all earlier sessions, if their `step` is at least `R`. It
     undoes what was booked before it, and what still arrives after it.
   - A `session` row with `resumed_step` `R` does the same to all earlier sessions.

   What is lost stays so. (EADT adds up work that is long past between the steps to which the run can go
   back, its checkpoints; a rollback to another step takes the fraction of the steps that it undoes.)

The total is the sum of everything, whatever its use. By use, component, quality or node, the same joules
are sorted by what is named; each of them adds up to the total.

**Only what is the run's own.** A node books the cards that the run's workers were given, and its CPU and
DRAM. Where another run trains on the same machine, `joules` of `cpu` and `dram` are this run's share by CPU
time, and `own_fraction` says which fraction that was: nothing is left to do for a reader. `foreign` names
cards on which other programs ran too: all of such a card's joules are in the row, since a card has one
meter.

**What is not measured.** Time of a component of which no energy is known, in component-seconds:

- `unknown_s`, by component: the seconds of an interval that are not in `joules`; `why_unknown` says why. Of
  a null in `joules` it is the whole interval.
- Holes, "no row": from a `node` row's `monotonic_s` to the node's first `energy` row; between the end of
  one row and the begin of the next, where that is more than 1 ms; to the end of the session, if more than 5
  s are missing there (as long as it goes on: 60 s). A hole belongs to the uses before and after it.

If the unknown time of what a figure is made of is more than 0.1 % of all its component-time, the figure is
*at least* what it says; so is everything divided by it.

**Uncertainty** (the ± of reports) is the half-width of what the sources state:

- Of each component, `relative_uncertainty` times its joules: added up as they are for one piece of hardware
  (`component` and `identity`: its error is the same all the time), as the root of the sum of squares over
  different ones. If it is null where there are joules, the uncertainty of the sum is not known.
- Of a use, moreover: where a component's use is another than in its row before, the border between the two
  is only known to `resolution_s`. The square of the row's mean power times that time is added to the
  squares of both uses. What was shared out is as uncertain as it is large, for the use that gave and for
  the one that got: its sum is squared and added. Neither touches a total.

## Steps and samples

- A [`steps`](#steps) row holds steps `first_step`, `first_step + 1` and so on, each with `samples` and
  `tokens`.
- A step counts once. If it is there several times, the newest generation (of the newest session) that did
  it counts; the others are lost steps, unless it is the same generation: then the row was delivered twice.
- Steps with a number above `R` that a rollback or a session undoes, by the same rules as for energy, are
  lost steps, and their samples lost samples.
- If numbers between steps that count are missing, a crash took their rows: a later number proves that they
  were done. They count with `train_batch_size` samples each (times `sequence_length` for tokens); their
  loss is unknown. So do numbers up to the `resumed_step` of a `session` or `rollback` row.
- *Joules per sample* is all energy over the samples that count (in a session without an end: of the steps
  that had ended when the newest interval of energy did), *per token* likewise; *useful joules per
  sample* is the energy whose use is `useful` over the same samples. If a step that counts does not say its
  samples, they are unknown.

## The job's time

A [`time`](#time) row is a stretch of session time of the whole job, with the use that rank 0's node had
then. Sum the lengths (in whole millionths of a second, ends and begins rounded first); `shared` and *lost*
are as for energy. This is not node time: eight nodes that train for an hour are one hour of `useful`.

## Other figures

- *Mean power*: all energy over the seconds of the run's axis up to the last reading; unknown where more
  than 5 % of the component-time is.
- *Power now*: the sum over the nodes that book, each its mean over its newest rows, of at least 1 s.
- *Samples per second now*: samples over seconds of the newest steps, at least 30 s of them, of the present
  setting (of all, while it has done fewer than 3 steps).
- *Time to go*: the steps that are left, times the mean time from the end of a step to the end of the next
  under the present setting, without the pauses between generations. *Energy to go*: that time, times the
  mean power under this setting of the rows whose use is `useful`, `validation`, `input` or `checkpoint`.

## Decisions

A later [`decision`](#decision) row with the same `decision_id` takes the place of the earlier one, but for
the fields that it leaves out.

## Rows

Every row has these, filled in as it is written:

"""


def ledger_markdown() -> str:
    """The text of ``docs/ledger.md``."""
    uses = "\n".join(f"| `{use}` | {USE_MEANINGS[use]} |" for use in USES)
    common = ["seq", "unix_s"]
    parts = [_INTRO + uses + "\n" + _RULES + _table(ROW_TYPES[0], common, is_common=True)]
    for row_type in ROW_TYPES:
        kind = row_type.__struct_config__.tag
        parts.append(f"### `{kind}`\n\n{_text(row_type)}\n\n{_table(row_type, common)}")
        if row_type.__name__ == "NodeRow":
            text = _text(MeteredComponent)
            parts.append(
                f"Each of `components`: {text[0].lower()}{text[1:]}\n\n{_table(MeteredComponent, [])}"
            )
    return "\n\n".join(parts) + "\n"


def fields_of(kind: type[msgspec.Struct]) -> Iterator[tuple[str, str, str, str]]:
    """Each field of a type: name, type, what it is where it is not in the row, and meaning."""
    for field in msgspec.structs.fields(kind):
        info = types.type_info(field.type)
        meaning = ""
        if isinstance(info, types.Metadata):
            meaning = (info.extra_json_schema or {}).get("description", "")
            info = info.type
        meaning = meaning or _MEANINGS.get(f"{kind.__name__}.{field.name}") or _MEANINGS.get(field.name, "")
        of_type = _type(info)
        if "null" in of_type and "null" not in meaning.lower():
            meaning += " Null: not known."
        yield field.name, of_type, _default(field), meaning.replace("``", "`").replace("<", "&lt;")


def _table(kind: type[msgspec.Struct], common: list[str], *, is_common: bool = False) -> str:
    rows = [
        f"| `{name}` | {of_type} | {default} | {meaning.replace('|', chr(92) + '|')} |"
        for name, of_type, default, meaning in fields_of(kind)
        if (name in common) is is_common
    ]
    return "\n".join(["| field | type | if not there | meaning |", "|---|---|---|---|", *rows])


def _text(kind: type) -> str:
    """The type's docstring as Markdown: its paragraphs, each in one line."""
    paragraphs = inspect.cleandoc(kind.__doc__ or "").replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _type(info: types.Type) -> str:
    match info:
        case types.UnionType():
            return " or ".join(_type(one) for one in info.types)
        case types.ListType():
            return f"list of {_plural(_type(info.item_type))}"
        case types.DictType():
            is_any = isinstance(info.value_type, types.AnyType)
            return "mapping" if is_any else f"mapping of names to {_plural(_type(info.value_type))}"
        case types.StructType():
            return "component"
        case types.NoneType():
            return "null"
        case types.BoolType():
            return "true/false"
        case types.IntType():
            return "integer"
        case types.FloatType():
            return "number"
        case types.StrType():
            return "text"
    raise TypeError(f"no word for {info}")


def _plural(name: str) -> str:
    """The same of several: ``number or null`` becomes ``numbers or nulls``."""
    return " or ".join(
        word.replace("mapping", "mappings", 1) if word.startswith("mapping") else f"{word}s"
        for word in name.split(" or ")
    )


def _default(field: Any) -> str:
    if field.required:
        return "*always there*"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value == "" or value == [] or value == {}:
        return "empty"
    return "null" if value is None else f"`{json.dumps(value)}`"
