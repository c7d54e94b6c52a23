"""Several graphs: which combinations are candidates, and what their times add up to."""

import pytest

from edgevlm.measure.spec import Comparison, Environment, Measurement, Protocol, Ratio
from edgevlm.search.spec import Candidate, Variant
from edgevlm.steps.search import _candidates, combined_ratio

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


def variants(graph, *names):
    return tuple(Variant(graph=graph, name=name, precision=name, backend="onnxruntime") for name in names)


def test_with_one_graph_every_variant_is_a_candidate():
    made = _candidates(("model",), variants("model", "fp32", "fast", "slow"), {"model": comparison({"fp32": 10.0})})
    assert [candidate.name for candidate in made] == ["fp32", "fast", "slow"]


def test_with_two_graphs_only_what_beats_float_is_combined_fastest_first():
    comparisons = {
        "image_encoder": comparison({"fp32": 10.0, "static": 4.0, "slow": 12.0}),
        "text_encoder": comparison({"fp32": 20.0, "dynamic": 8.0, "unsure": 9.0}, invalid=("unsure",)),
    }
    known = variants("image_encoder", "fp32", "static", "slow") + variants("text_encoder", "fp32", "dynamic", "unsure")
    made = _candidates(("image_encoder", "text_encoder"), known, comparisons)
    assert [candidate.variants for candidate in made] == [
        {"image_encoder": "fp32", "text_encoder": "fp32"},
        {"image_encoder": "static", "text_encoder": "dynamic"},
        {"image_encoder": "fp32", "text_encoder": "dynamic"},
        {"image_encoder": "static", "text_encoder": "fp32"},
    ]
    assert made[0].name == "fp32"
    assert made[1].name == "image:static+text:dynamic"


def test_ratios_add_up_by_the_time_that_each_graph_takes():
    comparisons = {
        "image_encoder": comparison({"fp32": 10.0, "static": 4.0}),
        "text_encoder": comparison({"fp32": 30.0, "dynamic": 15.0}),
    }
    both = Candidate(name="both", variants={"image_encoder": "static", "text_encoder": "dynamic"})
    ratio = combined_ratio(both, comparisons)
    assert ratio.value == pytest.approx((4 + 15) / 40)
    assert ratio.low < ratio.value < ratio.high
    only_image = Candidate(name="image", variants={"image_encoder": "static", "text_encoder": "fp32"})
    assert combined_ratio(only_image, comparisons).value == pytest.approx((4 + 30) / 40)
    assert combined_ratio(Candidate(name="fp32", variants={}), comparisons) is None


def test_a_combination_is_as_valid_as_its_parts():
    comparisons = {
        "image_encoder": comparison({"fp32": 10.0, "static": 4.0}, invalid=("static",)),
        "text_encoder": comparison({"fp32": 30.0, "dynamic": 15.0}),
    }
    both = Candidate(name="both", variants={"image_encoder": "static", "text_encoder": "dynamic"})
    ratio = combined_ratio(both, comparisons)
    assert not ratio.is_valid
    assert ratio.reasons == ("noise",)
