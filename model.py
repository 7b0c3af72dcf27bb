"""The networks, and one class per way of training them (a loss on the logits of a minibatch).

Symbols: Φ(x) is the logit, w = 1 the frozen output layer behind it, e an environment, R_e its risk
(mean binary cross entropy), y the label, z the colour, σ the logistic function.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import Batch
from preprocessing import MEAN, STD, UserError
from register import NETWORKS, TRAINERS, register


class Network(nn.Module):
    """Layers that compute the logit Φ(x), then the frozen scalar output layer w = 1.

    The blue channel is left out. It is 0 in every image, also once normalised, so no weight that
    reads it has an effect or a gradient: a network on the two others is the same function.

    Args:
        phi: the layers.
        channels: 2 (red and green), or 1 for a network that can't see colour.
        raw_pixels: whether a black pixel is 0, not the normalised value of 0.
    """

    # Of the command line's arguments, in place of what the parser and the trainer say.
    defaults = {}

    def __init__(self, phi: nn.Sequential, channels: int = 2, raw_pixels: bool = False):
        super().__init__()
        self.phi = phi
        self.channels, self.black = channels, 0.0 if raw_pixels else -MEAN / STD
        # A bare scalar, no nn.Linear: MemTorch would turn a 1 x 1 layer into a crossbar of its own.
        self.output_layer = nn.Parameter(torch.ones(()), requires_grad=False)
        # As in the code of Arjovsky et al. 2019 (Glorot & Bengio 2010).
        for layer in self.layers():
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def layers(self) -> list[nn.Module]:
        """The layers that have weights."""
        return [layer for layer in self.phi if isinstance(layer, (nn.Linear, nn.Conv2d))]

    @torch.no_grad()
    def scale_first_layer(self, factor: float) -> None:
        """Multiply the first layer's weights, before training.

        That layer has nearly all weights of an MLP. What training leaves of their random initial
        values is noise, and there is less of it where they start small. From small weights, IRM and
        groupDRO fail for some seeds.
        """
        self.layers()[0].weight.mul_(factor)

    def paint(self, images: Tensor, colors: Tensor) -> Tensor:
        """Digits (N, pixels) and colours (N,) → what `phi` takes, (N, channels · pixels)."""
        if self.channels == 1:
            return images
        painted = images.new_full((len(images), 2, images.shape[1]), self.black)
        painted[torch.arange(len(images), device=images.device), 1 - colors] = images
        return painted.flatten(1)

    def forward(self, images: Tensor, colors: Tensor | None = None) -> Tensor:
        """Digits (N, pixels) float32 and colours (N,) int64 → logits (N,).

        Without colours, images are taken as painted already.
        """
        inputs = images if colors is None else self.paint(images, colors)
        return self.output_layer * self.phi(inputs).squeeze(-1)


@register(NETWORKS, "MLP")
class MLP(Network):
    """The assignment's network: fully connected layers with ReLU, one logit.

    Args:
        inputs: pixels of all channels together.
        hidden_dim: units of each hidden layer.
        bias: whether the layers have biases.
        drop_rate: proportion of hidden units dropped while training, 0 to 1.
        batchnorm: whether hidden layers are normalised over the minibatch.
        channels, raw_pixels: as in `Network`.
    """

    def __init__(
        self,
        inputs: int = 1568,
        hidden_dim: tuple[int, ...] = (64, 16),
        bias: bool = False,
        drop_rate: float = 0.0,
        batchnorm: bool = False,
        channels: int = 2,
        raw_pixels: bool = False,
    ):
        layers = []
        for width in hidden_dim:
            layers.append(nn.Linear(inputs, width, bias))
            layers += [nn.BatchNorm1d(width)] if batchnorm else []
            layers.append(nn.ReLU())
            layers += [nn.Dropout(drop_rate)] if drop_rate else []
            inputs = width
        layers.append(nn.Linear(inputs, 1, bias))
        super().__init__(nn.Sequential(*layers), channels, raw_pixels)

    def forward(self, images: Tensor, colors: Tensor | None = None) -> Tensor:
        """As `Network.forward`; the first layer at half the cost where images are sorted by colour.

        The channel that a digit is not in is black, one number in all pixels: what it adds to an
        output is that number times a sum of weights, and needs no product.
        """
        first = self.phi[0]
        # A first layer of another kind, on a crossbar, computes in a way of its own.
        if colors is None or self.channels == 1 or type(first).forward is not nn.Linear.forward:
            return super().forward(images, colors)
        like_first = colors == colors[0]
        count = int(like_first.sum())
        if not like_first[:count].all():
            return super().forward(images, colors)
        red, green = first.weight.unflatten(1, (2, -1)).unbind(1)
        lit, dark = (red, green) if colors[0] else (green, red)
        bias = 0 if first.bias is None else first.bias
        hidden = [
            F.linear(images[:count], lit, bias + self.black * dark.sum(1)),
            F.linear(images[count:], dark, bias + self.black * lit.sum(1)),
        ]
        return self.output_layer * self.phi[1:](torch.cat(hidden)).squeeze(-1)


@register(NETWORKS, "CNN")
class CNN(Network):
    """The course project's network: two convolutions with pooling, 64 hidden units, one logit.

    Args:
        drop_rate: proportion of hidden units dropped while training, 0 to 1.
        image_size: 28.
        channels, raw_pixels: as in `Network`.
    """

    defaults = {
        "batch_size": 384,
        "iteration": 1500,
        "average_last": 0.75,
        "drop_rate": 0.3,
        "shift": 2,
    }

    def __init__(
        self,
        drop_rate: float = 0.3,
        image_size: int = 28,
        channels: int = 2,
        raw_pixels: bool = False,
    ):
        if image_size != 28:
            raise UserError("the CNN takes images of 28 x 28: leave --image_size out")
        layers = [nn.Unflatten(1, (channels, 28, 28))]
        for maps, filters in ((channels, 32), (32, 64)):
            layers += [nn.Conv2d(maps, filters, 5), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU()]
        layers += [nn.Dropout(drop_rate), nn.Linear(64, 1)]
        super().__init__(nn.Sequential(*layers), channels, raw_pixels)


def group_means(groups: Tensor, count: int, *values: Tensor) -> list[Tensor]:
    """How many samples each of `count` groups has, and means over groups: each (..., G).

    One product with a mask, no loop over groups. The mean over an absent group is 0.

    Args:
        groups: (..., N), the group of each sample; a number outside 0 to `count` - 1 is no group.
        values: each (..., N), what to take means of.
    """
    index = torch.arange(count, device=groups.device)
    mask = (groups.unsqueeze(-2) == index.unsqueeze(-1)).to(values[0].dtype)
    sizes = mask.sum(-1)
    means = (mask @ torch.stack(values, -1)) / sizes.clamp(min=1).unsqueeze(-1)
    return [sizes, *means.unbind(-1)]


def mean_present(values: Tensor, sizes: Tensor) -> Tensor:
    """Mean of `values` (..., G) over the groups that have samples: (...)."""
    present = (sizes > 0).to(values.dtype)
    return (values * present).sum(-1) / present.sum(-1).clamp(min=1)


class Loss:
    """What a trainer minimises: `objective = loss(logits, batch)`.

    Logits are (N,), or (R, N) with the fields of the batch (R, N) for R stacked repetitions; the
    objective is a scalar, or (R,). An instance serves one training: it may keep state between
    steps. An environment absent from a minibatch has no part in that minibatch's objective.
    """

    # Of the command line's arguments, in place of what the parser says.
    defaults = {}
    environments = 2
    # What the objective is divided by, for the trainer to divide weight decay by as well.
    divisor = 1.0

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Binary cross entropy of each sample, (..., N)."""
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")

    def risks(self, logits: Tensor, batch: Batch) -> Tensor:
        """R_e, (..., E); 0 for an environment that the minibatch lacks."""
        return group_means(batch.envs, self.environments, self.losses(logits, batch))[1]

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError


@register(TRAINERS, "ERM")
class ERM(Loss):
    """Empirical risk minimisation: mean over e of R_e (assignment, equations 2 and 3)."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        sizes, risks = group_means(batch.envs, self.environments, self.losses(logits, batch))
        return mean_present(risks, sizes)


@register(TRAINERS, "groupDRO")
class GroupDRO(Loss):
    """Group distributionally robust optimisation (Sagawa et al. 2019, Algorithm 1).

    q_e ← q_e exp(η R_e), renormalised; then Σ q_e R_e with q held constant.

    Args:
        eta: step size η of the group weights q.
    """

    def __init__(self, eta: float = 0.05):
        self.eta = eta
        self.log_q = None  # (..., E); exp(η R_e) itself can overflow, its logarithm can't

    @property
    def q(self) -> Tensor:
        """The group weights after the last step, (..., E)."""
        return self.log_q.exp()

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        risks = self.risks(logits, batch)
        if self.log_q is None:
            self.log_q = torch.full_like(risks.detach(), -math.log(self.environments))
        self.log_q = torch.log_softmax(self.log_q + self.eta * risks.detach(), -1)
        return (self.q * risks).sum(-1)


@register(TRAINERS, "IRM")
class IRM(Loss):
    """Invariant risk minimisation, IRMv1 (Arjovsky et al. 2019; assignment, equation 4).

    Mean over e of R_e + λ · mean over e of G_e², where G_e = ∂R_e(w · Φ)/∂w at w = 1 is the
    environment's mean of g = (σ(Φ) - y) Φ.

    Args:
        reg_lambda: λ, the weight of the penalty.
        penalty: "plain" squares the minibatch's G_e, as equation 4 says; its expectation is too
            large by the variance of G_e. "unbiased" estimates G_e² by the mean product of the g of
            two different samples, as Arjovsky et al. (section 3.2) do by the product of the
            means of two minibatches; all pairs vary less than one pairing (Hoeffding 1948).
        anneal_iterations: λ is 1 for so many iterations; after that the objective is divided by λ,
            as in the code of the paper's experiment. 0 is equation 4 from the start.
    """

    def __init__(
        self, reg_lambda: float = 50.0, penalty: str = "plain", anneal_iterations: int = 0
    ):
        self.reg_lambda, self.penalty = reg_lambda, penalty
        self.anneal_iterations = anneal_iterations
        self.iteration = 0

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        gradients = (torch.sigmoid(logits) - batch.labels) * logits
        losses = self.losses(logits, batch)
        samples = (losses, gradients, gradients.square())
        sizes, risks, means, squares = group_means(batch.envs, self.environments, *samples)
        penalties = means.square()
        if self.penalty == "unbiased":
            penalties = (sizes * penalties - squares) / (sizes - 1).clamp(min=1)
        annealing = self.iteration < self.anneal_iterations
        weight = 1.0 if annealing else self.reg_lambda
        if self.anneal_iterations and not annealing:
            self.divisor = max(1.0, self.reg_lambda)
        self.iteration += 1
        return mean_present(risks + weight * penalties, sizes) / self.divisor


@register(TRAINERS, "Backdoor")
class Backdoor(Loss):
    """Backdoor adjustment for colour and environment (Pearl 2009, theorem 3.3.2).

    P(y | do(x)) = Σ P(y | x, z, e) P(z, e): the logit is to be that of a population in which the
    label does not depend on the stratum (an environment and a colour). Rests on colour being
    observed and on every stratum showing both labels.

    Args:
        adjustment: "weights" is the inverse-propensity form: within a stratum of the minibatch both
            labels count alike, and strata by their samples; one that lacks a label has no part.
            "offset" estimates the same logit by maximum likelihood, so that no sample counts less
            than another: within a stratum s, the odds of y = 1 are those of Φ(x) times
            P(y = 1 | s) / P(y = 0 | s), by Bayes' rule (prior correction, King & Zeng 2001; logit
            adjustment, Menon et al. 2021), counted over the minibatches so far.
    """

    # All against noise: first weights whose remains are small, a long average, moved images, an
    # epsilon that keeps Adam from long steps for the tiny gradients that pixels seldom lit have.
    defaults = {"average_last": 0.75, "init_scale": 0.3, "epsilon": 1e-4, "shift": 1}

    def __init__(self, adjustment: str = "weights"):
        self.adjustment = adjustment
        self.counts = 0.5  # (..., strata, label); a label not seen yet leaves the odds finite

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        strata = 2 * batch.envs + batch.colors
        cells = 2 * strata + batch.labels.long()
        sizes, means = (
            groups.unflatten(-1, (-1, 2))
            for groups in group_means(cells, 4 * self.environments, self.losses(logits, batch))
        )
        if self.adjustment == "weights":
            weights = sizes.sum(-1) * (sizes.amin(-1) > 0)
            return (weights * means.mean(-1)).sum(-1) / weights.sum(-1).clamp(min=1)
        self.counts = self.counts + sizes
        log_odds = self.counts[..., 1].log() - self.counts[..., 0].log()
        return self.losses(logits + log_odds.gather(-1, strata), batch).mean(-1)
