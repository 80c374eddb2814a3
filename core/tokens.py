"""Token ids of records, as data sets keep them and models read them."""

import numpy as np
from numpy.typing import NDArray

Ids = list[NDArray[np.int32]] | NDArray[np.int32]
"""Of each record its own array; or one matrix, a row each, if they are all of one length."""
