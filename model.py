"""The networks, and one class for each loss.

The symbols are the assignment's. Φ(x) is the logit of an image x. The output layer multiplies it by
w = 1. y is a label and e is an environment. L_e is the risk of environment e, the mean binary cross
entropy of its samples in the minibatch. In addition, z is a colour and σ is the logistic function.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import Batch


class Network(nn.Module):
    """Network of layers `phi` and an `output_layer`, which is a scalar that stays 1.

    Args:
        phi: layers that map images (N, 2, 28, 28), red and green, to logits (N, 1); with
            `grayscale`, the images are (N, 1, 28, 28)
        grayscale: hide the colours
    """

    def __init__(self, phi: nn.Sequential, grayscale: bool = False):
        super().__init__()
        self.phi = phi
        self.grayscale = grayscale
        # A parameter, because IRM needs its gradient. The optimizer gets the parameters of phi.
        self.output_layer = nn.Parameter(torch.ones(()))

    def channels(self, images: Tensor) -> Tensor:
        """Return the input of `phi` for normalised images (N, 2 or 3, 28, 28).

        It has the red and the green channel. With `grayscale`, it has only the brighter one.
        """
        images = images[:, :2]
        return images.amax(1, keepdim=True) if self.grayscale else images

    def features(self, images: Tensor) -> Tensor:
        """Return the inputs (N, units) of the last layer, for images (N, 2 or 3, 28, 28)."""
        return self.phi[:-1](self.channels(images))

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (N,) of features (N, units)."""
        return self.output_layer * self.phi[-1](features).squeeze(-1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N,) of normalised images (N, 2 or 3, 28, 28)."""
        return self.logits(self.features(images))


class MLP(Network):
    """The assignment's network: fully connected layers with ReLU and one logit.

    Args:
        hidden_dim: units of each hidden layer
        bias: add biases to the layers
        drop_rate: fraction of hidden units that are dropped during training, 0 to 1
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
        if not grayscale:
            drop_blue(layers[1])
        super().__init__(nn.Sequential(*layers), grayscale)


