"""A graph's answers are kept by what it was fed, and by nothing less."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgevlm.runtime.spec import Array, TensorSpec
from edgevlm.steps.remembered import Memory, RememberedSession

X = TensorSpec(name="x", dtype="float32", shape=(1, 2))


class Doubling:
    inputs = outputs = (X,)

    def __init__(self) -> None:
        self.n_runs = 0

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.n_runs += 1
        return {"y": feeds["x"] * 2}


def remembered(memory: Memory, identity: str = "a") -> tuple[RememberedSession, Doubling]:
    session = Doubling()
    return RememberedSession(identity, lambda: session, memory), session


def test_the_same_feed_is_run_once_across_sessions_of_one_graph():
    memory = Memory()
    (first, ran), (second, idle) = remembered(memory), remembered(memory)
    feed = {"x": np.float32([[1, 2]])}
    for session in (first, first, second):
        np.testing.assert_array_equal(session.run(feed)["y"], [[2, 4]])
    assert (ran.n_runs, idle.n_runs) == (1, 0)


def test_another_value_name_type_shape_layout_or_graph_is_run():
    memory = Memory()
    session, ran = remembered(memory)
    values = np.float32([[1, 2], [3, 4]])
    feeds = [values, values + 1, values.T, values.reshape(1, 4), values.astype(np.float64)]
    for value in feeds:
        np.testing.assert_array_equal(session.run({"x": value})["y"], value * 2)
    assert ran.n_runs == len(feeds)
    other, counted = remembered(memory, identity="b")
    other.run({"x": values})
    assert counted.n_runs == 1


def test_what_does_not_fit_is_computed_each_time():
    session, ran = remembered(Memory(max_bytes=8))
    small, large = {"x": np.float32([[1, 2]])}, {"x": np.float32([[1, 2, 3]])}
    for _ in range(2):
        session.run(small)
        session.run(large)
    assert ran.n_runs == 3


def test_who_changes_an_answer_does_not_change_what_is_kept():
    session, _ = remembered(Memory())
    feed = {"x": np.float32([[1, 2]])}
    session.run(feed).pop("y")
    session.run(feed).clear()
    assert session.run(feed).keys() == {"y"}
