import pytest
from tests.dropout_properties import *
from tests.add_layer_norm_properties import *
