"""A low-rank update begins as none, trains instead of the language model, and adds up to a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_makers import llama, make_model
from peft import PeftModel
from training_makers import STAGE, batch, new_model
from transformers import GPT2Config, PreTrainedConfig

from valley.errors import ModelError
from valley.model.lora import add_lora, merge_adapter, merge_lora, save_adapter
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.settings import LoRASettings
from valley.training.stage import prepare, what_trains

LORA = LoRASettings(rank=4, alpha=12)
ROWS = range(4)


def logits(model: ValleyForConditionalGeneration) -> torch.Tensor:
    inputs = batch(ROWS).model_inputs()
    inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def updated() -> ValleyForConditionalGeneration:
    """A model whose update has values, as if it had been trained, and the projector too."""
    model = new_model()
    add_lora(model, LORA, seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, value in (model.module_parameters("lora") | model.module_parameters("projector")).items():
        if "lora_A" not in name:
            value.data.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return model


def test_a_new_update_changes_nothing_and_is_the_same_for_the_same_seed() -> None:
    first, second = new_model(), new_model()
    expected = logits(first)
    add_lora(first, LORA, seed=3)
    add_lora(second, LORA, seed=3)

    torch.testing.assert_close(logits(first), expected)
    others = second.module_parameters("lora")
    assert all(torch.equal(value, others[name]) for name, value in first.module_parameters("lora").items())


def test_the_update_trains_in_the_place_of_the_language_model() -> None:
    model = new_model()
    add_lora(model, LORA, seed=0)
    stage = STAGE.model_copy(update={"modules": ["temporal", "projector", "llm"], "train_added_tokens": False})
    groups = prepare(model, stage)

    rows = {row.module: row for row in what_trains(model, groups)}
    assert [group.module for group in groups] == ["temporal", "projector", "added_tokens", "lora"]
    assert rows["llm"].num_trainable == rows["vision"].num_trainable == 0
    assert rows["lora"].num_trainable == rows["lora"].num_parameters > 0
    # Two layers of a Llama: rank x (inputs + outputs) of each linear layer, and none beside the output layer.
    linears = [
        module
        for name, module in new_model().language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert rows["lora"].num_parameters == sum(4 * (layer.in_features + layer.out_features) for layer in linears)


def test_merged_it_answers_as_before_without_the_update(updated: ValleyForConditionalGeneration) -> None:
    plain = new_model()
    merged = merge_lora(updated.state_dict(), LORA)

    plain.load_state_dict(merged)

    torch.testing.assert_close(logits(plain), logits(updated), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(new_model()), logits(updated), atol=1e-2)


def test_what_is_saved_fits_pefts_own_model_and_adds_up_to_the_same(
    updated: ValleyForConditionalGeneration, tmp_path: Path
) -> None:
    trained = updated.module_parameters("lora") | updated.module_parameters("projector")
    save_adapter({name: value.data for name, value in trained.items()}, LORA, tmp_path, base="base", llm="llm")

    merged = new_model()
    merge_adapter(tmp_path, merged)
    torch.testing.assert_close(logits(merged), logits(updated), atol=1e-5, rtol=1e-5)

    language_model = PeftModel.from_pretrained(new_model().language_model, str(tmp_path)).merge_and_unload()
    expected = merged.language_model.state_dict()
    for name, value in language_model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def test_places_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^lora\.targets: \['nowhere'\]"):
        add_lora(new_model(), LORA.model_copy(update={"targets": ["nowhere"]}), seed=0)


def test_embeddings_and_an_output_layer_that_shares_their_weights_are_refused() -> None:
    def add(name: str, text: PreTrainedConfig) -> None:
        add_lora(make_model(text=text), LORA.model_copy(update={"targets": [name]}), seed=0)

    with pytest.raises(
        ModelError, match=r"^lora\.targets: \['embed_tokens'\]: .*embed_tokens is a layer of class Embed"
    ):
        add("embed_tokens", llama())
    with pytest.raises(ModelError, match=r"^lora\.targets: \['lm_head'\]: lm_head shares its weights with the input"):
        add("lm_head", llama(tie_word_embeddings=True))
    with pytest.raises(ModelError, match=r"lm_head is a layer of class Linear; .* only those of class Conv1D"):
        add("lm_head", GPT2Config(vocab_size=80, n_embd=32, n_layer=1, n_head=4))
    add("lm_head", llama())


def test_an_adapter_of_another_model_is_refused(updated: ValleyForConditionalGeneration, tmp_path: Path) -> None:
    weights = {name.replace("layers.0", "layers.7"): value.data for name, value in updated.named_parameters()}
    save_adapter({name: value for name, value in weights.items() if "lora_" in name}, LORA, tmp_path, base="", llm="")
    with pytest.raises(ModelError, match=r"an update of language_model\.model\.layers\.7\."):
        merge_adapter(tmp_path, new_model())
