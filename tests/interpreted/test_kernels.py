"""Every kernel through Triton's interpreter."""

from tests.add_layer_norm_properties import *  # noqa: F403
from tests.dropout_properties import *  # noqa: F403
from tests.kernel_properties import *  # noqa: F403
from tests.tile_properties import *  # noqa: F403
from tests.token_merging_properties import *  # noqa: F403
