"""What two processes exchange."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_deploy.evidence.reload import read_outputs, write_outputs


def test_outputs_that_are_views_of_each_other_arrive_as_they_are(tmp_path: Path) -> None:
    """As CLIP's, whose scores of images are those of texts, transposed."""
    scores = torch.arange(6.0).reshape(2, 3)
    outputs = {"4 rows": {"logits_per_text": scores, "logits_per_image": scores.T, "again": scores}}
    write_outputs(tmp_path / "outputs.safetensors", outputs)
    found = read_outputs(tmp_path / "outputs.safetensors")["4 rows"]
    assert set(found) == set(outputs["4 rows"])
    assert all(torch.equal(found[name], value) for name, value in outputs["4 rows"].items())
