"""Two Triton kernels over lists of tensors: `gram` computes sums, `combine` writes updates.

All rules use the same two kernels with different coefficients. A list of any length and any mix of sizes
is one launch for each combination of dtypes. The kernels find their tensors through a table of addresses
(`batch`), add partial sums in fixed slots (`stream`), and compute a rule's coefficients on the device from
its Python function (`formula`).
"""

from .batch import Batch
from .combine import combine
from .gram import gram

__all__ = ["Batch", "combine", "gram"]
