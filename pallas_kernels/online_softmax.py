"""Constants of the online softmax (arXiv 2205.14135, section 3.1), which all backends share."""

import math

LOG2E = math.log2(math.e)
# Where a running maximum starts: finite, so that what has seen nothing gives exp(-inf - start) = 0 and not NaN.
LEAST = -1e30
