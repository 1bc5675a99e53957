"""Log-probabilities a few rows at a time: the values and gradients of a softmax over everything at once."""

from __future__ import annotations

import pytest
import torch

from persona_edge.forward import ROWS_AT_ONCE, target_log_probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3])
def test_values_and_gradients_are_those_of_one_softmax(n_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n_rows)
    logits = (4 * torch.randn(n_rows, 37, generator=generator)).to(dtype)
    targets = torch.randint(37, (n_rows,), generator=generator)
    weights = torch.randn(n_rows, generator=generator)
    ours, plain = (logits.clone().requires_grad_(True) for _ in range(2))
    found = target_log_probabilities(ours, targets)
    expected = plain.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, plain.grad)


def test_nothing_is_recorded_without_gradients() -> None:
    logits = torch.zeros(3, 5, requires_grad=True)
    with torch.no_grad():
        assert not target_log_probabilities(logits, torch.zeros(3, dtype=torch.int64)).requires_grad
