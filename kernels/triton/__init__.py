"""Two Triton kernels over lists of tensors: `gram` reduces, `combine` streams.

Every rule is the same launch pair with other coefficients. A list of any length and any mix of sizes
is one launch for each combination of dtypes: the kernels find their tensors through a table of
addresses (`batch`), sum in fixed slots (`stream`) and compute a rule's coefficients on the device from
its Python function (`formula`).
"""

from .batch import Batch
from .combine import combine
from .gram import gram

__all__ = ["Batch", "combine", "gram"]
