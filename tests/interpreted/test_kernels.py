"""Every kernel through Triton's interpreter."""

from kernel_properties import *  # noqa: F403
