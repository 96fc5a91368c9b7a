"""What is held out: the asked share of every source, and never a medium that is also trained on."""

import numpy as np

from valley.data.split import split_rows

Media = list[tuple[int, ...]]


def split(media: Media, sources: list[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    rows = np.array([row for row, keys in enumerate(media) for _ in keys])
    keys = np.array([key for keys in media for key in keys], dtype=np.uint64)
    train, held_out = split_rows(np.array(sources), rows, keys, fraction=fraction, seed=seed)
    assert sorted([*train, *held_out]) == list(range(len(media)))
    return train.tolist(), held_out.tolist()


def test_the_share_holds_in_every_source() -> None:
    media: Media = [(key,) for key in range(1000)]
    sources = [0] * 900 + [1] * 100
    _, held_out = split(media, sources, 0.1)
    assert sum(row < 900 for row in held_out) == 90
    assert sum(row >= 900 for row in held_out) == 10


def test_questions_about_one_clip_stay_together() -> None:
    media: Media = [(row // 5,) for row in range(500)]
    train, held_out = split(media, [0] * 500, 0.2)
    assert len(held_out) == 100
    assert not {row // 5 for row in train} & {row // 5 for row in held_out}


def test_rows_stay_together_through_chains_of_shared_media() -> None:
    chain: Media = [(row, row + 1) for row in range(50)]  # every row shares a medium with the next only
    media = chain + [(1000 + row,) for row in range(150)]
    for seed in range(20):
        train, held_out = split(media, [0] * 200, 0.5, seed)
        assert set(range(50)) <= set(train) or set(range(50)) <= set(held_out)
        assert 50 <= len(held_out) <= 150


def test_a_medium_of_two_sources_is_on_one_side() -> None:
    media: Media = [(row % 100,) for row in range(200)]
    train, held_out = split(media, [0] * 100 + [1] * 100, 0.3)
    assert not {row % 100 for row in train} & {row % 100 for row in held_out}
    assert len(held_out) == 60


def test_the_seed_decides_and_order_and_size_of_the_data_do_not() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 400).tolist()
    _, held_out = split([(key,) for key in keys], [0] * 400, 0.25)
    _, again = split([(key,) for key in reversed(keys)], [0] * 400, 0.25)
    _, other = split([(key,) for key in keys], [0] * 400, 0.25, seed=1)
    assert {keys[row] for row in held_out} == {keys[::-1][row] for row in again}
    assert len({keys[row] for row in held_out} & {keys[row] for row in other}) < 50
    _, fewer = split([(key,) for key in keys[:200]], [0] * 200, 0.25)
    assert len({keys[row] for row in fewer} - {keys[row] for row in held_out}) < 15


def test_nothing_held_out_and_never_a_whole_source() -> None:
    media: Media = [(row,) for row in range(10)]
    assert split(media, [0] * 10, 0.0)[1] == []
    assert split([(1,)] * 10, [0] * 10, 0.9)[1] == []
    assert len(split(media, [0] * 10, 0.99)[1]) == 9
