"""One file per paper; each reads like the paper's algorithm.

A method is a function that takes the learners and returns a `Step`: a function of one batch that updates them and
returns the numbers to log.  What the student imitates (an objective of `kdlib.losses`) is always an argument.
"""

from collections.abc import Callable

from kdlib.learner import Batch

Step = Callable[[Batch], dict[str, float]]
