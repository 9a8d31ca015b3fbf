"""Every kernel through Triton's interpreter."""

from tests.kernel_properties import *  # noqa: F403
