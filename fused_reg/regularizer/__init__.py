"""`Regularizer`: which parameters it has, their strengths, and the optimizer's steps that it is a part of."""

from fused_reg.regularizer.regularizer import Regularizer as Regularizer
