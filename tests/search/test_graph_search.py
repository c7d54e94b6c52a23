"""The search over one graph's forms, against a machine that is written down: its times, and what each layer costs."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from edgevlm.errors import ModelError
from edgevlm.evaluation.evaluation import Drop
from edgevlm.lowering import Recipe
from edgevlm.measure.protocol import QUICK
from edgevlm.plan import Budgets
from edgevlm.runtime.spec import SessionOptions
from edgevlm.search.spec import Variant
from edgevlm.steps import graph_search, sensitivity
from edgevlm.steps.graph_search import Clock, GraphSearch
from edgevlm.steps.variants import Form
from tests.search.test_combinations import comparison

LAYERS = tuple(f"layer{i}" for i in range(6))


class Machine:
    """Float takes 12 ms; each of six layers in int8 saves 1.5 ms, and some cost accuracy."""

    def __init__(
        self, cost_of: dict[str, float], *, saved_ms: dict[str, float] | None = None, layers: tuple[str, ...] = LAYERS
    ) -> None:
        self.cost_of = cost_of
        self.layers = layers
        self.saved_ms = dict.fromkeys(layers, 9.0 / len(layers)) | (saved_ms or {})
        self.made: list[str] = []

    def lowered(self, variant: Variant) -> set[str]:
        kept = set(variant.recipe.get("kept", "").split())
        return set() if variant.precision == "fp32" else set(self.layers) - kept

    def ms(self, variant: Variant) -> float:
        ms = 12.0 - sum(self.saved_ms[layer] for layer in self.lowered(variant))
        return ms * (0.9 if "fast" in variant.session.entries else 1.0)

    def drop(self, variant: Variant) -> float:
        return sum(self.cost_of.get(layer, 0.0) for layer in self.lowered(variant))


class Forms:
    graph = "model"

    def __init__(self, machine: Machine, *names: str) -> None:
        self.machine = machine
        self.names = names
        self.baseline = Form(backend="b", recipe=Recipe(name="fp32", precision="fp32"))

    def forms(self):
        return (self.baseline, *(Form(backend="b", recipe=Recipe(name=n, precision="int8-static")) for n in self.names))

    def make(self, form, *, suffix=""):
        name = form.recipe.name + suffix
        self.machine.made.append(name)
        if "refused" in name:
            return Variant(graph="model", name=name, precision="int8-static", backend="b", failure="no")
        kept = {"kept": " ".join(form.recipe.keep_float)}
        return Variant(graph="model", name=name, precision=form.recipe.precision, backend="b", file=name, recipe=kept)

    def sessions(self, form):
        return {"fast": SessionOptions(entries={"fast": "1"})}

    def lowered_nodes(self, form):
        return self.machine.layers


@pytest.fixture
def search(monkeypatch):
    def make(machine: Machine, *names: str, max_drop: float = 0.01, seconds: float = 1e6) -> GraphSearch:
        forms = Forms(machine, *names)
        baseline = forms.make(forms.baseline)

        def times(work, graph, variants, **_):
            return comparison({v.name: machine.ms(v) for v in variants if v.failure is None})

        def drop(members):
            (variant,) = members
            if "unrunnable" in variant.name:
                raise ModelError("it gives NaN")
            value = machine.drop(variant)
            return Drop(
                metric="top-1", value=value, low=value, high=value, n=100, candidate=0.9 - value, reference=0.9,
                n_worse=0, n_better=0, interval="none", data="d", has_labels=True,
            )  # fmt: skip

        def noise_db(work, variant, baseline, float_run):
            return 40.0 - 1000 * machine.drop(variant)

        monkeypatch.setattr(graph_search, "time_variants", times)
        monkeypatch.setattr(sensitivity, "time_variants", times)
        monkeypatch.setattr(sensitivity, "output_sqnr_db", noise_db)
        request = SimpleNamespace(budgets=Budgets(max_drop=max_drop), protocol=QUICK, precision="auto")
        job = SimpleNamespace(request=request, splits=SimpleNamespace(select=range(10)))
        work = SimpleNamespace(job=job, step=SimpleNamespace(name="search"), progress=lambda event: None)
        return GraphSearch(
            work=work,
            forms=forms,
            baseline=baseline,
            judge=SimpleNamespace(drop=drop),
            others=(baseline,),
            clock=Clock(allowed_s=seconds, now=lambda: 0.0),
        )

    return make


def best(search: GraphSearch) -> str:
    return search._inside()[0].name


def test_a_form_inside_the_budget_needs_no_repair_and_is_tuned(search):
    found = search(Machine({}), "int8")
    found.run()
    assert best(found) == "int8@fast"
    assert not any("mixed" in name for name in found.known.variants)
    assert [each.group for each in found.sensitivities] == list(LAYERS)
    assert found.sensitivities[0].saved_ms == pytest.approx(1.5)


def test_the_one_layer_that_ruins_the_accuracy_stays_in_float(search):
    found = search(Machine({"layer2": 0.05}), "int8")
    found.run()
    assert best(found) == "int8-mixed-1@fast"
    assert found.known.variants["int8-mixed-1"].recipe["kept"] == "layer2"
    assert found.known.drops["int8"].value == pytest.approx(0.05)  # the broken one is told all the same


def test_of_several_layers_no_more_stay_in_float_than_need_be(search):
    found = search(Machine({"layer0": 0.02, "layer3": 0.03, "layer5": 0.004}), "int8", max_drop=0.005)
    found.run()
    kept = found.known.variants[best(found).removesuffix("@fast")].recipe["kept"].split()
    assert sorted(kept) == ["layer0", "layer3"]


def test_of_a_group_only_the_layer_that_ruins_the_accuracy_stays_in_float(search):
    layers = tuple(f"layer{i}" for i in range(26))
    found = search(Machine({"layer7": 0.05, "layer6": 0.001, "layer20": 0.003}, layers=layers), "int8")
    found.run()
    assert best(found) == "int8-mixed-1-nodes@fast"
    assert found.known.variants["int8-mixed-1-nodes"].recipe["kept"] == "layer7"


def test_no_more_is_lowered_than_leaves_half_of_the_budget_for_the_report_split(search):
    layers = tuple(f"layer{i}" for i in range(26))
    found = search(Machine({"layer7": 0.05, "layer8": 0.006}, layers=layers), "int8")
    found.run()
    assert set(found.known.variants[best(found).removesuffix("@fast")].recipe["kept"].split()) == {"layer7", "layer8"}


def test_beside_what_just_keeps_to_the_budget_something_safer_is_tried(search):
    found = search(Machine({"layer2": 0.05, "layer4": 0.009}), "int8")
    found.run()
    drops = {name: drop.value for name, drop in found.known.drops.items() if "mixed" in name and "@" not in name}
    assert drops["int8-mixed-1"] == pytest.approx(0.009) and min(drops.values()) == 0.0


def test_bisection_begins_where_the_losses_of_the_others_add_up_to_less(search):
    machine = Machine({"layer2": 0.05, "layer4": 0.05})
    found = search(machine, "int8")
    found.run()
    mixed = [name for name in found.known.variants if "mixed" in name and "@" not in name]
    assert mixed == ["int8-mixed-2", "int8-mixed-1"]


def test_making_and_timing_every_form_once_takes_none_of_the_time(search):
    found = search(Machine({"layer2": 0.05}), "int8", seconds=60)
    make = found.forms.make
    now = [0.0]
    found.clock.now = lambda: now[0]

    def slowly(form, *, suffix=""):
        now[0] += 500 if not suffix else 1
        return make(form, suffix=suffix)

    found.forms.make = slowly
    found.run()
    assert now[0] > 500 and best(found) == "int8-mixed-1@fast"


def test_of_two_broken_forms_the_one_nearest_to_the_budget_is_repaired_first(search):
    machine = Machine({"layer1": 0.05})
    found = search(machine, "int8", "int8-better")
    worse = found.judge.drop
    found.judge.drop = lambda members: msgspec.structs.replace(
        worse(members), value=worse(members).value * (0.5 if "better" in members[0].name else 1)
    )
    found.run()
    mixed = [name for name in machine.made if "mixed" in name]
    assert mixed[0].startswith("int8-better-mixed")


def test_a_layer_that_is_slower_lowered_stays_in_float(search):
    found = search(Machine({}, saved_ms={"layer4": -2.0}), "int8")
    found.run()
    assert best(found) == "int8-mixed-1@fast"
    assert found.known.variants["int8-mixed-1"].recipe["kept"] == "layer4"


def test_who_was_let_go_for_an_inexact_form_comes_back(search, monkeypatch):
    """Exact and 27 % faster than float, it lost its turns to a form that then lost all accuracy."""
    machine = Machine(dict.fromkeys(LAYERS, 0.2))
    found = search(machine, "int8", "exact", "slow-exact")
    slower = {"exact": 8.7, "slow-exact": 9.5}
    ms, drop = machine.ms, machine.drop
    machine.ms = lambda variant: slower.get(variant.name, ms(variant))
    machine.drop = lambda variant: 0.0 if "exact" in variant.name else drop(variant)
    times = graph_search.time_variants

    def with_halving(work, graph, variants, **options):
        made = times(work, graph, variants, **options)
        if not options["what"].startswith("screening"):
            return made
        gone = [
            msgspec.structs.replace(each, dropped_after_round=2) if each.subject in slower else each
            for each in made.measurements
        ]
        return msgspec.structs.replace(made, measurements=tuple(gone))

    monkeypatch.setattr(graph_search, "time_variants", with_halving)
    found.run()
    assert best(found) == "exact@fast" or best(found) == "exact"
    assert not found.known.trial("exact").was_dropped and not found.known.is_rough("exact")
    assert "slow-exact" not in found.known.drops, "once one is inside, slower ones are no use"


def test_with_no_time_left_every_form_is_timed_and_nothing_else_is_tried(search):
    machine = Machine({"layer2": 0.05})
    found = search(machine, "int8", "other", seconds=0)
    found.run()
    assert set(found.known.variants) == {"fp32", "int8", "other"}
    assert found.clock.was_over
    assert found.sensitivities == ()


def test_what_is_refused_or_does_not_run_is_told_and_the_others_go_on(search):
    found = search(Machine({}), "refused", "unrunnable", "int8")
    found.run()
    assert found.known.trial("refused").failure == "no"
    assert found.known.trial("unrunnable").failure == "it gives NaN"
    assert best(found) == "int8@fast"


def test_where_nothing_is_inside_the_budget_float_is_timed_well(search):
    found = search(Machine(dict.fromkeys(LAYERS, 0.2)), "int8")
    found.run()
    assert found._inside()[:1] == [] or found.known.drops[best(found)].value <= 0.01
    assert not found.known.is_rough("fp32")


def test_a_budget_for_the_size_keeps_slow_forms_in_turns(search):
    found = search(Machine({}), "int8")
    assert found._screening.halve_at != () or not QUICK.halve_at
    request = found.work.job.request
    request.protocol = msgspec.structs.replace(QUICK, halve_at=(6,))
    assert found._screening.halve_at
    request.budgets = Budgets(max_size_mb=1.0)
    assert found._screening.halve_at == ()
