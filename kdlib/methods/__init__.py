"""One file per paper; each reads like the paper's algorithm.

A method is a function that takes the learners and returns a `Step`: a function of one batch, and of a feedback batch
where the method asks for one, that updates the learners and returns numbers to log, "loss" among them.  What is
imitated is always an argument, a `kdlib.imitation.Imitation`.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Step = Callable[..., dict[str, float]]


def mean_entropy(logits: Float[Tensor, "batch classes"]) -> float:
    """The mean entropy of the predictions, in nats; 0 for a single output, where there is no distribution.

    Source: the entropy gap of LGTM Figures 5 and 6 is the difference of two of them.
    Derived in: chapters/04_online_distillation.
    """
    log_p = F.log_softmax(logits.detach().float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean().item()
