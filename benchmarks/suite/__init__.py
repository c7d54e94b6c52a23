"""What edgevlm ships against what else a user could run, model by model: ``python -m benchmarks.suite``.

Every rival is made and run in an environment of its own; on each model all of them and edgevlm's winner take turns.

- ``cases``: the models. ``rivals``: the others, each a value. ``environments``: a venv for each.
- ``making``: a rival's artifact, made in its environment by a function of ``makers``.
- ``backends``: what opens an artifact that edgevlm's runtime has no backend for.
- ``remote``: an artifact in its environment as a ``Session`` here, so that edgevlm's own code judges it.
- ``judging``, ``timing``: one rule and one protocol for everyone. ``table``: what is told.
"""
