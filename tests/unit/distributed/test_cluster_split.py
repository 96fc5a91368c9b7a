"""The share-out of CPUs and GPUs between training workers and decoders."""

import pytest

from valley.distributed.cluster import share_out
from valley.errors import ClusterError
from valley.training.settings import ClusterSettings

LAPTOP = {"CPU": 2.0, "object_store_memory": 1e9}
NODE = {"CPU": 96.0, "GPU": 8.0, "object_store_memory": 100e9}


def test_a_laptop_trains_on_half_a_cpu_and_decodes_with_the_rest() -> None:
    split = share_out(LAPTOP, ClusterSettings())
    assert (split.num_workers, split.gpu, split.cpus_per_worker, split.num_decoders) == (1, False, 0.5, 3)


def test_a_machine_with_more_cores_computes_on_half_of_them() -> None:
    split = share_out({"CPU": 16.0}, ClusterSettings())
    assert (split.cpus_per_worker, split.num_decoders) == (8, 16)
    assert share_out({"CPU": 16.0}, ClusterSettings(num_workers=3)).cpus_per_worker == 2


def test_decoders_fit_into_half_of_the_memory() -> None:
    assert share_out({"CPU": 16.0, "memory": 8 << 30}, ClusterSettings()).num_decoders == 4
    assert share_out({"CPU": 16.0, "memory": 1 << 30}, ClusterSettings(num_workers=2)).num_decoders == 2


def test_a_gpu_node_gets_a_worker_for_each_gpu_and_equal_decoders() -> None:
    split = share_out(NODE, ClusterSettings(cpus_per_decoder=1))
    assert (split.num_workers, split.gpu, split.num_decoders, split.decoders_per_worker) == (8, True, 88, 11)
    assert split.bytes_per_worker * 8 <= 0.3 * 100e9


def test_decoders_are_shared_equally_and_never_more_than_allowed() -> None:
    split = share_out(NODE, ClusterSettings(max_decoders=30))
    assert split.num_decoders == 24


def test_trainers_that_would_starve_the_decoders_are_refused_with_the_numbers() -> None:
    with pytest.raises(ClusterError, match=r"2 free CPUs, 2 training worker\(s\) take 1 each"):
        share_out(LAPTOP, ClusterSettings(num_workers=2, cpus_per_worker=1))


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ClusterError, match="9 workers need a GPU each, the cluster has 8"):
        share_out(NODE, ClusterSettings(num_workers=9))


def test_gpus_may_be_left_alone() -> None:
    assert share_out(NODE, ClusterSettings(gpu=False)).num_workers == 1


def test_a_range_of_workers_may_grow_to_the_asked_number_where_gpus_are_what_is_short() -> None:
    two_gpus = {"CPU": 24.0, "GPU": 2.0, "object_store_memory": 25e9}
    split = share_out(two_gpus, ClusterSettings(num_workers=(1, 4), cpus_per_decoder=1))
    assert (split.min_workers, split.num_workers, split.max_workers) == (1, 2, 4)
    assert split.is_elastic
    # Of what is there now: 22 CPUs beside the two workers, and their halves of the object store.
    assert (split.num_decoders, split.decoders_per_worker) == (22, 11)
    assert split.bytes_per_worker == split.object_store_bytes // 2
    assert "2 worker(s) (of 1 to 4) with 1 CPU + 1 GPU each; 22 decoder(s)" in str(split)
    one_gpu = two_gpus | {"GPU": 1.0}
    assert share_out(one_gpu, ClusterSettings(num_workers=(1, 4))).is_elastic


def test_workers_that_would_take_the_decoders_cpus_are_not_let_in_later_either() -> None:
    short_of_cpus = {"CPU": 3.0, "GPU": 4.0}
    words = {"num_workers": (1, 4), "cpus_per_decoder": 0.5}
    split = share_out(short_of_cpus, ClusterSettings(**words))
    assert (split.num_workers, split.max_workers) == (2, 2)
    split = share_out(LAPTOP, ClusterSettings(**words))
    assert (split.min_workers, split.num_workers, split.max_workers) == (1, 2, 2)


def test_a_fixed_number_of_workers_stays() -> None:
    assert not share_out(NODE, ClusterSettings(num_workers=8)).is_elastic
    assert share_out(NODE, ClusterSettings(num_workers=(1, 8))).max_workers == 8
