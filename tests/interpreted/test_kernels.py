"""Every kernel through Triton's interpreter."""

from tests.support.add_layer_norm_properties import *  # noqa: F403
from tests.support.dropout_properties import *  # noqa: F403
from tests.support.kernel_properties import *  # noqa: F403
from tests.support.tile_properties import *  # noqa: F403
from tests.support.token_merging_properties import *  # noqa: F403
