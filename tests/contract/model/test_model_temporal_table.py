"""What every temporal module of the table promises, known or new."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from valley.model.temporal import TEMPORAL

DIM, NUM_PATCHES = 16, 5
LENGTHS = (1, 9, 4, 2)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return TEMPORAL[name](dim=DIM, num_patches=NUM_PATCHES)


def clips() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(length, NUM_PATCHES, DIM) for length in LENGTHS]


def everywhere(length: int) -> Tensor:
    return torch.ones(1, length, dtype=torch.bool)


@pytest.mark.parametrize("name", TEMPORAL)
def test_a_clip_gives_the_same_alone_and_in_a_padded_batch(name: str) -> None:
    module = build(name)
    batch = torch.full((len(LENGTHS), max(LENGTHS), NUM_PATCHES, DIM), torch.nan)
    mask = torch.zeros(batch.shape[:2], dtype=torch.bool)
    for row, clip in enumerate(clips()):
        batch[row, : len(clip)], mask[row, : len(clip)] = clip, True
    together = module(batch, mask)
    assert together.shape == (len(LENGTHS), NUM_PATCHES, DIM)
    for row, clip in enumerate(clips()):
        torch.testing.assert_close(together[row], module(clip[None], everywhere(len(clip)))[0])


@pytest.mark.parametrize("name", TEMPORAL)
def test_training_and_evaluation_mode_agree(name: str) -> None:
    module, clip = build(name), clips()[1][None]
    expected = module.train()(clip, everywhere(9))
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(clip, everywhere(9)), expected)


@pytest.mark.parametrize("name", TEMPORAL)
def test_every_frame_counts_and_every_parameter_trains(name: str) -> None:
    module = build(name)
    patches = clips()[1][None].requires_grad_(True)
    module(patches, everywhere(9)).square().sum().backward()
    assert (patches.grad.abs().amax(dim=(0, 2, 3)) > 0).all()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("name", TEMPORAL)
def test_it_runs_in_bfloat16(name: str) -> None:
    module, clip = build(name), clips()[1][None]
    exact = module(clip, everywhere(9))
    rough = module.to(torch.bfloat16)(clip.to(torch.bfloat16), everywhere(9))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", TEMPORAL)
def test_its_weights_can_be_saved_and_loaded(name: str, tmp_path: Path) -> None:
    module, clip = build(name), clips()[2][None]
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other = TEMPORAL[name](dim=DIM, num_patches=NUM_PATCHES)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other(clip, everywhere(4)), module(clip, everywhere(4)))
