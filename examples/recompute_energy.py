"""Prints a run's totals by the rules in docs/ledger.md: python examples/recompute_energy.py runs/NAME"""

import gzip
import itertools
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path


def read(ledger):
    """(session, (session, generation), row) of every row; what a row does not have reads as empty."""
    session = 0
    files = {int(path.name.split(".")[0][7:]): path for path in ledger.glob("events-*[lz]")}
    for _, path in sorted(files.items()):
        for line in (gzip.open if path.suffix == ".gz" else open)(path, "rb"):
            if line.startswith(b"{") and line.endswith(b"}\n"):  # else a crash tore it
                row = defaultdict(dict, json.loads(line))
                assert row.get("schema_version", 1) == 1, f"{path} is of a newer version"
                session += (begins := row["type"] == "session")  # all generations before end with it
                yield session, (session - 1, 2**31) if begins else (session, row["generation"] or 0), row


def recompute(rows):
    """Energy in whole thousandths of a joule, by use, component, quality and node; steps; unknown time."""
    undone = [(o, row["resumed_step"] or 0) for _, o, row in rows if row["type"] in ("session", "rollback")]
    base = top = min([step for _, step in undone], default=0)
    cells, unknown_s, steps, batch = Counter(), Counter(), {}, None
    for session, group in itertools.groupby(rows, key=lambda item: item[0]):
        nodes, covered, now_s, grace_s = {}, {}, 0.0, 60.0 if session == rows[-1][0] else 0.001
        for _, owner, row in group:
            kind, name = row["type"], row["node"] or ""
            last = min([step for upto, step in undone if upto >= owner] + [2**31])  # the last that counts
            now_s = max(now_s, row["at_s"] or 0.0, row["t1_s"] or 0.0)
            grace_s, batch = 5.0 if kind == "end" else grace_s, row["train_batch_size"] or batch
            top = max(top, last if kind in ("session", "rollback") else 0)  # so many were done
            if kind == "steps":
                counted = range(row["first_step"], min(row["first_step"] + len(row["t0"]), last + 1))
                done, offset_s = (owner, row.get("samples")), nodes.get(name, {}).get("offset_s", -1e12)
                now_s = max(now_s, row["t0"][-1] + row["seconds"][-1] + offset_s)
                steps |= {number: done for number in counted if owner > steps.get(number, [(-1, 0)])[0]}
            elif kind == "node":
                at_s, boot, parts = row["at_s"] or 0.0, row["boot_id"], row["components"] or ()
                end = nodes[name]["end"] if name in nodes and nodes[name]["boot"] == boot else float("-inf")
                offset_s, names = at_s - (row["monotonic_s"] or 0.0), [part["component"] for part in parts]
                nodes[name] = {"boot": boot, "parts": parts, "offset_s": offset_s, "end": end}
                gone = {place for place in covered if place[0] == name and place[1] not in names}
                unknown_s.update({place: max(at_s - covered.pop(place), 0.0) for place in gone})
                covered = {(name, part): at_s for part in names} | covered
            elif kind == "energy" and name in nodes and row["t0"] >= nodes[name]["end"] - 0.001:  # once only
                node, length_s = nodes[name], row["t1"] - row["t0"]
                node["end"], end_s = row["t1"], row["t1"] + node["offset_s"]
                now_s, begin_s, is_void = max(now_s, end_s), end_s - length_s, (row["step"] or 0) >= last
                for part, joules in zip(node["parts"], row["joules"], strict=True):
                    place, whole = (name, part["component"]), -1 if joules is None else round(joules * 1000)
                    unknown_s[place] += max(begin_s - covered.get(place, begin_s), 0.0)  # no row tells of it
                    covered[place], quality = end_s, row["qualities"].get(place[1], part["quality"])
                    if quality is None or not 0 <= whole <= 10**15:
                        unknown_s[place] += length_s
                        continue
                    unknown_s[place] -= min(row["recovered_s"].get(place[1], 0.0), unknown_s[place])
                    unknown_s[place] += min(row["unknown_s"].get(place[1], 0.0), length_s)
                    own, left, is_gpu = row["uses"].get(place[1], row["use"]), whole, place[1][:3] == "gpu"
                    gifts = [*row["shared"].items(), *(() if is_gpu else row["shared_cpu"].items())]
                    for use, fraction in [one for one in gifts if own == row["use"] != one[0]] + [(own, 1.0)]:
                        given = max(min(round(whole * fraction), left), 0)  # the use itself keeps the rest
                        left, is_lost = left - given, is_void and use in ("useful", "validation", "input")
                        cells["lost" if is_lost else use, place[1], quality, name] += given
        unknown_s.update({place: now_s - end for place, end in covered.items() if now_s - end > grace_s})
    samples = [steps[n][1] if n in steps else batch for n in range(base + 1, max(top, *steps, 0) + 1)]
    by = [{c[k]: sum(mj for d, mj in cells.items() if d[k] == c[k]) / 1000 for c in cells} for k in range(4)]
    totals = dict(zip(("by_use_j", "by_component_j", "by_quality_j", "by_node_j"), by, strict=True))
    counts = {"optimizer_steps": len(samples), "samples": None if None in samples else sum(samples)}
    unmeasured = {"unmeasured_component_seconds": round(unknown_s.total(), 3)}
    return {"total_j": sum(cells.values()) / 1000 if cells else None, **totals, **counts, **unmeasured}


if __name__ == "__main__":
    print(json.dumps(recompute(list(read(Path(sys.argv[1]) / "ledger"))), indent=2))
