"""Valley: a video assistant, trained, compared, evaluated and served on Ray.

Importing this package registers the model with Hugging Face's Auto classes, so that `AutoModelForImageTextToText` and
`AutoProcessor` load a saved folder. That loads torch and transformers; a process that must not, such as the one that
decodes media, starts without running this file (`valley.media.sandbox`).

    model = valley.load("runs/demo/finetune/model")
    print(valley.chat(model, "clip.mp4", "What happens?"))
"""

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)

from valley.assistant.answering import chat, stream
from valley.assistant.loading import Assistant, load
from valley.model.configuration import ValleyConfig
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.processing import ValleyProcessor
from valley.model.video_processing import ValleyVideoProcessor

__all__ = [
    "Assistant",
    "ValleyConfig",
    "ValleyForConditionalGeneration",
    "ValleyProcessor",
    "chat",
    "load",
    "stream",
]

AutoConfig.register(ValleyConfig.model_type, ValleyConfig, exist_ok=True)
AutoModelForImageTextToText.register(ValleyConfig, ValleyForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(ValleyConfig, ValleyForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ValleyConfig, ValleyProcessor, exist_ok=True)
AutoVideoProcessor.register(ValleyConfig, video_processor_class=ValleyVideoProcessor, exist_ok=True)
