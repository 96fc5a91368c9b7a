"""What a Valley model is made of, as a Hugging Face configuration."""

from typing import Any, ClassVar, Literal, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from valley.errors import ModelError
from valley.media.transform import Interpolation, ResizeMode
from valley.model.miniatures import TOWERS
from valley.model.temporal import TEMPORAL


@no_type_check  # strict checks the fields; the tests' shape checker would refuse what `__post_init__` takes besides
@strict
class ValleyVisionConfig(PreTrainedConfig):
    """A frozen vision tower, whole: a saved model is built from this, without asking open_clip for the tower's name.

    Made by `valley.model.vision.vision_config`; the defaults describe the tiny tower.

    Attributes:
        name: open_clip's name of the tower.
        pretrained: open_clip's tag or the file the weights came from; None: random.
        tower: open_clip's description of the model.
        layer: block whose output is used, counted from the end when negative (-1 is the last).
        hidden_size: width D of the tokens.
        num_patches: patches P of a frame.
        size_px: side S of the frames.
        mean: mean of each channel, of values in 0..1.
        std: standard deviation of each channel.
        interpolation: filter of the resize, in open_clip's words.
        resize_mode: how a frame is brought to the square, in open_clip's words.
        micro_batch: frames that go through the tower at once.
    """

    model_type = "valley_vision"
    base_config_key = "vision_config"

    name: str = "tiny"
    pretrained: str | None = None
    tower: dict[str, Any] | None = None
    layer: int = -2
    hidden_size: int = 64
    num_patches: int = 16
    size_px: int = 56
    mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    micro_batch: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers
        if self.tower is None:
            self.tower = TOWERS["tiny"]


@no_type_check  # strict checks the fields; the tests' shape checker would refuse what `__post_init__` takes besides
@strict
class ValleyConfig(PreTrainedConfig):
    """A vision tower, a temporal module, a projector and a language model (paper 4.1).

    Attributes:
        vision_config: the tower.
        text_config: any Hugging Face causal language model.
        temporal: the temporal module, a name in `valley.model.temporal.TEMPORAL`.
        placement: whether the temporal module stands before the projector, as in the paper, or after it, as in the code
            that its authors published.
        image_start_token_id: `<im_start>`.
        image_patch_token_id: `<im_patch>`, replaced by the P visual tokens that the temporal module makes.
        image_end_token_id: `<im_end>`.
        video_start_token_id: `<vi_start>`.
        video_frame_token_id: `<vi_frame>`, replaced by one frame's global token.
        video_end_token_id: `<vi_end>`.

    Raises:
        ModelError: no such temporal module.
    """

    model_type = "valley"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": ValleyVisionConfig,
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: Any = None  # given as a dictionary or a configuration, it is a configuration afterwards
    vision_config: Any = None
    temporal: str = "v1"
    placement: Literal["before_projector", "after_projector"] = "before_projector"
    image_start_token_id: int = 32000
    image_patch_token_id: int = 32001
    image_end_token_id: int = 32002
    video_start_token_id: int = 32003
    video_frame_token_id: int = 32004
    video_end_token_id: int = 32005

    def __post_init__(self, **kwargs: Any) -> None:
        # The base class hands `attn_implementation` down, and None with it: a loaded language model keeps its own.
        kwargs.setdefault("attn_implementation", getattr(self.text_config, "_attn_implementation", None))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers
        if self.temporal not in TEMPORAL:
            raise ModelError(f"model.temporal: no module is called {self.temporal!r}; known: {', '.join(TEMPORAL)}")

    @property
    def added_token_ids(self) -> list[int]:
        """Ids of the six added tokens, in the order of `valley.model.conversation.ADDED_TOKENS`."""
        return [
            self.image_start_token_id,
            self.image_patch_token_id,
            self.image_end_token_id,
            self.video_start_token_id,
            self.video_frame_token_id,
            self.video_end_token_id,
        ]
