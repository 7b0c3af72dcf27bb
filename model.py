"""The networks, and one class for each way of training them.

Symbols, as in the assignment: Φ(x) is the logit of an image x, w = 1 the output layer that
multiplies it, e an environment, y the label, L_e the risk of an environment in the minibatch, which
is the mean binary cross entropy of its samples. Besides, z is the colour and σ the logistic
function.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import Batch


class Network(nn.Module):
    """Layers `phi`, then the `output_layer`, a scalar that is 1 and stays 1.

    Args:
        phi: layers from images (N, 2, 28, 28), red and green, to logits (N, 1); from (N, 1, 28, 28)
            with `grayscale`
        grayscale: hide the colours
    """

    def __init__(self, phi: nn.Sequential, grayscale: bool = False):
        super().__init__()
        self.phi = phi
        self.grayscale = grayscale
        # It requires a gradient, for IRM; the optimizer gets phi's parameters alone.
        self.output_layer = nn.Parameter(torch.ones(()))

    def channels(self, images: Tensor) -> Tensor:
        """Normalised images (N, 2 or 3, 28, 28) → the channels that phi gets.

        Red and green, as blue is 0 in every image; with `grayscale` the brighter of these two.
        """
        images = images[:, :2]
        return images.amax(1, keepdim=True) if self.grayscale else images

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 2 or 3, 28, 28) → logits (N,)."""
        return self.output_layer * self.phi(self.channels(images)).squeeze(-1)


class MLP(Network):
    """The assignment's network: fully connected layers with ReLU and one logit.

    Args:
        hidden_dim: units of each hidden layer
        bias: give the layers biases
        drop_rate: proportion of hidden units dropped while training, 0 to 1
        grayscale: hide the colours
    """

    def __init__(
        self,
        hidden_dim: tuple[int, ...] = (64, 16),
        bias: bool = False,
        drop_rate: float = 0.0,
        grayscale: bool = False,
    ):
        layers = [nn.Flatten()]
        inputs = 784 if grayscale else 3 * 784
        for width in hidden_dim:
            layers += [nn.Linear(inputs, width, bias), nn.ReLU()]
            if drop_rate:
                layers.append(nn.Dropout(drop_rate))
            inputs = width
        layers.append(nn.Linear(inputs, 1, bias))
        # The same as the assignment's 2352 inputs: weights are drawn for these, within ±1/√2352,
        # and then those of blue, which is 0 in every image, are taken away.
        if not grayscale:
            drop_blue(layers[1])
        super().__init__(nn.Sequential(*layers), grayscale)


