"""One picture, even with its time, says nothing about what moves where: the arithmetic behind it."""

import numpy as np
import pytest

from valley.data.scenes.motion import SWITCH_S, Cycle, State, Still, Switch

REST = State(0.1, -0.2, 0.3)


def test_a_cycle_rises_evenly_and_starts_over():
    cycle = Cycle("x", -0.6, 0.6, start=0.5, turns=0.75)
    positions = [cycle.at(REST, time_s, 6.0).x for time_s in (0.0, 2.0, 3.9, 4.1, 6.0)]
    assert positions == pytest.approx([0.0, 0.3, 0.585, -0.585, -0.3])
    assert cycle.at(REST, 2.0, 6.0).y == REST.y


def test_a_growing_radius_rises_by_equal_ratios():
    cycle = Cycle("radius", 0.1, 0.4, start=0.0, turns=0.5)
    radii = [cycle.at(REST, time_s, 4.0).radius for time_s in (0.0, 2.0, 4.0)]
    assert radii == pytest.approx([0.1, 0.1 * 4**0.25, 0.2])


@pytest.mark.parametrize("time_s", [0.0, 1.0, 3.0, 4.0])
def test_a_cycle_is_uniform_at_every_time_when_its_start_is(time_s):
    starts = (np.arange(1000) + 0.5) / 1000
    xs = [Cycle("x", -1.0, 1.0, float(start), turns=0.6).at(REST, time_s, 4.0).x for start in starts]
    assert np.sort(xs) == pytest.approx(np.linspace(-1, 1, 1000), abs=0.003)


def test_a_switch_rests_before_and_after_and_is_under_way_in_between():
    switch = Switch("opacity", 0.0, 1.0, at_s=2.5)
    times = [0.0, 2.5 - SWITCH_S / 2, 2.5, 2.5 + SWITCH_S / 2, 4.0]
    assert [switch.at(REST, time_s, 4.0).opacity for time_s in times] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("at_s", [0.5, 1.5, 7.5])
@pytest.mark.parametrize("name", ["x", "y", "radius", "opacity"])
def test_pictures_at_whole_seconds_never_show_a_switch_under_way(name, at_s):
    switch = Switch(name, 0.25, 0.75, at_s)
    seen = {getattr(switch.at(REST, float(second), 10.0), name) for second in range(11)}
    assert seen == {0.25, 0.75}


@pytest.mark.parametrize(
    ("motion", "forwards", "backwards"),
    [
        (Cycle("x", 0.0, 1.0, 0.0, 0.5), "right", "left"),
        (Cycle("y", 0.0, 1.0, 0.0, 0.5), "down", "up"),
        (Cycle("radius", 0.1, 0.4, 0.0, 0.5), "grow", "shrink"),
        (Switch("opacity", 0.0, 1.0, 1.5), "appear", "vanish"),
        (Switch("opacity", 1.0, 0.0, 1.5), "vanish", "appear"),
        (Switch("x", 0.4, -0.4, 1.5), "left", "right"),
    ],
)
def test_played_backwards_every_change_has_the_opposite_name(motion, forwards, backwards):
    assert motion.change(backwards=False) == forwards
    assert motion.change(backwards=True) == backwards


def test_what_is_still_stays_as_it_is():
    assert Still().at(REST, 3.0, 4.0) == REST
