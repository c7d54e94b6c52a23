"""CI is not green with nothing run: what is expected and absent fails."""

from __future__ import annotations

import pytest

from tests.absent import absent


@pytest.mark.parametrize(
    ("expected", "outcome"),
    [
        ("", pytest.skip.Exception),
        ("rtx", pytest.skip.Exception),
        ("ssh", pytest.fail.Exception),
        ("rtx,ssh", pytest.fail.Exception),
    ],
)
def test_what_is_absent_skips_unless_it_is_expected(expected, outcome, monkeypatch):
    monkeypatch.setenv("EDGEVLM_EXPECT", expected)
    with pytest.raises(outcome, match="no server"):
        absent("ssh", "no server")
