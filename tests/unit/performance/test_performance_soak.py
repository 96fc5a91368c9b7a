"""What is made of a soak's figures."""

from valley.performance.soak import PHASES, Soak, Weighing


def test_memory_is_compared_over_all_phases_by_process_and_from_when_there_was_work() -> None:
    before, between, after = PHASES
    soak = Soak()
    soak.memory += [
        Weighing(before, 0, {"Ingress": 100, "Model": 100, "Decoder": 100}),
        Weighing(before, 50, {"Ingress": 200, "Model": 400, "Decoder": 100}),
        Weighing(between, 510, {"Ingress": 200, "Decoder": 100}),
        Weighing(after, 1000, {"Ingress": 300, "Model": 400, "Decoder": 90}),
    ]
    assert soak.growth == {"Ingress": 1.5, "Model": 1.0, "Decoder": 0.9}