class CNN(Network):
    """The course project's network: two convolutions with pooling, 64 hidden units, one logit.

    Args:
        drop_rate: proportion of hidden units dropped while training, 0 to 1
        grayscale: hide the colours
    """

    def __init__(self, drop_rate: float = 0.0, grayscale: bool = False):
        layers = [
            nn.Conv2d(1 if grayscale else 3, 32, 5),
            nn.MaxPool2d(2),  # before ReLU: the same numbers, and a quarter of the work
            nn.ReLU(),
            nn.Conv2d(32, 64, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
            nn.Dropout(drop_rate),
            nn.Linear(64, 1),
        ]
        if not grayscale:
            drop_blue(layers[0])
        super().__init__(nn.Sequential(*layers), grayscale)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU


def drop_blue(layer: nn.Linear | nn.Conv2d) -> None:
    """Take the blue inputs away from a first layer whose weights torch drew for RGB.

    Blue is 0 in every image, so its weights would change no output and get no gradient: without
    them a step takes a third less time. The others stay as torch drew them for all inputs.
    """
    inputs = layer.weight.shape[1]  # pixels of all channels, or channels
    layer.weight = nn.Parameter(layer.weight[:, : inputs * 2 // 3].detach().clone())
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.weight.shape[1]
    else:
        layer.in_channels = layer.weight.shape[1]


class Loss(nn.Module):
    """What a training minimises: `loss(network, batch)` returns a scalar.

    A loss of one's own has a `forward(self, network, batch)` and a line in register.py. It calls
    the network itself, so it can use logits, features or whatever it needs. State stands in buffers
    (`register_buffer`) and changes in training mode only (`self.training`).
    """

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Binary cross entropy of each sample, (N,)."""
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")

    def risks(self, logits: Tensor, batch: Batch) -> Tensor:
        """L_e of each environment that the batch has a sample of, in the order of `present`."""
        losses = self.losses(logits, batch)
        return torch.stack([losses[batch.envs == e].mean() for e in self.present(batch)])

    def present(self, batch: Batch) -> list[int]:
        """The environments that the batch has a sample of: 0, 1 or both."""
        return batch.envs.unique().tolist()


class ERM(Loss):
    """Empirical risk minimisation (assignment, equations 2 and 3): the mean of L_e over e."""

    def forward(self, network: Network, batch: Batch) -> Tensor:
        return self.risks(network(batch.images), batch).mean()


class GroupDRO(Loss):
    """Group DRO, distributionally robust: the assignment's Algorithm 1, over minibatches.

    It is the minibatch form of Algorithm 1 of Sagawa et al. 2019 (arXiv:1911.08731), which draws
    one group a step. q starts uniform. In each step q_e ← q_e exp(η L_e), then q is renormalised,
    and Σ q_e L_e is minimised with q held constant. Where a minibatch lacks an environment, its q_e
    changes by the renormalisation alone.

    Args:
        eta: step size η of the weights q
    """

    def __init__(self, eta: float = 0.05):
        super().__init__()
        self.eta = eta
        self.register_buffer("q", torch.tensor([0.5, 0.5]))

    def forward(self, network: Network, batch: Batch) -> Tensor:
        risks = self.risks(network(batch.images), batch)
        present = self.present(batch)
        if self.training:
            log_q = self.q.log()  # as exp(η L_e) can overflow; softmax renormalises
            log_q[present] += self.eta * risks.detach()
            self.q = log_q.softmax(0)
        return (self.q[present] * risks).sum()


class IRM(Loss):
    """Invariant risk minimisation, IRMv1 (Arjovsky et al. 2019, arXiv:1907.02893; assignment, (4)).

    The mean of L_e over e, plus λ times the mean over e of (∂L_e(w · Φ)/∂w at w = 1)². This w is
    the network's `output_layer`. As it takes gradients, it has no value under `torch.no_grad`.

    Args:
        reg_lambda: weight λ of the penalty
    """

    def __init__(self, reg_lambda: float = 50.0):
        super().__init__()
        self.reg_lambda = reg_lambda

    def forward(self, network: Network, batch: Batch) -> Tensor:
        risks = self.risks(network(batch.images), batch)
        gradients = [
            torch.autograd.grad(risk, network.output_layer, create_graph=True)[0] for risk in risks
        ]
        penalty = torch.stack(gradients).square().mean()
        return risks.mean() + self.reg_lambda * penalty


class Backdoor(Loss):
    """Backdoor adjustment for colour and environment, the stratum s (Pearl 2009, theorem 3.3.2).

    The graph is s → x, s → y, x → y: s opens the path x ← s → y, lies before x, and meets the
    backdoor criterion. Hence

    1. P(y | do(x)) = Σ_s P(y | do(x), s) P(s | do(x)), by the law of total probability,
    2. P(s | do(x)) = P(s), as x does not cause s,
    3. P(y | do(x), s) = P(y | x, s), as no backdoor path is open once s is given,
    4. P(y | do(x)) = Σ_s P(y | x, s) P(s).

    An image shows one colour, so P(y | x, s) is observed for strata of that colour only. Assumed:
    once the label is known, the digit says nothing about s. Then, by Bayes' rule, the log odds of
    P(y = 1 | x, s) are Φ(x) + o_s, with o_s = log P(y = 1 | s) / P(y = 0 | s) and one Φ for all
    strata (prior correction, King & Zeng 2001). Training fits Φ by maximum likelihood, and counts
    o_s and P(s) in the minibatches. `probability` computes step 4. The commands decide by Φ(x) > 0,
    as for the other trainers, which is P(y = 1 | do(x)) > 1/2 where the colours are equally
    frequent and their offsets each other's negatives, as they nearly are here.

    Balancing is the adjustment of another graph, s → x, s → y, y → x: each sample counts
    1 / P(y | s), which gives P(x | do(y)) = Σ_s P(x | y, s) P(s) (causal bootstrapping, Little &
    Badawy 2019, arXiv:1910.09648). Its σ(Φ) is the posterior of balanced labels.

    Args:
        adjustment: "offset" fits σ(Φ + o_s), "weights" balances
    """

    def __init__(self, adjustment: Literal["offset", "weights"] = "offset"):
        super().__init__()
        self.adjustment = adjustment
        # Samples seen so far, of each stratum s = 2 e + z and each label. They start at a half, so
        # that the odds are finite.
        self.register_buffer("counts", torch.full((4, 2), 0.5))

    @property
    def offsets(self) -> Tensor:
        """o_s, (4,)."""
        return self.counts[:, 1].log() - self.counts[:, 0].log()

    def probability(self, logits: Tensor) -> Tensor:
        """Logits Φ(x) of any shape → P(y = 1 | do(x)) = Σ_s P(s) σ(Φ(x) + o_s), of that shape."""
        p_s = self.counts.sum(1) / self.counts.sum()
        given_s = torch.sigmoid(logits.to(p_s.device).unsqueeze(-1) + self.offsets)
        return (given_s * p_s).sum(-1).to(logits.device)

    def forward(self, network: Network, batch: Batch) -> Tensor:
        logits = network(batch.images)
        strata = 2 * batch.envs + batch.colors
        labels = batch.labels.long()
        if self.training:
            self.counts += torch.bincount(2 * strata + labels, minlength=8).view(4, 2)
        if self.adjustment == "offset":
            return self.losses(logits + self.offsets[strata], batch).mean()
        p_y = self.counts / self.counts.sum(1, keepdim=True)  # P(y | s)
        weights = 1 / p_y[strata, labels]  # 2 on average, hence the division below
        return (weights * self.losses(logits, batch)).mean() / 2
