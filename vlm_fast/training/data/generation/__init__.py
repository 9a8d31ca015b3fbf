"""Generate instruction data from captions and boxes with a language model.

The method is LLaVA's (arXiv 2304.08485, section 3): the language model sees no images.
"""

from vlm_fast.training.data.generation.coco import Box as Box
from vlm_fast.training.data.generation.coco import Scene as Scene
from vlm_fast.training.data.generation.coco import read_scenes as read_scenes
from vlm_fast.training.data.generation.endpoint import Endpoint as Endpoint
from vlm_fast.training.data.generation.endpoint import Unavailable as Unavailable
from vlm_fast.training.data.generation.prompts import KINDS as KINDS
from vlm_fast.training.data.generation.rate_limit import RateLimit as RateLimit
from vlm_fast.training.data.generation.run import GenerationRun as GenerationRun
from vlm_fast.training.data.generation.run import Task as Task
