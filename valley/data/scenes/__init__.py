"""Generated clips of simple scenes: the offline stand-in for WebVid, and the yardstick of the temporal modules.

Objects with a colour, a shape and a motion on varied backgrounds, as real H.264 files of 4 to 24 seconds, with captions
and dialogues in the paper's format (appendix B). Questions need what they ask:

- Answers come equally often, whatever else is in the picture, and no wording goes with an answer.
- Every scene whose question needs time is shown twice, forwards and backwards: the same pictures, the same question,
  opposite answers. Without the order of the pictures such a question cannot be answered better than by chance.
- Nor with any one picture, not even when its time is known: see `motion.py` for why that takes cyclic motion. That
  holds of the decoded frames, too: clips are coded without loss, for a codec treats what an object has uncovered unlike
  what it has yet to cover, see `encode.py`.

`KINDS` says of each kind of question whether one frame suffices.
"""

from valley.data.scenes.plan import DESIGNS
from valley.data.scenes.questions import KINDS
from valley.data.scenes.scene import PATTERNS
from valley.data.scenes.write import ScenesInfo, make_scenes

__all__ = ["DESIGNS", "KINDS", "PATTERNS", "ScenesInfo", "make_scenes"]
