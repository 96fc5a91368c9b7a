"""Whatever a run leaves behind becomes the same plain folder, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_makers import batch, run_settings, write_data

from valley.checkpoints import store
from valley.checkpoints.export import export_model, main
from valley.checkpoints.hub import push_folder
from valley.errors import CheckpointError
from valley.media.sampling import Sampling
from valley.model.lora import BASE_FILE
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor
from valley.training.job import open_job, prepare_job
from valley.training.run import train_rank

LLM_TOO = ["temporal", "projector", "llm"]
FROZEN = "vision_tower.visual.conv1.weight"


def train(folder: Path, **changes: Any) -> Path:
    """A finished run of two steps, with a checkpoint after each; returns its folder."""
    folder.mkdir()
    pictures = write_data(folder, "pictures", 8)
    settings = run_settings(folder, [pictures], checkpoint={"every_steps": 1}, **changes.pop("whole", {}))
    stage = settings.train.model_copy(update={"max_steps": 2, "learning_rate": 3e-2, **changes})
    source = settings.data.sources[0].model_copy(update={"sampling": Sampling(fps=2.0)})
    settings = settings.model_copy(
        update={"train": stage, "data": settings.data.model_copy(update={"sources": [source]})}
    )
    train_rank(open_job(prepare_job(settings)), device=torch.device("cpu"))
    return Path(settings.output)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tower and language model are frozen, in bf16."""
    return train(tmp_path_factory.mktemp("export") / "first", precision="bf16")


@pytest.fixture(scope="module")
def second_stage(first_stage: Path) -> Path:
    """A low-rank update of the model of the first stage, in bf16 too."""
    model = {"path": str(first_stage / "model")}
    whole = {"model": model, "lora": {"rank": 2, "alpha": 8}}
    return train(first_stage.parent.parent / "second", precision="bf16", modules=LLM_TOO, whole=whole)


@pytest.fixture(scope="module")
def new_with_lora(first_stage: Path) -> Path:
    """A low-rank update of a model that was new."""
    return train(first_stage.parent.parent / "new", modules=LLM_TOO, whole={"lora": {"rank": 2}})