class CNN(Network):
    """The course project's network: two convolutions with pooling, 64 hidden units, one logit.

    Args:
        drop_rate: fraction of hidden units that are dropped during training, 0 to 1
        grayscale: hide the colours
    """

    def __init__(self, drop_rate: float = 0.0, grayscale: bool = False):
        layers = [
            nn.Conv2d(1 if grayscale else 3, 32, 5),
            nn.MaxPool2d(2),  # before ReLU: the result is the same, with a quarter of the work
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
    """Remove the blue inputs from a first layer that torch has initialised for RGB.

    Blue is 0 in every image. Its weights would change no output and get no gradient, and a training
    step takes a third less time without them. The other weights stay as torch initialised them for
    all three channels, for example within ±1/√2352 in the assignment's MLP.
    """
    inputs = layer.weight.shape[1]  # channels of a convolution, or pixels of all channels
    layer.weight = nn.Parameter(layer.weight[:, : inputs * 2 // 3].detach().clone())
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.weight.shape[1]
    else:
        layer.in_channels = layer.weight.shape[1]


class Loss(nn.Module):
    """The objective of a training: `loss(network, batch)` returns a scalar.

    To add a loss, write `forward(self, network, batch)` and add a line to register.py. A loss calls
    the network itself, so it can use logits, features or both. It keeps its state in buffers
    (`register_buffer`) and changes it in training mode only (`self.training`).
    """

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the binary cross entropy of each sample, (N,)."""
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")

    def risks(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return L_e of each environment in the batch, in the order of `present`."""
        losses = self.losses(logits, batch)
        return torch.stack([losses[batch.envs == e].mean() for e in self.present(batch)])

    def present(self, batch: Batch) -> list[int]:
        """Return the environments in the batch: 0, 1 or both."""
        return batch.envs.unique().tolist()


class ERM(Loss):
    """Empirical risk minimisation (assignment, equations 2 and 3): the mean of L_e over e."""

    def forward(self, network: Network, batch: Batch) -> Tensor:
        return self.risks(network(batch.images), batch).mean()


class GroupDRO(Loss):
    """Group distributionally robust optimisation (assignment, Algorithm 1).

    Algorithm 1 of Sagawa et al. 2019 (arXiv:1911.08731) samples one group per step. The assignment
    uses all environments of a minibatch instead. q starts uniform. Each step sets
    q_e ← q_e exp(η L_e), renormalises q, and minimises Σ q_e L_e with q held constant. An
    environment that is not in the minibatch keeps its q_e until the renormalisation.

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
            log_q = self.q.log()  # exp(η L_e) can overflow; softmax renormalises
            log_q[present] += self.eta * risks.detach()
            self.q = log_q.softmax(0)
        return (self.q[present] * risks).sum()


class IRM(Loss):
    """Invariant risk minimisation, IRMv1 (Arjovsky et al. 2019, arXiv:1907.02893; assignment, (4)).

    The objective is the mean of L_e over e, plus λ times the mean over e of (∂L_e(w · Φ)/∂w)² at
    w = 1. Here w is the network's `output_layer`. It needs gradients, also without training.

    Φ = 0 also makes the penalty 0. In a minibatch, the penalty is biased. On average, it exceeds
    the square of the expected gradient by v / n, for n samples of each environment whose gradients
    have variance v. If λ is above about n / 2, this bias pulls Φ to 0. The assignment's λ is far
    below, because n is about 512. Kamath et al. 2021 (arXiv:2101.01134) show where IRMv1 fails.

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
    """Backdoor adjustment (Pearl 2009, theorem 3.3.2). A stratum s is a colour and an environment.

    The course project assumes the graph s → x, s → y, x → y, where x is the digit's shape. The only
    backdoor path is x ← s → y. It is blocked given s, and x does not cause s, so s meets the
    backdoor criterion:

    1. P(y | do(x)) = Σ_s P(y | do(x), s) P(s | do(x)), by the law of total probability,
    2. P(s | do(x)) = P(s), because x does not cause s,
    3. P(y | do(x), s) = P(y | x, s), because no backdoor path is open once s is given,
    4. P(y | do(x)) = Σ_s P(y | x, s) P(s).

    An image shows one colour, so P(y | x, s) is only observed for strata of that colour. If the
    digit is independent of s given the label, Bayes' rule gives the log odds of P(y = 1 | x, s) as
    Φ(x) + o_s (prior correction, King & Zeng 2001). Here o_s = log P(y = 1 | s) / P(y = 0 | s), and
    Φ is the same for all strata. The generated data have this independence. Their graph is another
    one, because their colour is generated from the label. Training fits Φ by maximum likelihood and
    computes o_s and P(s) from the samples in the minibatches.

    `probability` computes step 4. In the assignment's data, it is about 0.72 for the digits 5-9,
    whereas P(y = 1 | x) is 0.80. Metrics use Φ(x) > 0, as for the other trainers. This is nearly
    always the same as P(y = 1 | do(x)) > 1/2, because the two colours are about equally frequent
    and have opposite offsets.

    Balancing uses the weights 1 / P(y | s). It is the adjustment in another graph, s → x, s → y,
    y → x, which gives P(x | do(y)) = Σ_s P(x | y, s) P(s) (causal bootstrapping, Little & Badawy
    2019, arXiv:1910.09648). Then σ(Φ) is the posterior for balanced labels.

    Args:
        adjustment: "offset" fits σ(Φ + o_s), "weights" balances the labels
    """

    def __init__(self, adjustment: Literal["offset", "weights"] = "offset"):
        super().__init__()
        self.adjustment = adjustment
        # Number of training samples seen, for each stratum s = 2 e + z and each label. It starts
        # at 0.5, so that the odds are finite.
        self.register_buffer("counts", torch.full((4, 2), 0.5))

    @property
    def offsets(self) -> Tensor:
        """The log odds o_s of the strata, (4,)."""
        return self.counts[:, 1].log() - self.counts[:, 0].log()

    def probability(self, logits: Tensor) -> Tensor:
        """Return P(y = 1 | do(x)) = Σ_s P(s) σ(Φ(x) + o_s) for logits Φ(x) of any shape."""
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
        weights = 1 / p_y[strata, labels]  # their mean is 2, so the loss is divided by 2
        return (weights * self.losses(logits, batch)).mean() / 2
