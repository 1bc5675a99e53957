"""`parity` and `size` as results: the measurements themselves are in parity.py and pack_size.py."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import pack_size
from benchmarks.parity import MaskParity, ModelParity, measure_parity
from benchmarks.record import Result, Table
from persona_edge.find_packs import find_pack
from persona_edge.modeling import load_torch_model

__all__ = ["measure_models", "measure_size"]

_COMPARED = ("INFP", "ENTJ")


def measure_models(models: Sequence[Path], default: Path, *, n_positions: int, n_threads: int | None) -> Result:
    """Parity on each model: INFP and ENTJ of the pack beside `default`, random masks on the others."""
    found = [_parity(path, path == default, n_positions, n_threads) for path in models]
    values = {"n_positions": n_positions, "models": [_values(item) for item in found]}
    caption = (
        f"KL(PyTorch || runtime) in nats over {n_positions} positions, and the share where both find the same token "
        "the likeliest. Sensitivity: the KL ratio of PyTorch against itself with activations rounded as llama.cpp does."
    )
    headers = (
        "model, mask",
        "reference",
        "units",
        "KL unmasked",
        "KL masked",
        "ratio",
        "sensitivity",
        "top-1",
        "holds",
    )
    rows = tuple(_parity_row(item, row) for item in found for row in item.masks)
    return Result("Masked runtime = masked PyTorch", (Table(headers, rows, caption),), values)


def measure_size() -> Result:
    """The lines that pack_size prints, as they are."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pack_size.main()
    lines = printed.getvalue().splitlines()
    text = "\n".join(["```", *lines, "```"])
    return Result("What a mask pack costs beside its entropy", (), {"lines": lines}, (text,))


def _parity(path: Path, is_default: bool, n_positions: int, n_threads: int | None) -> ModelParity:
    model = load_torch_model(path, name=path.stem, device="cpu", dtype="float32")
    if not is_default:
        return measure_parity(model, path, n_positions=n_positions, n_threads=n_threads)
    pack = find_pack(path, _COMPARED, str(path)).pack
    return measure_parity(model, path, n_positions=n_positions, pack=pack, personas=_COMPARED, n_threads=n_threads)


def _values(found: ModelParity) -> dict[str, object]:
    rows = [
        {
            **asdict(row),
            "kl_ratio": row.kl_ratio,
            "median_ratio": row.median_ratio,
            "top1_loss": row.top1_loss,
            "sensitivity": row.sensitivity,
            "holds_as_it_stands": row.holds_as_it_stands,
            "holds": row.holds,
        }
        for row in found.masks
    ]
    return {"file": found.file, "formats": list(found.formats), "base": asdict(found.base), "masks": rows}


def _parity_row(model: ModelParity, row: MaskParity) -> tuple[str, ...]:
    sensitivity = "" if row.sensitivity is None else f"{row.sensitivity:.2f}"
    base, found = row.base.runtime, row.found.runtime
    return (
        f"{model.file} ({', '.join(model.formats)}), {row.persona}",
        row.reference,
        f"{row.n_units:,}",
        f"{base.kl_divergence:.5f} ± {base.kl_error:.5f}",
        f"{found.kl_divergence:.5f} ± {found.kl_error:.5f}",
        f"{row.kl_ratio:.2f}",
        sensitivity,
        f"{base.top1:.1%} → {found.top1:.1%}",
        "as it stands" if row.holds_as_it_stands else "given sensitivity" if row.holds else "no",
    )
