"""Each temporal module against its formula in NumPy, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from valley.model.temporal import TEMPORAL

DIM, NUM_PATCHES = 24, 3


def weights_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def v1(clip: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    return clip.mean(0)


def v2(clip: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    scores = [float(weights["score.weight"][0] @ frame.reshape(-1) + weights["score.bias"][0]) for frame in clip]
    return sum(weight * frame for weight, frame in zip(softmax(np.array(scores)), clip, strict=True))


def v3(clip: np.ndarray, weights: dict[str, np.ndarray], heads: int = 8) -> np.ndarray:
    """The whole encoder layer over all time steps, then its last; loops where the formula has indices."""
    num_frames, num_patches, dim = clip.shape
    encoding = np.zeros((num_frames, dim))
    for t in range(num_frames):
        for i in range(dim // 2):
            encoding[t, 2 * i] = np.sin(t / 10000 ** (2 * i / dim))
            encoding[t, 2 * i + 1] = np.cos(t / 10000 ** (2 * i / dim))
    w = {name.removeprefix("layer."): value for name, value in weights.items()}
    out = np.zeros((num_patches, dim))
    for p in range(num_patches):
        x = clip[:, p] + encoding
        q, k, v = np.split(x @ w["self_attn.in_proj_weight"].T + w["self_attn.in_proj_bias"], 3, axis=-1)
        attended = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            attention = softmax(q[:, part] @ k[:, part].T / np.sqrt(dim // heads))
            attended[:, part] = attention @ v[:, part]
        attended = attended @ w["self_attn.out_proj.weight"].T + w["self_attn.out_proj.bias"]
        x = layer_norm(x + attended, w["norm1.weight"], w["norm1.bias"])
        hidden = np.maximum(x @ w["linear1.weight"].T + w["linear1.bias"], 0)
        x = layer_norm(x + hidden @ w["linear2.weight"].T + w["linear2.bias"], w["norm2.weight"], w["norm2.bias"])
        out[p] = x[-1] + clip[:, p].mean(0)
    return out


FORMULAS = {"v1": v1, "v2": v2, "v3": v3}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = TEMPORAL[name](dim=DIM, num_patches=NUM_PATCHES).double()
    for parameter in module.parameters():  # away from zeros and ones, so that every weight matters
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def clip_of(num_frames: int) -> np.ndarray:
    return np.random.default_rng(num_frames).normal(size=(num_frames, NUM_PATCHES, DIM))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("training", [True, False])
def test_a_clip_alone_equals_the_formula_for_every_length(name: str, training: bool) -> None:
    module = build(name).train(training)
    for num_frames in range(1, 41):
        clip = clip_of(num_frames)
        with torch.no_grad():
            found = module(torch.from_numpy(clip)[None], torch.ones(1, num_frames, dtype=torch.bool))[0].numpy()
        np.testing.assert_allclose(found, FORMULAS[name](clip, weights_of(module)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("garbage", [1e6, np.nan])
def test_a_clip_in_a_padded_batch_equals_the_formula_whatever_the_padding_holds(name: str, garbage: float) -> None:
    module = build(name)
    lengths = [40, 1, 7, 2, 13, 39]
    batch = np.full((len(lengths), 40, NUM_PATCHES, DIM), garbage)
    mask = np.zeros((len(lengths), 40), dtype=bool)
    for row, length in enumerate(lengths):
        batch[row, :length], mask[row, :length] = clip_of(length), True
    found = module(torch.from_numpy(batch), torch.from_numpy(mask)).detach().numpy()
    for row, length in enumerate(lengths):
        expected = FORMULAS[name](clip_of(length), weights_of(module))
        np.testing.assert_allclose(found[row], expected, rtol=1e-9, atol=1e-10, err_msg=f"{length} frames")


@pytest.mark.parametrize("name", FORMULAS)
def test_padding_gets_no_gradient_and_every_parameter_gets_one(name: str) -> None:
    module = build(name)
    patches = torch.randn(2, 5, NUM_PATCHES, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    module(patches, mask).square().sum().backward()
    assert patches.grad is not None
    assert patches.grad[1, 2:].abs().max() == 0
    assert (patches.grad[mask].abs().amax(dim=(1, 2)) > 0).all()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_v3_takes_the_largest_number_of_heads_that_divides_the_width() -> None:
    heads = {dim: TEMPORAL["v3"](dim=dim, num_patches=1).layer.self_attn.num_heads for dim in (1024, 96, 12, 7, 11)}
    assert heads == {1024: 8, 96: 8, 12: 6, 7: 7, 11: 1}


def test_v3_adds_encodings_to_an_odd_width() -> None:
    module = TEMPORAL["v3"](dim=7, num_patches=2)
    assert module(torch.randn(1, 3, 2, 7), torch.ones(1, 3, dtype=torch.bool)).shape == (1, 2, 7)


def test_v1_in_bfloat16_rounds_once_not_at_every_frame() -> None:
    patches = torch.full((1, 40, 1, 1), 1.0, dtype=torch.bfloat16)
    patches[0, 0] = 256.0  # 256 + 1 is 256 in bfloat16: a running sum in bfloat16 would lose the other 39
    mean = TEMPORAL["v1"](dim=1, num_patches=1)(patches, torch.ones(1, 40, dtype=torch.bool))
    assert mean.item() == torch.tensor((256 + 39) / 40, dtype=torch.bfloat16).item()


def test_v3_table_is_v3_until_its_table_holds_something_else() -> None:
    module = build("v3_table")
    clip = clip_of(7)

    def run(patches: np.ndarray) -> np.ndarray:
        mask = torch.ones(1, len(patches), dtype=torch.bool)
        with torch.no_grad():
            return module(torch.from_numpy(patches)[None], mask)[0].numpy()

    np.testing.assert_allclose(run(clip), v3(clip, weights_of(module)), rtol=1e-5, atol=1e-5)  # a table in float32
    shift = np.random.default_rng(0).normal(size=(7, DIM))
    before = module.position_table.clone()
    module.position_table[:7] = torch.from_numpy(shift) + before[:7]
    moved = run(clip)
    module.position_table.copy_(before)
    mean_of_shift = shift.mean(0)  # the mean is taken of the patches without positions
    np.testing.assert_allclose(moved, run(clip + shift[:, None]) - mean_of_shift, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="2049 frames, but the table of positions ends after 2048"):
        module.positions(2049)
