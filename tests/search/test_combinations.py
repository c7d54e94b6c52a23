"""Several graphs: which combinations are candidates, and what their times add up to."""

import msgspec
import pytest

from edgevlm.measure.spec import Comparison, Environment, Measurement, Protocol, Ratio
from edgevlm.search.spec import Candidate, Timing, Variant
from edgevlm.search.trials import GraphTrials, candidates_of, combined_ratio

ENVIRONMENT = Environment(machine="m", arch="x86-64", isa=(), n_cores=2, memory_bytes=1, os="os", python="3", tools={})


def comparison(times_ms, *, invalid=()):
    """Times by variant; float is the baseline, every ratio known to ±2 %."""
    base = times_ms["fp32"]
    return Comparison(
        baseline="fp32",
        protocol=Protocol(),
        environment=ENVIRONMENT,
        measurements=tuple(
            Measurement(
                subject=name,
                turns_ms=((ms,) * 3,) * 8,
                rounds=tuple(range(8)),
                warmup_ms=(ms,),
                load_ms=1.0,
                memory_bytes=1,
                n_threads=1,
            )
            for name, ms in times_ms.items()
        ),
        ratios=tuple(
            Ratio(
                subject=name,
                baseline="fp32",
                value=ms / base,
                low=0.98 * ms / base,
                high=1.02 * ms / base,
                n_pairs=8,
                is_valid=name not in invalid,
                reasons=("noise",) if name in invalid else (),
            )
            for name, ms in times_ms.items()
            if name != "fp32"
        ),
        is_valid=not invalid,
        reasons=(),
        wall_s=1.0,
    )


def known(**comparisons):
    """What is known of graphs, each timed once."""
    return {
        graph: GraphTrials(
            graph=graph,
            variants={
                m.subject: Variant(graph=graph, name=m.subject, precision=m.subject, backend="onnxruntime")
                for m in each.measurements
            },
            timings=[Timing(graph=graph, comparison=each)],
        )
        for graph, each in comparisons.items()
    }


def test_with_one_graph_every_variant_is_a_candidate():
    made = candidates_of(known(model=comparison({"fp32": 10.0, "fast": 4.0, "slow": 12.0})))
    assert [candidate.name for candidate in made] == ["fp32", "fast", "slow"]


def test_with_two_graphs_only_what_beats_float_is_combined_fastest_first():
    found = known(
        image_encoder=comparison({"fp32": 10.0, "static": 4.0, "slow": 12.0}),
        text_encoder=comparison({"fp32": 20.0, "dynamic": 8.0, "unsure": 9.0}, invalid=("unsure",)),
    )
    made = candidates_of(found)
    # By time over float's: 12/30, then 18/30, then 24/30.
    assert [candidate.variants for candidate in made] == [
        {"image_encoder": "fp32", "text_encoder": "fp32"},
        {"image_encoder": "static", "text_encoder": "dynamic"},
        {"image_encoder": "fp32", "text_encoder": "dynamic"},
        {"image_encoder": "static", "text_encoder": "fp32"},
    ]
    assert made[0].name == "fp32"
    assert made[1].name == "image:static+text:dynamic"


def test_where_a_size_is_asked_for_slow_forms_are_combined_too_smallest_first():
    found = known(
        image_encoder=comparison({"fp32": 10.0, "static": 4.0, "small": 12.0}),
        text_encoder=comparison({"fp32": 20.0}),
    )
    for trials in found.values():
        for name, variant in trials.variants.items():
            n_bytes = {"fp32": 400, "static": 100, "small": 50}[name]
            trials.variants[name] = msgspec.structs.replace(variant, n_bytes=n_bytes)
    made = candidates_of(found, must_be_faster=False)
    assert [candidate.variants["image_encoder"] for candidate in made] == ["fp32", "small", "static"]


def test_ratios_add_up_by_the_time_that_each_graph_takes():
    found = known(
        image_encoder=comparison({"fp32": 10.0, "static": 4.0}),
        text_encoder=comparison({"fp32": 30.0, "dynamic": 15.0}),
    )
    both = Candidate(name="both", variants={"image_encoder": "static", "text_encoder": "dynamic"})
    ratio = combined_ratio(both, found)
    assert ratio.value == pytest.approx((4 + 15) / 40)
    assert ratio.low < ratio.value < ratio.high
    only_image = Candidate(name="image", variants={"image_encoder": "static", "text_encoder": "fp32"})
    assert combined_ratio(only_image, found).value == pytest.approx((4 + 30) / 40)
    assert combined_ratio(Candidate(name="fp32", variants={}), found) is None


def test_a_combination_is_as_valid_as_its_parts():
    found = known(
        image_encoder=comparison({"fp32": 10.0, "static": 4.0}, invalid=("static",)),
        text_encoder=comparison({"fp32": 30.0, "dynamic": 15.0}),
    )
    both = Candidate(name="both", variants={"image_encoder": "static", "text_encoder": "dynamic"})
    ratio = combined_ratio(both, found)
    assert not ratio.is_valid
    assert ratio.reasons == ("noise",)


def test_the_last_comparison_that_a_variant_took_part_in_is_what_counts():
    (trials,) = known(model=comparison({"fp32": 10.0, "a": 4.0, "b": 5.0})).values()
    trials.timings.append(Timing(graph="model", comparison=comparison({"fp32": 10.0, "b": 3.0})))
    assert trials.trial("b").ratio == pytest.approx(0.3)
    assert not trials.trial("b").is_rough
    assert trials.trial("a").ratio == pytest.approx(0.4)
    assert trials.trial("a").is_rough
