"""Time candidates against each other: own processes, turns, raw samples, an interval and a verdict.

What others use, each from its module, so that a worker loads none of the rest:

- ``spec``: ``Subject`` and ``Protocol`` go in; ``Comparison`` with its ``Measurement`` and ``Ratio`` comes out.
- ``interleave.compare``: subjects in turns.
- ``protocol``: ready-made protocols, and ``extended`` for the one repetition after a comparison that is not valid.
- ``bundles.benchmark_bundles``: whole bundles; this is ``edgevlm.benchmark``.
- ``environment``: where a measurement was taken, and its ``fingerprint`` for the store.

How and why: docs/measuring.md.
"""
