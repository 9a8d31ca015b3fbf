"""Compare connectors and numbers of visual tokens by cost, and measure the choice."""

from vlm_fast.advisor.advice import Advice as Advice
from vlm_fast.advisor.advice import advise as advise
from vlm_fast.advisor.connectors import CONNECTORS as CONNECTORS
from vlm_fast.advisor.model_shapes import MODELS as MODELS
from vlm_fast.advisor.model_shapes import LanguageModel as LanguageModel
from vlm_fast.advisor.model_shapes import ModelShape as ModelShape
from vlm_fast.advisor.model_shapes import VisionTower as VisionTower
from vlm_fast.advisor.option import Option as Option
