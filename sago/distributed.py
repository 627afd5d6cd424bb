"""Sums over ranks, for `reduce_gram=`."""

from sago.ranks.sum_over import SumOver

__all__ = ["SumOver"]
