"""Groups of nodes: how a graph is cut, and how noise is measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.lowering import Recipe
from edgevlm.steps.sensitivity import MAX_SQNR_DB, keeping, node_groups, sqnr_db
from edgevlm.steps.variants import Form


@given(st.integers(0, 60), st.integers(3, 10))
def test_groups_hold_every_node_once_in_order(n_nodes, n_groups):
    nodes = [f"n{i}" for i in range(n_nodes)]
    groups = node_groups(nodes, n_groups)
    assert [node for group in groups for node in group.nodes] == nodes
    assert len(groups) == min(n_nodes, n_groups)
    if n_nodes > n_groups:
        assert len(groups[0].nodes) == len(groups[-1].nodes) == 1
        sizes = [len(group.nodes) for group in groups[1:-1]]
        assert max(sizes) - min(sizes) <= 1


def test_keeping_adds_to_what_a_form_keeps_already():
    form = Form(backend="onnxruntime", recipe=Recipe(name="r", precision="int8", keep_float=("a",)))
    groups = node_groups(["a", "b", "c"])
    assert keeping(form, groups[:2]).recipe.keep_float == ("a", "b")


def test_sqnr_is_the_mean_noise_share_of_the_outputs_each_at_its_own_scale():
    large, small = np.full(4, 100.0), np.full(4, 0.01)
    assert sqnr_db([large, small], [large * 1.1, small * 1.1]) == pytest.approx(20.0)
    assert sqnr_db([large], [large]) == MAX_SQNR_DB
    assert sqnr_db([large], [np.full(4, np.nan)]) == -MAX_SQNR_DB
