"""The whole table of parity: every model of `tests/parity.py` in its layouts, beside one process, on CPU over gloo.

    python benchmarks/parity.py [MODEL ...]

Prints the tables of benchmarks/parity.md. The models with all layer kinds take all layouts, the others those that users
have most. The test of the same name does a few rows of it.
"""

import os
import platform
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import parity  # noqa: E402

USUAL = ("TP2", "TP2 + SP", "PP2", "PP2, uneven", "VPP2", "CP2", "DP2", "TP2 x PP2", "DP2 x TP2", "TP2 + SP x PP2")


def layouts(model: str) -> list[str]:
    """The layouts that a model is tried in."""
    usual = "MTP" not in model
    return [
        name
        for name, layout in parity.LAYOUTS.items()
        if layout.fits(parity.MODELS[model]) and (name in USUAL or not usual)
    ]


def main() -> None:
    names = ("torch", "megatron-core", "numpy")
    print(
        f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, ", end=""
    )
    print(", ".join(f"{name} {version(name)}" for name in names))
    print(
        f"\nLosses (nats) and gradient norms of {parity.STEPS} steps; in brackets, in units of the moved weights' run:"
    )
    for model in sys.argv[1:] or parity.MODELS:
        began = time.monotonic()
        cases = {model: layouts(model)}
        with tempfile.TemporaryDirectory() as folder:
            rows, wrong = parity.compare(Path(folder), cases, cases)
            print(f"\n## {model}: `{parity.MODELS[model]['layer_pattern']}`\n")
            rounding = rows[0].rounding
            print(f"Moved weights: losses {rounding.loss:.1e}, gradient norm {rounding.grad_norm:.1e} apart.\n")
            print("| layout | processes | losses apart | gradient norms apart | within the tolerance |")
            print("|---|---|---|---|---|")
            for row in rows:
                loss, norm = row.apart.loss / rounding.loss, row.apart.grad_norm / rounding.grad_norm
                print(
                    f"| {row.layout} | {parity.LAYOUTS[row.layout].processes} | {row.apart.loss:.1e} ({loss:.1f}) | "
                    f"{row.apart.grad_norm:.1e} ({norm:.1f}) | {'yes' if row.holds else '**no**'} |",
                    flush=True,
                )
        count = len(cases[model]) * (len(cases[model]) + 1)
        changed = "; ".join(f"{source} -> {target}" for _, source, target in wrong)
        print(f"\n{count - len(wrong)} of {count} checkpoints loaded into another layout come out bit-equal. {changed}")
        print(f"({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
