"""What every training shares follows from the step's number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgevlm.quantization.fine_tuning import Training
from edgevlm.training.log import Log, Speed
from edgevlm.training.schedule import batch_of, batch_with_epochs, rate_at


def test_epochs_count_how_often_all_pictures_were_seen() -> None:
    training = Training(batch_size=8, n_steps=10)
    seen = [each for step in range(5) for each in batch_with_epochs(step, 20, training)]
    assert [epoch for _, epoch in seen] == [0] * 20 + [1] * 20
    assert [index for index, _ in seen[:8]] == batch_of(0, 20, training)


def test_another_seed_is_another_order() -> None:
    orders = [batch_of(0, 50, Training(batch_size=50, seed=seed)) for seed in range(3)]
    assert sorted(orders[0]) == list(range(50)) and orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(("share", "warmest"), [(0.0, 0), (0.1, 9), (0.5, 49)])
def test_the_rate_is_highest_where_warming_up_ends(share: float, warmest: int) -> None:
    training = Training(n_steps=100, learning_rate=1.0)
    rates = [rate_at(step, training, warmup_share=share) for step in range(100)]
    assert rates.index(max(rates)) == warmest and rates[warmest] == 1.0 and rates[-1] < 2e-3


def test_a_log_goes_on_where_the_checkpoint_stands(tmp_path: Path) -> None:
    file = tmp_path / "training.jsonl"
    log = Log(file, n_done=0, is_main=True)
    for step in range(4):
        log.add({"step": step})
    log.flush()
    log.add({"step": 4})  # no checkpoint came after it
    again = Log(file, n_done=2, is_main=True)
    again.add({"step": "two, again"})
    again.flush()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, "two, again"]


def test_a_process_that_helps_writes_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path / "training.jsonl", n_done=0, is_main=False)
    log.add({"step": 0})
    log.flush()
    assert not list(tmp_path.iterdir())


def test_the_first_speed_is_not_an_average_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr("edgevlm.training.log.time.monotonic", lambda: next(times))
    speed = Speed()
    assert speed.add(10) == 5.0
    assert speed.add(10) == pytest.approx(0.9 * 5 + 0.1 * 10)
