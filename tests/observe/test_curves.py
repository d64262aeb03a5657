"""curves.png: the right panels, whatever a run has logged."""

import struct

import numpy as np

from laser_fast.observe.curves import PANELS, draw_curves, smooth


def _size(path) -> tuple[int, int]:
    """Width and height from the PNG's header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_smoothing_by_hand():
    np.testing.assert_allclose(smooth([1.0, 2.0, 6.0, 3.0], 1), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(smooth([1.0, 5.0, 2.0], 0), [1.0, 5.0, 2.0])
    np.testing.assert_allclose(smooth([4.0], 3), [4.0])
    np.testing.assert_allclose(smooth([1.0, 3.0], 9), [2.0, 2.0])


def test_only_panels_with_data_are_drawn(tmp_path):
    keys = [key for panel in PANELS for key in panel.lines]
    full = [{"step": s} | dict.fromkeys(keys, 0.1 * s) for s in range(5)]
    full[2]["score/f1"] = None
    evaluations = {0: {"accuracy": 0.5, "f1": None}, 5: {"accuracy": 0.8, "f1": 0.7}}
    draw_curves(full, evaluations, tmp_path / "full.png")
    draw_curves([{"step": 0, "reward/mean": 0.5}], {}, tmp_path / "one.png")
    width, height = _size(tmp_path / "full.png")
    assert len(PANELS) == 9 and _size(tmp_path / "one.png") == (width, height // 3)


def test_every_panel_reads_a_documented_stage():
    stages = {"reward", "score", "advantage", "loss", "rollout", "step", "throughput"}
    assert {key.split("/")[0] for panel in PANELS for key in panel.lines} <= stages
