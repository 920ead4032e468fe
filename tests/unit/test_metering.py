"""Which node books which piece of hardware."""

from __future__ import annotations

from eadt.coordination.metering import Metered, booking_nodes, component_of, elect
from eadt.coordination.nodes import NodeInfo
from eadt.coordination.placement import Host


def node(name: str, machine: str = "", *, gpus: int = 0, pretended: frozenset[str] = frozenset()) -> NodeInfo:
    machine = machine or f"machine-of-{name}"
    identities = {"cpu": f"{machine}/cpu", "dram": f"{machine}/dram"}
    identities |= {f"gpu{number}": f"GPU-{machine}-{number}" for number in range(gpus)}
    return NodeInfo(
        node_id=name, ip="127.0.0.1", hostname=name, cores=(0, 1, 2, 3), num_gpus=gpus, state_address=("", 0),
        slot_paths=(), identities=identities, pretended=pretended,
    )  # fmt: skip


def hosts(*places: tuple[str, tuple[str, ...]]) -> list[Host]:
    return [Host(rank, len(places), name, gpus, pid=100 + rank) for rank, (name, gpus) in enumerate(places)]


def test_only_nodes_with_hosts_and_only_cards_that_were_given() -> None:
    """Four cards of which the hosts were given two, beside a node that is somebody else's."""
    nodes = {"a": node("a", gpus=4), "b": node("b", gpus=4)}
    elected = elect(nodes, hosts(("a", ("1",)), ("a", ("3",))), {})
    assert elected["a"] == Metered(("cpu", "dram", "gpu1", "gpu3"), (), (100, 101))
    assert elected["b"] == Metered()


def test_cards_named_by_uuid_and_cards_that_no_sensor_knows() -> None:
    nodes = {"a": node("a", gpus=1)}
    elected = elect(nodes, hosts(("a", ("GPU-machine-of-a-0",)), ("a", ("7",)), ("a", ("7",))), {})
    assert elected["a"].components == ("cpu", "dram", "gpu0")
    assert elected["a"].unknown_gpus == ("7",)
    assert component_of("GPU-other", nodes["a"].identities) is None


def test_a_card_of_another_maker_is_unknown_not_absent() -> None:
    elected = elect({"a": node("a")}, hosts(("a", ("0",))), {})
    assert elected["a"] == Metered(("cpu", "dram"), ("0",), (100,))


def test_pretended_cards_are_the_nodes_own() -> None:
    nodes = {"a": node("a", gpus=2, pretended=frozenset({"gpu0", "gpu1"}))}
    assert elect(nodes, hosts(("a", ())), {})["a"].components == ("cpu", "dram", "gpu0", "gpu1")


def test_several_ray_nodes_on_one_machine_book_each_piece_once() -> None:
    nodes = {name: node(name, "one", gpus=2) for name in ("a", "b")}
    elected = elect(nodes, hosts(("a", ("0",)), ("b", ("1",))), {})
    assert elected["a"].components == ("cpu", "dram", "gpu0")
    assert elected["b"].components == ("gpu1",)


def test_who_books_keeps_it_and_another_takes_over_when_it_goes() -> None:
    nodes = {name: node(name, "one") for name in ("a", "b", "c")}
    first = elect(nodes, hosts(("b", ()), ("c", ())), {})
    assert first["b"].components == ("cpu", "dram")
    # "a" comes first in the order, but "b" has it.
    second = elect(nodes, hosts(("a", ()), ("b", ()), ("c", ())), first)
    assert [second[name].components for name in "abc"] == [(), ("cpu", "dram"), ()]
    del nodes["b"]
    third = elect(nodes, hosts(("a", ()), ("c", ())), second)
    assert [third[name].components for name in "ac"] == [("cpu", "dram"), ()]


def test_the_booker_gives_up_with_its_last_host() -> None:
    nodes = {name: node(name, "one") for name in ("a", "b")}
    first = elect(nodes, hosts(("a", ()), ("b", ())), {})
    second = elect(nodes, hosts(("b", ())), first)
    assert (second["a"].components, second["b"].components) == ((), ("cpu", "dram"))


def test_readings_are_asked_of_who_books_the_machine_of_those_that_train() -> None:
    nodes = {"a": node("a", "one"), "b": node("b", "one"), "c": node("c", "two")}
    metered = elect(nodes, hosts(("a", ()), ("b", ()), ("c", ())), {})
    assert booking_nodes(nodes, metered, ["b"]) == ["a"]
    assert booking_nodes(nodes, metered, ["b", "c"]) == ["a", "c"]
    assert booking_nodes(nodes, metered, ["gone"]) == []


def test_an_unknown_card_makes_its_own_nodes_power_unknown_and_no_others() -> None:
    nodes = {"a": node("a"), "b": node("b")}
    metered = elect(nodes, hosts(("a", ("0",)), ("b", ())), {})
    assert booking_nodes(nodes, metered, ["b"]) == ["b"]
    assert booking_nodes(nodes, metered, ["a"]) == ["a"]