def logits(folder: Path) -> torch.Tensor:
    model = ValleyForConditionalGeneration.from_pretrained(folder)
    inputs = batch(range(4)).model_inputs()
    inputs.pop("labels")
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("run", "source"),
    [
        ("first_stage", "."),
        ("first_stage", "model"),
        ("first_stage", "checkpoints/step-00000002"),
        ("second_stage", "adapter"),
        ("second_stage", "checkpoints/step-00000002"),
        ("new_with_lora", "adapter"),
        ("new_with_lora", "checkpoints/step-00000002"),
    ],
)
def test_each_source_gives_the_model_of_its_run(
    run: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(run)

    exported = export_model(folder / source, tmp_path / "plain")

    assert torch.equal(logits(exported), logits(folder / "model"))
    processor = ValleyProcessor.from_pretrained(exported)
    assert processor.to_dict() == ValleyProcessor.from_pretrained(folder / "model").to_dict()
    assert processor.source_sampling == {"pictures": Sampling(fps=2.0)}
    generation = "generation_config.json"
    assert (exported / generation).read_text() == (folder / "model" / generation).read_text()


def test_an_earlier_checkpoint_gives_the_model_of_its_step(second_stage: Path, tmp_path: Path) -> None:
    exported = export_model(second_stage / "checkpoints/step-00000001", tmp_path / "plain")

    assert not torch.equal(logits(exported), logits(second_stage / "model"))
    card = (exported / "README.md").read_text()
    assert "after 1 steps" in card
    assert "training loss" not in card  # the run's figures are not this model's


def test_in_fp32_a_checkpoint_keeps_its_masters_and_shards_are_small(first_stage: Path, tmp_path: Path) -> None:
    checkpoint = first_stage / "checkpoints/step-00000002"
    masters = load_file(checkpoint / "rank-00000" / store.WEIGHTS_FILE)

    exported = export_model(checkpoint, tmp_path / "plain", dtype=torch.float32, shard_gib=2**-11)

    found = weights(exported)
    assert all(torch.equal(found[name], value) for name, value in masters.items())
    assert not torch.equal(masters["projector.weight"], masters["projector.weight"].bfloat16().float())
    sizes = [path.stat().st_size for path in exported.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 1.1 * 2**19
    loaded = ValleyForConditionalGeneration.from_pretrained(exported)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_the_command_casts(first_stage: Path, tmp_path: Path) -> None:
    assert main([str(first_stage), str(tmp_path / "plain"), "--dtype", "fp16"]) == 0

    exact = weights(first_stage / "model")
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, exact[name].to(value.dtype))
    assert weights(tmp_path / "plain")["projector.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "plain/config.json").read_text())["dtype"] == "float16"


def test_the_card_says_what_it_is_and_nothing_about_the_machine(second_stage: Path, tmp_path: Path) -> None:
    card = (export_model(second_stage / "adapter", tmp_path / "mine", name="me/mine") / "README.md").read_text()
    summary = json.loads((second_stage / "summary.json").read_text())

    assert "# mine\n" in card
    assert 'valley.load("me/mine")' in card
    assert f"| training loss, last step | {summary['loss_last']:.4f} |" in card
    assert "| pictures | second/pictures.json | 1 | 2 a second, at most 100 |" in card
    assert "  path: run/model\n" in card
    assert "  rank: 2\n" in card
    assert "transformers 5" in card
    assert str(second_stage.parent) not in card


def changed_base(checkpoint: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint that stands on a changed copy of its model."""
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    manifest = json.loads((copy / store.MANIFEST).read_text())
    base = shutil.copytree(manifest["info"]["settings"]["model"]["path"], folder / "base")
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    manifest["info"]["settings"]["model"]["path"] = str(base)
    (copy / store.MANIFEST).write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("name", "part"), [(FROZEN, "vision"), ("language_model.model.layers.1.mlp.up_proj.weight", "llm")]
)
def test_a_frozen_weight_that_changed_is_refused(second_stage: Path, tmp_path: Path, name: str, part: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] += 1

    checkpoint = changed_base(second_stage / "checkpoints/step-00000002", tmp_path, change)

    with pytest.raises(CheckpointError, match=f"step-00000002: the frozen part '{part}' .* expected sha256"):
        export_model(checkpoint, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_trained_weight_of_the_base_may_be_another(second_stage: Path, tmp_path: Path) -> None:
    checkpoint = changed_base(
        second_stage / "checkpoints/step-00000002", tmp_path, lambda tensors: tensors["projector.weight"].zero_()
    )
    assert torch.equal(logits(export_model(checkpoint, tmp_path / "plain")), logits(second_stage / "model"))


def lose_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).unlink()


def flip_a_bit(folder: Path) -> None:
    path = folder / "rank-00000" / store.WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def lose_base(folder: Path) -> None:
    path = folder / store.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["info"]["settings"]["model"]["path"] = "/no/such/model"
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lose_manifest, "no manifest.json: the checkpoint is not complete"),
        (flip_a_bit, r"weights.safetensors: expected sha256"),
        (lose_base, "model.path: there is no /no/such/model"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    second_stage: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    copy = shutil.copytree(second_stage / "checkpoints/step-00000002", tmp_path / "copy")
    damage(copy)
    with pytest.raises(CheckpointError, match=f"{copy}.*{reason}"):
        export_model(copy, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_damaged_update_is_refused(second_stage: Path, new_with_lora: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(second_stage / "adapter", tmp_path / "copy")
    (copy / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=str(copy)):
        export_model(copy, tmp_path / "plain")

    alone = shutil.copytree(new_with_lora / "adapter", tmp_path / "alone")
    assert json.loads((alone / BASE_FILE).read_text())["model"] == ""
    with pytest.raises(CheckpointError, match=f"{alone}: it stands on a new model, which only"):
        export_model(alone, tmp_path / "plain")


def test_what_fp16_cannot_hold_is_refused(first_stage: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(first_stage / "model", tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["projector.weight"][0, 0] = 1e5
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match=r"projector.weight is not finite, or too large for float16"):
        export_model(copy, tmp_path / "plain", dtype=torch.float16)
    assert not (tmp_path / "plain").exists()


def test_other_folders_and_full_targets_are_refused(first_stage: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/none: no such folder"):
        export_model(tmp_path / "none", tmp_path / "plain")
    with pytest.raises(CheckpointError, match=f"{first_stage}/checkpoints: nothing to export"):
        export_model(first_stage / "checkpoints", tmp_path / "plain")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/full: exists already"):
        export_model(first_stage, tmp_path / "full")
    assert main([str(first_stage), str(tmp_path / "plain"), "--push", "not/a/name"]) == 2
    assert not (tmp_path / "plain").exists()


class FakeHub:
    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self._error = error

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.asked.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        if self._error:
            raise self._error
        self.asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"hub/{repo_id}"


def test_a_folder_is_pushed_to_a_private_repository(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    hub = FakeHub()

    assert push_folder(tmp_path, "me/mine", hub) == "hub/me/mine"
    assert hub.asked == [("me/mine", True, True), ("me/mine", ["config.json"])]
    with pytest.raises(CheckpointError, match="written, but not pushed to me/mine: no token"):
        push_folder(tmp_path, "me/mine", FakeHub(OSError("no token")))
