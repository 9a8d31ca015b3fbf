"""Every kernel through Triton's interpreter."""

from tests.kernel_properties import *  # noqa: F403
from tests.tile_properties import *  # noqa: F403
