"""stub"""

import torch
from torch.nn import functional as F


def layer_map(s, t):
    return tuple((m, m * t // s) for m in range(s + 1))


def _tok(values, mask):
    return (values * mask).sum(-1) / mask.sum(-1)


def hidden_mse(s, t, mask, projection=None):
    s = projection(s) if projection else s
    return _tok((s - t.detach()).square().mean(-1), mask)


def _probs(q, k, mask):
    sc = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return sc, sc.masked_fill(mask[:, None, None, :] == 0, torch.finfo(sc.dtype).min).log_softmax(-1)


def attention_mse(s, t, mask, of="distributions"):
    (a, la), (b, lb) = _probs(*s, mask), _probs(*t, mask)
    x, y = (la.exp(), lb.exp()) if of == "distributions" else (a, b)
    pairs = mask[:, None, :, None] * mask[:, None, None, :]
    return ((x - y.detach()).square() * pairs).sum((1, 2, 3)) / mask.sum(-1).square()


def hidden_cosine(s, t, mask):
    return _tok(1 - F.cosine_similarity(s, t.detach(), dim=-1), mask)


def _kl(ls, lt, mask):
    rows = (lt.exp() * (lt - ls)).nan_to_num().sum(-1).mean(1)
    return _tok(rows, mask)


def attention_kl(sq, sk, tq, tk, mask):
    return _kl(_probs(sq, sk, mask)[1], _probs(tq, tk, mask)[1].detach(), mask)


def relation_kl(s, t, mask, heads=None):
    def split(x):
        if heads is None:
            return x
        x = x.transpose(1, 2).flatten(2)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    s, t = split(s), split(t)
    return _kl(_probs(s, s, mask)[1], _probs(t, t, mask)[1].detach(), mask)
