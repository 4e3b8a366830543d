"""A head that is tied to the embedding, scores and is sharded gets the gradient of both its uses."""

from pathlib import Path

import pytest
import torch

from tests.actors.test_policy import train


@pytest.mark.cluster
def test_a_tied_head_is_gathered_and_trained_under_zero_3(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "sharded").mkdir()
    weights, updates = train(tiny_models["tied"], tmp_path / "sharded", 2, 3, 16)
    expected_weights, expected_updates = train(tiny_models["tied"], tmp_path / "plain", 1, 0, 10_000)
    assert weights.keys() == expected_weights.keys()
    for update, other in zip(updates, expected_updates, strict=True):
        for metric in ("loss", "grad_norm", "entropy"):
            assert update.metrics[metric] == pytest.approx(other.metrics[metric], rel=1e-4, abs=1e-6), metric
    for name, tensor in expected_weights.items():
        assert torch.allclose(weights[name], tensor, atol=5e-6), name
