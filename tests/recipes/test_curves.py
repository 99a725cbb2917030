"""`hybrid plot`: the curves of runs as a picture."""

import builtins
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from hybrid.errors import ConfigError
from recipes import curves


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 3,000 steps with two validations, the last line half written, and a step that was no number."""
    folder = tmp_path / "run <1>"
    folder.mkdir()
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 9 / (1 + step / 100), "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1000 + step}
        for step in range(1, 3001)
    ]
    lines[10]["loss"] = None
    lines.insert(1500, {"step": 1500, "held out_loss": 1.0, "held out_bits_per_byte": 1.5})
    lines.append({"step": 3000, "held out_loss": 0.5, "held out_bits_per_byte": 0.75})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3001, "lo')
    return folder


def test_curves_are_what_metrics_jsonl_has(run: Path) -> None:
    found = curves.read(run)
    assert found.last("loss") == 9 / 31
    assert len(found.metrics["loss"][0]) == 2999
    assert found.validations() == ["held out"]
    assert found.metrics["held out_bits_per_byte"] == ([1500, 3000], [1.5, 0.75])


def test_a_png_holds_several_runs(run: Path, tmp_path: Path) -> None:
    curves.draw([curves.read(run), curves.read(run)], tmp_path / "two.png")
    data = (tmp_path / "two.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1950, 1200)


def test_noise_is_smoothed_and_the_learning_rate_left_as_it_is() -> None:
    noisy = [1.0 + step % 2 for step in range(200)]
    warm_up = [min(step / 10, 1.0) for step in range(200)]
    steps = list(range(200))
    run = curves.Curves("run", {"loss": (steps, noisy), "lr": (steps, warm_up)})
    loss, _, rate, _ = curves._figure([run]).axes
    assert all(abs(value - 1.5) < 0.2 for value in loss.lines[-1].get_ydata())
    assert list(rate.lines[-1].get_ydata()) == warm_up


def test_a_page_needs_nothing_but_itself(run: Path, tmp_path: Path) -> None:
    curves.draw([curves.read(run)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<td>run &lt;1&gt;</td><td>3,000</td><td>0.2903</td><td>0.750</td><td>2,500</td>" in page.replace(
        "501", "500"
    )
    assert "<svg" in page
    assert not re.search(r"""(src|href)\s*=\s*["']https?:|@import|url\(http""", page)


def test_long_curves_are_thinned_to_means_of_neighbours(run: Path) -> None:
    steps, values = curves._thin([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0])
    assert (steps, values) == ([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0])
    steps, values = curves._thin(list(range(3000)), [float(step) for step in range(3000)])
    assert len(values) == 1500
    assert values[:2] == [0.5, 2.5] == steps[:2]


def test_a_run_without_a_step_and_a_wrong_format_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no step is recorded yet, so there is nothing to draw"):
        curves.read(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"picture.pdf' is no \.png or \.html file"):
        curves.draw([curves.read(run)], tmp_path / "picture.pdf")
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory; --output names another file"):
        curves.draw([curves.read(run)], tmp_path / "no" / "picture.png")


def test_without_matplotlib_the_way_to_get_it_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"matplotlib, which is not installed here; `(uv )?pip install matplotlib`"):
        curves.draw([curves.read(run)], tmp_path / "a.png")
